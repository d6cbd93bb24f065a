"""Time each kind of attention beside plain torch and its floor: `python -m benchmarks.attention`.

Needs a GPU. Two sequences of 4096, forward and backward, with the heads of a model that has this kind. The floor is the
operations of the pairs that see each other at the rate of a large product of the same run; plain torch is its
`scaled_dot_product_attention`, with a mask where the kind needs one and values filled up where they are narrower than keys. What
Transformer Engine's kernels are chosen for is timed without them, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.fused_steps import POSITIONS, SEQUENCES, ceilings, forward_backward, randn
from runtime.ops import attention
from runtime.ops.documents import Documents, Packed
from runtime.ops.latent_heads import latent_heads
from runtime.ops.te_attention import transformer_engine


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of attention with a model's heads."""

    name: str
    heads: int
    kv_heads: int
    width: int = 128
    value: int = 128
    window: int | None = None
    sinks: bool = False
    documents: Sequence[int] = ()
    """Their lengths in each sequence; none: it is one."""
    queries: int = POSITIONS
    """The last ones of the sequence."""

    def pairs(self) -> float:
        """Queries and keys of a sequence that see each other."""
        if self.documents:
            return sum(length**2 / 2 for length in self.documents)
        seen = self.window or POSITIONS
        return seen * POSITIONS - seen**2 / 2 - (POSITIONS - self.queries) ** 2 / 2

    def flops(self) -> float:
        """Of both passes: scores and values, then scores again and four gradients."""
        return SEQUENCES * self.heads * self.pairs() * (8 * self.width + 6 * self.value)


KINDS = (
    Kind(name="causal (Mixtral)", heads=32, kv_heads=8),
    Kind(name="heads of 64, sinks (gpt-oss)", heads=64, kv_heads=8, width=64, value=64, sinks=True),
    Kind(name="the same, window of 128", heads=64, kv_heads=8, width=64, value=64, sinks=True, window=128),
    Kind(name="window of 1024", heads=32, kv_heads=8, window=1024),
    Kind(name="latent, 192 and 128 (DeepSeek-V2-Lite)", heads=16, kv_heads=16, width=192),
    Kind(name="latent, 256 and 256 (GLM-4.7-Flash)", heads=20, kv_heads=20, width=256, value=256),
    Kind(name="documents of 1024", heads=32, kv_heads=8, documents=(1024,) * 4),
    Kind(name="documents of 2048, 100, 900 and 1048", heads=32, kv_heads=8, documents=(2048, 100, 900, 1048)),
    Kind(name="the last half's queries (context parallelism)", heads=32, kv_heads=8, queries=POSITIONS // 2),
)


def packed(kind: Kind) -> Packed | None:
    """The documents of the rows."""
    if not kind.documents:
        return None
    ids = torch.repeat_interleave(torch.arange(len(kind.documents), dtype=torch.int32), torch.tensor(kind.documents))
    return Documents(ids.repeat(SEQUENCES, 1), torch.device("cuda")).part(0, POSITIONS)


def plain(kind: Kind, documents: Packed | None) -> Callable[..., tuple[Tensor, ...]]:
    """torch's own, by a mask where it needs one."""

    def run(q: Tensor, k: Tensor, v: Tensor, *sinks: Tensor) -> tuple[Tensor, ...]:
        v, sink = F.pad(v, (0, kind.width - kind.value)), sinks[0] if sinks else None
        return (attention.attend_by_torch(q, k, v, kind.window, sinks_H=sink, packed=documents),)

    return run


def time_kind(kind: Kind, rate: float) -> str:
    """A row of the table."""
    from triton.testing import do_bench_cudagraph

    documents = packed(kind)
    inputs = [
        randn(kind.queries, SEQUENCES, kind.heads, kind.width, grad=True),
        randn(POSITIONS, SEQUENCES, kind.kv_heads, kind.width, grad=True),
        randn(POSITIONS, SEQUENCES, kind.kv_heads, kind.value, grad=True),
        *([randn(kind.heads, grad=True)] if kind.sinks else []),
    ]

    def ours(q: Tensor, k: Tensor, v: Tensor, *sinks: Tensor) -> tuple[Tensor, ...]:
        given = sinks[0] if sinks else None
        return (attention.attend(q, k, v, kind.window, sinks_H=given, packed=documents),)

    def ms(function: Callable[..., tuple[Tensor, ...]], where: AbstractContextManager[object]) -> str:
        with where:
            try:
                return f"{do_bench_cudagraph(forward_backward(function, *inputs), return_mode='median'):.3f}"
            except RuntimeError as error:
                return f"fails: {str(error).splitlines()[0][:80]}"

    floor = kind.flops() / rate * 1e3
    found = ms(ours, nullcontext())
    share = f"{floor / float(found):.2f}" if found[0].isdigit() else ""
    asked = kind.window is not None or documents is not None
    without = ms(ours, mock.patch.object(attention, "transformer_engine", return_value=None)) if asked else ""
    return (
        f"| {kind.name} | {floor:.3f} | {found} | {share} | {without} | {ms(plain(kind, documents), nullcontext())} |"
    )


def time_heads(bandwidth: float) -> str:
    """A row for the passes that make queries and keys of latent attention."""
    from triton.testing import do_bench_cudagraph

    shapes = ((16, 192), (16, 256))
    q, kv = (randn(POSITIONS, SEQUENCES, *shape, grad=True) for shape in shapes)
    turned = randn(POSITIONS, SEQUENCES, 64, grad=True)
    cos, sin = randn(POSITIONS, 64), randn(POSITIONS, 64)
    times = [
        do_bench_cudagraph(
            forward_backward(
                lambda *x, fused=fused: latent_heads(*x, cos, sin, neighbours=True, fused=fused), q, kv, turned
            ),
            return_mode="median",
        )
        for fused in (True, False)
    ]
    elements = 16 * (4 * 128 + 3 * 64 + 4 * 128 + 3 * 64 + 2 * 128)  # of a token, forward and backward
    floor = elements * POSITIONS * SEQUENCES * 2 / bandwidth * 1e3
    return f"| heads of latent attention put together | {floor:.3f} | {times[0]:.3f} | {floor / times[0]:.2f} | | {times[1]:.3f} |"


def main() -> None:
    """Print the table."""
    bandwidth, rate = ceilings()
    print(f"{'with' if transformer_engine() is not None else 'without'} Transformer Engine")
    print("| attention | floor | ours | of the floor | without Transformer Engine | plain torch |")
    print("| --- | --- | --- | --- | --- | --- |")
    for kind in KINDS:
        print(time_kind(kind, rate), flush=True)
        torch.cuda.empty_cache()
    print(time_heads(bandwidth))


if __name__ == "__main__":
    main()
