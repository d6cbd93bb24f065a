"""Which ranks of Megatron write a file of the `torch` format, and what each holds. Integers only."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import lcm

from moeconv.errors import LayoutError
from moeconv.layout.degrees import Degrees

_FOLDER = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?(?:_(\d{3,}))?")


@dataclass(frozen=True, slots=True, order=True)
class Rank:
    """The coordinates of a rank that writes a file."""

    tp: int
    pp: int
    ep: int
    etp: int


def ranks_of_stage(degrees: Degrees) -> list[Rank]:
    """List the different ranks of a pipeline stage, in Megatron's order, with pp 0.

    Within a stage rank i is tensor rank i mod tp, expert tensor rank i mod etp, and expert rank (i div etp) mod ep.
    Source: https://github.com/NVIDIA/Megatron-LM/blob/d98e8a64/megatron/core/parallel_state.py (RankGenerator, the
    default order tp-cp-ep-dp-pp for both the attention and the expert grid).
    """
    count = lcm(degrees.tp, degrees.ep * degrees.etp)
    return [Rank(i % degrees.tp, 0, i // degrees.etp % degrees.ep, i % degrees.etp) for i in range(count)]


def legacy_ranks(degrees: Degrees) -> list[Rank]:
    """List the ranks whose files make up a `torch` checkpoint: one for each (tp, pp, ep) that exists.

    Raises:
        LayoutError: two ranks that hold different expert shards would write the same file; the format has no index for
            the expert tensor rank.
    """
    found: dict[tuple[int, int], Rank] = {}
    for rank in ranks_of_stage(degrees):
        other = found.setdefault((rank.tp, rank.ep), rank)
        if other.etp != rank.etp:
            raise LayoutError(
                f"tp {degrees.tp} with etp {degrees.etp}: the torch format names files by tp, pp and ep only, so "
                f"expert shards {other.etp} and {rank.etp} would share a file; use an etp that divides tp, or "
                "--format torch_dist"
            )
    return [Rank(r.tp, stage, r.ep, r.etp) for stage in range(degrees.pp) for r in found.values()]


def rank_folder(rank: Rank, degrees: Degrees) -> str:
    """Name a rank's folder: `mp_rank_TT`, with `_PPP` where there is a pipeline and `_EEE` where experts are parallel.

    Source: https://github.com/NVIDIA/Megatron-LM/blob/d98e8a64/megatron/training/checkpointing.py
    (get_checkpoint_name).
    """
    name = f"mp_rank_{rank.tp:02d}"
    name += f"_{rank.pp:03d}" if degrees.pp > 1 else ""
    return name + (f"_{rank.ep:03d}" if degrees.ep > 1 else "")


def parse_folders(names: list[str]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Find the folders of ranks among names, with the one to three numbers that each carries."""
    for name in sorted(names):
        found = _FOLDER.fullmatch(name)
        if found is not None:
            yield name, tuple(int(number) for number in found.groups() if number is not None)
