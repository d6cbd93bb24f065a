"""fp32 masters as their bf16 weights and 16 bits more: what the weights, which are kept anyway, lack of them.

An fp32 number is its bf16 neighbour and a signed 16-bit step from there, in units of the fp32 number's last place. Rounded
with ties to even, 65,537 numbers have the same even neighbour, one more than 16 bits tell. So `split` rounds ties away from zero,
and loses nothing; and since everybody else rounds to even, no master is left on a tie that the two rules round differently,
one number of 131,072: `off_ties` takes the one before it. An update does so with masters that are kept whole as well, so that a
run has the same bits with either; loading does so only with those that are cut, since a source in fp32 is to stay as it is.

Source:
    https://github.com/NVIDIA/TransformerEngine/blob/0608bde/transformer_engine/common/multi_tensor/adam.cu
    (AdamFunctorMasterParamRemainder), whose halves are those of `split`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from runtime.parallel.shards import Shard

PIECE = 1 << 24
"""Elements whose masters are made or rounded at a time where a pass goes over all of a shard."""


def off_ties(master: Tensor) -> Tensor:
    """Move the numbers halfway between an even bf16 number and the next one a last place towards zero.

    Args:
        master: any shape, fp32.

    Returns:
        As master; none of it is rounded differently with ties to even and with ties away from zero.
    """
    bits = master.view(torch.int32)
    return (bits - ((bits & 0x1FFFF) == 0x8000).to(torch.int32)).view(torch.float32)


def split(master: Tensor) -> tuple[Tensor, Tensor]:
    """Cut fp32 numbers into bf16 ones and what these lack.

    Args:
        master: any shape, fp32.

    Returns:
        The numbers to the nearest in bf16, ties away from zero, and the low 16 bits, int16; NaN stays NaN, with other bits.
    """
    bits = torch.where(master.isnan(), 0x7FC00000, master.view(torch.int32))
    # bf16 numbers grow with their bits on either side of zero: half of one more is half a step away from zero.
    return ((bits + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16), bits.to(torch.int16)


def join(weight: Tensor, remainder: Tensor) -> Tensor:
    """Put together what `split` has cut.

    Args:
        weight: any shape, bf16; on any device.
        remainder: the same shape, int16.

    Returns:
        fp32, on the remainder's device.
    """
    bits = weight.detach().to(remainder.device).view(torch.int16).to(torch.int32) << 16
    return bits.add_(remainder).view(torch.float32)


def has_remainders(shard: Shard) -> bool:
    """Say whether a shard's masters are kept as what its weights lack of them."""
    return shard.master.dtype == torch.int16


def pieces(shard: Shard) -> Iterator[slice]:
    """Cut a shard into ranges of which a pass may make numbers anew without much memory."""
    size = shard.master.numel()
    for begin in range(0, size, PIECE):
        yield slice(begin, min(begin + PIECE, size))


def halves(shard: Shard) -> list[Tensor]:
    """Give what a shard's masters are kept as: [N] themselves, or their bf16 weights and what these lack, of any device."""
    if not has_remainders(shard):
        return [shard.master]
    assert shard.rounded is not None
    return [shard.rounded, shard.master]


def read_masters(shard: Shard, part: slice) -> Tensor:
    """Give masters as numbers.

    Args:
        shard: a rank's.
        part: a range of it.

    Returns:
        [N] fp32 (fp64 for fp64): live memory, or with remainders put together, where these are.
    """
    found = [half[part] for half in halves(shard)]
    return found[0] if len(found) == 1 else join(*found)


def write_masters(shard: Shard, part: slice, values: Tensor) -> None:
    """Set masters; with remainders the weights, too.

    Args:
        shard: a rank's.
        part: a range of it.
        values: [N] fp32 (fp64 for fp64).
    """
    found = halves(shard)
    for half, value in zip(found, [values] if len(found) == 1 else split(values), strict=True):
        half[part] = value
