"""A training step beside peers on several GPUs: which layouts, and their tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from benchmarks.peers import compare
from benchmarks.step_work import Work

_MICROBATCHES = 8


def works(ranks: int, *, quick: bool) -> Iterator[Work]:
    """List what is compared, the smallest number of ranks first.

    Args:
        ranks: the largest number of them.
        quick: a tiny model.

    Yields:
        Expert parallelism over all ranks, and from 4 of them on beside tensor parallelism, where ranks with data of their own
        are half as many and so have twice the micro-batches: a step of so many ranks always has as many tokens. Balanced, since
        random weights send each system's tokens elsewhere, and ranks wait for the one that has most.
    """
    make = partial(Work.of, *(("tiny", 2) if quick else ("mixtral", 4)), balanced=True)
    for world in (2, 4, 8):
        if world > ranks:
            return
        yield make(world, f"ep{min(world, 4 if quick else 8)}", 1, [_MICROBATCHES])
        if world >= 4:
            yield make(world, "tp2 ep2", 1, [2 * _MICROBATCHES])


def compare_peers(ranks: int, systems: Sequence[str] | None, rounds: int, out: Path | None, *, quick: bool) -> int:
    """Measure and print, one layout after another.

    Args:
        ranks: the largest number of them.
        systems: which; None: all that are installed and have a place.
        rounds: how often each, in turns.
        out: folder for peers.md and the kernels of a step; None: none.
        quick: a tiny model.

    Returns:
        0 if none of this project's systems failed.
    """
    status, texts = 0, []
    for work in works(ranks, quick=quick):
        text, failed = compare(work, systems, rounds, None if out is None else out / "kernels")
        print(text, flush=True)
        texts.append(text)
        status |= any(name.startswith("runtime") for name in failed)
        if out is not None:  # what is there already, should this process be ended
            out.mkdir(parents=True, exist_ok=True)
            (out / "peers.md").write_text("\n\n".join(texts) + "\n")
    return status
