"""FP8 over several ranks (its products in plain torch): what a layout computes beside one rank, and what it saves."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest

from moeconv.layout.rect import Rect
from runtime.fp8.scaling import FP8_HISTORY
from runtime.parity.case import Array, Case, assemble, copies, global_batch, make_engine, own_share
from runtime.parity.ranks import RankPool

SP = {"tp": 2, "sp": True}
DIST = {"use_distributed_optimizer": True}
# Each micro-batch goes whole through the same products as on one rank.
SAME: dict[str, dict[str, Any]] = {
    "dp2 distributed": DIST, "dp2 sharded": {"fully_shard": True}, "pp2": {"pp": 2},
    "pp2 zero-bubble": {"pp": 2, "pp_schedule": "zero-bubble"},
}  # fmt: skip
# Ranks hold parts of weights, or see some of the tokens, and scale these by themselves.
PARTS: dict[str, dict[str, Any]] = {
    "tp2 sp": SP, "ep2": {"ep": 2} | DIST, "tp2 sp ep2 etp1": SP | {"ep": 2, "etp": 1}, "cp2": {"cp": 2},
}  # fmt: skip
LAYOUTS = SAME | PARTS
STEPS = (0, 1, 2)


class Rank(NamedTuple):
    """What a rank did."""

    losses: list[float]
    gradients: Any
    state: Any
    scalars: dict[str, Any]
    lines: list[str]


def train(case: Case, steps: tuple[int, ...], evaluates: bool = False, saved: Any = None) -> Rank:
    """Some steps from the initial weights, or from a saved state."""
    engine, mesh = make_engine(case)
    lines: list[str] = []
    if saved is not None:
        tensors, scalars = saved

        def read(name: str, rect: Rect) -> Array:
            return np.ascontiguousarray(tensors[name][rect.slices()])

        engine.load_state(read, tensors)
        lines = engine.load_scalars(scalars)
    losses = []
    for step in steps:
        losses.append(engine.train_step(own_share(global_batch(case, step), mesh)).lm_loss)
        if evaluates:
            engine.evaluate(own_share(global_batch(case, 9), mesh))
    return Rank(losses, copies(engine.gradients()), copies(engine.state(with_optimizer=True)), engine.scalars(), lines)


class Run(NamedTuple):
    """What all ranks did together."""

    losses: list[float]
    gradients: dict[str, Array]
    state: dict[str, Array]
    scalars: dict[str, Any]
    lines: list[str]


# Of whose pieces blocks of 128 x 128 are whole.
WIDE = {"hidden_size": 256, "num_key_value_heads": 4, "head_dim": 64, "intermediate_size": 256, "num_hidden_layers": 2}


def run(
    pool: RankPool,
    recipe: str | None,
    layout: str | None,
    steps: tuple[int, ...] = STEPS,
    *,
    wide: bool = False,
    **options: Any,
) -> Run:
    model = WIDE if wide else {}
    fp8 = {} if recipe is None else {"format": "hybrid", "recipe": recipe}
    num_ranks = 1 if layout is None else 2
    parallel = {} if layout is None else LAYOUTS[layout]
    case = Case(name=str(layout), num_ranks=num_ranks, parallel=parallel, model=model, fp8=fp8, num_microbatches=2)
    ranks: list[Rank] = pool.run(num_ranks, train, case, steps, *options.values())
    assert all(rank.losses == ranks[0].losses for rank in ranks)
    assert all(rank.scalars == ranks[0].scalars for rank in ranks), "a tensor has one history"
    gradients, state = (assemble(part for rank in ranks for part in rank[place]) for place in (1, 2))
    return Run(ranks[0].losses, gradients, state, ranks[0].scalars, ranks[0].lines)


@pytest.fixture(scope="module")
def alone(pool: RankPool) -> dict[str | None, Run]:
    return {recipe: run(pool, recipe, None) for recipe in (None, "tensorwise", "delayed")}


def distance(one: dict[str, Array], other: dict[str, Array]) -> float:
    """Of all tensors together: the length of the difference over the length."""
    assert one.keys() == other.keys()
    return float(
        (sum(((one[n] - other[n]) ** 2).sum() for n in one) / sum((other[n] ** 2).sum() for n in other)) ** 0.5
    )


def worst(got: list[float], want: list[float]) -> float:
    return max(abs(a / b - 1) for a, b in zip(got, want, strict=True))


CASES = [(layout, "delayed") for layout in LAYOUTS] + [
    (layout, "tensorwise") for layout in ("dp2 sharded", "tp2 sp", "ep2")
]


@pytest.mark.parametrize(("layout", "recipe"), CASES, ids=[f"{layout}, {recipe}" for layout, recipe in CASES])
def test_a_layout_gives_what_one_rank_gives(
    layout: str, recipe: str, alone: dict[str | None, Run], pool: RankPool
) -> None:
    got, one, exact = run(pool, recipe, layout), alone[recipe], alone[None]
    histories = [found.scalars.get(FP8_HISTORY, {}) for found in (got, one)]
    assert histories[0].keys() == histories[1].keys()
    noise = distance(one.gradients, exact.gradients)
    assert 0.02 < noise < 0.2, "FP8 is at work"
    if layout in SAME:
        assert worst(got.losses, one.losses) < 1e-6
        assert distance(got.gradients, one.gradients) < 1e-5
        assert all(np.allclose(column, histories[1][name], rtol=1e-5) for name, column in histories[0].items())
        return
    # Other roundings of the same numbers: no further from one rank than that is from fp32.
    assert worst(got.losses, one.losses) < 5e-3
    assert distance(got.gradients, one.gradients) < 1.5 * noise
    assert distance(got.gradients, exact.gradients) < 1.5 * noise
    for name, column in histories[0].items():
        # The first step's inputs are those of one rank but for roundings below them.
        assert column[2] == pytest.approx(histories[1][name][2], rel=0.25), name


@pytest.fixture(scope="module")
def alone_wide(pool: RankPool) -> tuple[Run, Run]:
    return run(pool, "blockwise", None, wide=True), run(pool, None, None, wide=True)


@pytest.mark.parametrize("layout", ["dp2 sharded", "pp2", "tp2 sp", "ep2"])
def test_blocks_are_those_of_one_rank(layout: str, alone_wide: tuple[Run, Run], pool: RankPool) -> None:
    """Under tensor parallelism too, whose pieces are whole blocks; an expert's rows come from other ranks in other blocks."""
    got, (one, exact) = run(pool, "blockwise", layout, wide=True), alone_wide
    noise = distance(one.gradients, exact.gradients)
    assert 0.02 < noise < 0.5, "FP8 is at work, and turns choices of experts"
    assert FP8_HISTORY not in got.scalars
    # A sum in another order is enough to round a number otherwise.
    bounds = (5e-3, 1.5 * noise) if layout == "ep2" else (2e-4, 0.2 * noise) if layout == "tp2 sp" else (1e-6, 1e-5)
    assert worst(got.losses, one.losses) < bounds[0]
    assert distance(got.gradients, one.gradients) < bounds[1]


def test_a_resumed_run_goes_on_bit_by_bit_and_evaluations_leave_no_trace(pool: RankPool) -> None:
    want = run(pool, "delayed", "ep2", (0, 1, 2, 3), evaluates=True)
    first = run(pool, "delayed", "ep2", (0, 1))
    got = run(pool, "delayed", "ep2", (2, 3), evaluates=False, saved=(first.state, first.scalars))
    assert not got.lines
    assert got.losses == want.losses[2:]
    assert got.scalars == want.scalars
    assert all(np.array_equal(got.state[name], want.state[name]) for name in want.state)
    # Without the history the next step is scaled by itself, and told of.
    bare = {name: value for name, value in first.scalars.items() if name != FP8_HISTORY}
    anew = run(pool, "delayed", "ep2", (2,), evaluates=False, saved=(first.state, bare))
    assert len(anew.lines) == 1
    assert "has no largest values of earlier steps: the next step is scaled by each tensor itself" in anew.lines[0]
    assert anew.losses[0] != want.losses[2]
    assert all(column[1] == 0 for column in anew.scalars[FP8_HISTORY].values())


def test_a_history_is_of_the_model_whatever_the_layout(alone: dict[str | None, Run], pool: RankPool) -> None:
    saved = (alone["delayed"].state, alone["delayed"].scalars)
    want = run(pool, "delayed", None, (3,), evaluates=False, saved=saved)
    for layout in ("pp2", "dp2 sharded"):
        got = run(pool, "delayed", layout, (3,), evaluates=False, saved=saved)
        assert got.losses == pytest.approx(want.losses, rel=1e-6)
        assert distance(got.gradients, want.gradients) < 1e-5
    split = run(pool, "delayed", "tp2 sp", (), evaluates=False, saved=saved)
    assert split.scalars[FP8_HISTORY] == saved[1][FP8_HISTORY]
