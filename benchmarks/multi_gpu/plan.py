"""Which measurements are made, and by how many ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

from benchmarks.multi_gpu.job import Task
from benchmarks.multi_gpu.parity import cases
from benchmarks.multi_gpu.sizes import FULL, QUICK, layouts

SECTIONS = ("parity", "training", "filled", "scaling", "checkpoint")


def make_plan(ranks: int, sections: Sequence[str], *, quick: bool) -> list[tuple[int, list[Task]]]:
    """List the launches.

    Args:
        ranks: the largest number of ranks.
        sections: what to measure.
        quick: tiny sizes and few cases.

    Returns:
        Number of ranks and tasks of each launch, the largest first; what one rank does alone is part of the smallest.
    """
    worlds = [world for world in (8, 4, 2, 1) if world <= ranks]
    numbers = count()
    launches = []
    for world in worlds if ranks == 1 else worlds[:-1]:
        alone = [1] if world == 2 else []
        tasks = [Task(number=next(numbers), **t) for n in (world, *alone) for t in _tasks(n, ranks, sections, quick)]
        if tasks:
            launches.append((world, tasks))
    return launches


def _tasks(world: int, ranks: int, sections: Sequence[str], quick: bool) -> Iterator[dict[str, Any]]:
    makers = {
        "parity": _parity, "training": _training, "filled": _filled, "scaling": _scaling, "checkpoint": _checkpoint,
    }  # fmt: skip
    for section in SECTIONS:
        if section in sections:
            for fields in makers[section](world, ranks, quick):
                yield {"world": world} | fields


def _parity(world: int, ranks: int, quick: bool) -> Iterator[dict[str, Any]]:
    for dtype in ("float32", "bfloat16"):
        for name in cases(world, quick=quick) if world > 1 else ():
            yield {"kind": "parity", "label": name, "options": {"dtype": dtype}}


def _training(world: int, ranks: int, quick: bool) -> Iterator[dict[str, Any]]:
    """All layouts with a depth that each of them holds."""
    if world != ranks:
        return
    sequences = (QUICK if quick else FULL).sequences_per_rank * world
    options = {"sequences": sequences, "fits": world, "profile": True, "layers": "common"}
    for name, parallel in layouts(world).items():
        yield {"kind": "training", "label": name, "parallel": parallel, "options": options}
        if parallel.get("ep") == world > 1:
            hidden = {"label": f"{name}, exchanges overlapped", "parallel": parallel | {"overlap_exchange": True}}
            yield {"kind": "training", "options": options} | hidden
    if world > 1:
        yield {"kind": "traffic", "label": "collectives"}


def _filled(world: int, ranks: int, quick: bool) -> Iterator[dict[str, Any]]:
    """All layouts with as many layers as they hold."""
    if quick or world != ranks or world == 1:
        return
    options = {"sequences": FULL.sequences_per_rank * world, "fits": world, "layers": "own"}
    for name, parallel in layouts(world).items():
        yield {"kind": "training", "label": name, "parallel": parallel, "options": options}


def _scaling(world: int, ranks: int, quick: bool) -> Iterator[dict[str, Any]]:
    """A model that one GPU holds, on ever more of them: as many sequences on each, or as many on all together."""
    each = (QUICK if quick else FULL).sequences_per_rank
    chosen = layouts(world)
    options: dict[str, Any]
    for axis in ("ep", "dp"):
        parallel = chosen.get(f"{axis}{world}", {})
        for mode, sequences in (("weak", each * world), ("strong", each * 2)):
            options = {"layers": "common", "fits": 1, "sequences": sequences, "mode": mode}
            yield {"kind": "scaling", "label": axis, "parallel": parallel, "options": options}


def _checkpoint(world: int, ranks: int, quick: bool) -> Iterator[dict[str, Any]]:
    """Saved by all ranks under their first layout; taken up by all under the others, and by fewer under their first."""
    sequences = 2 * ranks
    names = list(layouts(world).items())
    first, parallel = names[0]
    if world == ranks:
        yield {"kind": "save", "label": first, "parallel": parallel, "options": {"sequences": sequences}}
    for name, parallel in names[1:] if world == ranks > 1 else names[:1]:
        saved = next(iter(layouts(ranks)))
        yield {"kind": "resume", "label": name, "parallel": parallel, "options": {"saved": saved}}
