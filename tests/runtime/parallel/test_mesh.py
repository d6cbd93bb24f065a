"""The two grids of ranks, and flat ranges as rectangles; without communication, but for the groups' end."""

from __future__ import annotations

import gc
import itertools
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeconv.layout.rect import Rect, check_cover
from runtime.parallel.degrees import ParallelConfig
from runtime.parallel.mesh import ParallelMesh
from runtime.parallel.topology import Piece, Topology, blocks
from runtime.parity.ranks import RankPool


def mesh(parallel: ParallelConfig, world_size: int, rank: int) -> ParallelMesh:
    return ParallelMesh(parallel, world_size, rank)


def test_attention_and_experts_factor_the_same_ranks_independently() -> None:
    parallel = ParallelConfig(tp=2, sp=True, ep=4, etp=1)
    two = mesh(parallel, 8, 2)
    assert (two.rank("dp"), two.rank("tp")) == (1, 0)
    assert (two.rank("edp"), two.rank("ep"), two.rank("etp")) == (0, 2, 0)
    assert two.ranks("tp") == (2, 3)
    assert two.ranks("dp_cp") == (0, 2, 4, 6)
    assert two.ranks("ep") == (0, 1, 2, 3)
    assert two.ranks("edp") == (2, 6)


@pytest.mark.parametrize(
    ("parallel", "world_size"),
    [
        (ParallelConfig(tp=2, sp=True, ep=2, pp=2, cp=2), 16),
        (ParallelConfig(tp=4, ep=2, etp=2, sp=True), 8),
        (ParallelConfig(ep=8), 16),
        (ParallelConfig(pp=4, tp=2), 8),
    ],
)
def test_each_axis_partitions_the_ranks(parallel: ParallelConfig, world_size: int) -> None:
    meshes = [mesh(parallel, world_size, rank) for rank in range(world_size)]
    axes = ("pp", "dp", "cp", "tp", "edp", "ep", "etp", "dp_cp", "tp_cp", "tp_dp_cp", "ep_etp")
    for axis in axes:
        groups = {m.ranks(axis) for m in meshes}
        assert sorted(itertools.chain(*groups)) == list(range(world_size)), axis
        for m in meshes:
            assert m.ranks(axis)[m.rank(axis)] == m.global_rank
    for grid in (("pp", "dp", "cp", "tp"), ("pp", "edp", "ep", "etp")):
        assert len({tuple(m.rank(axis) for axis in grid) for m in meshes}) == world_size
    # What shares tokens or experts stays within a stage.
    for m in meshes:
        assert {meshes[rank].rank("pp") for rank in m.ranks("tp_dp_cp") + m.ranks("ep_etp")} == {m.rank("pp")}


def test_neighbours_share_a_key_value_head() -> None:
    m = mesh(ParallelConfig(tp=4), 8, 6)
    m.share_heads(2)
    assert m.ranks("kv") == (6, 7)
    m.share_heads(4)
    assert m.ranks("kv") == (6,)


def test_degrees_that_do_not_divide_are_refused() -> None:
    with pytest.raises(AssertionError, match=r"tp x pp x cp is 3, which doesn't divide the world size 8"):
        mesh(ParallelConfig(tp=3, etp=1), 8, 0)
    with pytest.raises(AssertionError, match=r"ep x etp x pp is 16"):
        mesh(ParallelConfig(ep=16), 8, 0)


@given(
    heights=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    cols=st.integers(1, 7),
    cuts=st.lists(st.integers(0, 100), max_size=4),
    vector=st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_flat_ranges_become_rectangles_that_cover_each_element_once(
    heights: list[int], cols: int, cuts: list[int], vector: bool
) -> None:
    cols = 1 if vector else cols
    pieces, row = [], 0
    for number, height in enumerate(heights):
        shape = (height + 2,) if vector else (height + 2, cols + 3)
        rect = Rect((1,), (height,)) if vector else Rect((1, 2), (height, cols))
        pieces.append(Piece(f"t{number}", shape, rect, row))
        row += height
    topology = Topology(pieces=tuple(pieces))
    total = row * cols
    ends = sorted({0, total, *(cut % (total + 1) for cut in cuts)})
    found: dict[str, list[tuple[Rect, str]]] = {piece.name: [] for piece in pieces}
    position = 0
    for begin, end in itertools.pairwise(ends):
        for block in blocks(topology, cols, begin, end):
            assert block.start == position
            position += block.rect.size
            offset = block.rect.offsets[0] - 1, *(o - 2 for o in block.rect.offsets[1:])
            found[block.name].append((Rect(offset, block.rect.shape), "a range"))
    assert position == total
    for piece in pieces:
        check_cover(piece.name, piece.rect.shape, found[piece.name])


def gloo_threads() -> int:
    """Count the threads of gloo's groups in this process, those that cycles of garbage keep left out."""
    gc.collect()
    names = (task.read_text() for task in Path("/proc/self/task").glob("*/comm"))
    return sum(name.startswith("pt_gloo") for name in names)


def threads_with_a_mesh() -> int:
    made = ParallelMesh(ParallelConfig(tp=2, sp=True))
    count = gloo_threads()
    assert made.group("tp") is not None
    return count


def test_a_mesh_s_groups_and_their_threads_end_with_the_default_group(pool: RankPool) -> None:
    """A thread that is left when Python ends can abort the process."""
    alone = pool.run(2, gloo_threads)
    assert all(count > before > 0 for count, before in zip(pool.run(2, threads_with_a_mesh), alone, strict=True))
    assert pool.run(2, gloo_threads) == alone
