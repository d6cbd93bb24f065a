"""State saved under one layout and loaded under another: training goes on as if nothing had happened."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
import pytest

from moeconv.errors import SourceError
from moeconv.layout.rect import Rect
from runtime.parity.case import (
    Array,
    Case,
    assemble,
    copies,
    global_batch,
    make_engine,
    own_share,
    relative,
)
from runtime.parity.ranks import RankPool

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "dp2-dist": (2, {"use_distributed_optimizer": True}),
    "ep2-dp2-dist": (4, {"ep": 2, "use_distributed_optimizer": True}),
    "ep2-dp2-shard": (4, {"ep": 2, "fully_shard": True}),
    "tp2-sp-ep2-etp1": (2, {"tp": 2, "sp": True, "ep": 2, "etp": 1}),
    "tp2-cp2-dist": (4, {"tp": 2, "cp": 2, "use_distributed_optimizer": True}),
    "pp2-tp2": (4, {"pp": 2, "tp": 2}),
    "pp2-vpp2-ep2": (4, {"pp": 2, "vpp": 2, "ep": 2, "pp_schedule": "interleaved"}),
}
PAIRS = [
    ("one", "dp2-dist"),
    ("dp2-dist", "tp2-sp-ep2-etp1"),
    ("tp2-sp-ep2-etp1", "pp2-vpp2-ep2"),
    ("pp2-vpp2-ep2", "ep2-dp2-shard"),
    ("ep2-dp2-shard", "tp2-cp2-dist"),
    ("tp2-cp2-dist", "pp2-tp2"),
    ("pp2-tp2", "ep2-dp2-dist"),
    ("ep2-dp2-dist", "one"),
]


def train(case: Case, steps: tuple[int, ...], saved: tuple[dict[str, Array], dict[str, Any]] | None) -> Any:
    """Some steps, from the initial weights or from a saved state."""
    engine, mesh = make_engine(case)
    if saved is not None:
        tensors, scalars = saved

        def read(name: str, rect: Rect) -> Array:
            return np.ascontiguousarray(tensors[name][rect.slices()])

        engine.load_state(read, tensors)
        engine.load_scalars(scalars)
    for step in steps:
        engine.train_step(own_share(global_batch(case, step), mesh))
    return copies(engine.state(with_optimizer=True)), engine.scalars()


def run(pool: RankPool, layout: str, dtype: str, steps: tuple[int, ...], saved: Any = None) -> Any:
    num_ranks, parallel = LAYOUTS[layout]
    case = Case(name=layout, num_ranks=num_ranks, parallel=parallel, dtype=dtype, model={"vocab_size": 61})
    ranks = pool.run(num_ranks, train, case, steps, saved)
    return assemble(part for parts, _ in ranks for part in parts), ranks[0][1]


@pytest.fixture(scope="module")
def fresh(pool: RankPool) -> Callable[..., Any]:
    """Steps from the initial weights, as `run` does them; those that several tests begin with are done once."""
    return cache(partial(run, pool))


@pytest.mark.parametrize(("first", "second"), PAIRS, ids=["-to-".join(pair) for pair in PAIRS])
def test_training_goes_on_under_another_layout(
    first: str, second: str, pool: RankPool, fresh: Callable[..., Any]
) -> None:
    want, _ = fresh("one", "float32", (0, 1, 2))
    saved = fresh(first, "float32", (0, 1))
    got, scalars = run(pool, second, "float32", (2,), saved)
    assert scalars["num_steps"] == 3
    assert got.keys() == want.keys()
    errors = {name: relative(got[name], want[name]) for name in want}
    assert max(errors.values()) < 2e-5, max(errors.items(), key=lambda item: item[1])


@pytest.mark.parametrize("second", ["dp2-dist", "ep2-dp2-shard", "pp2-tp2"])
def test_masters_and_moments_survive_bit_for_bit(second: str, pool: RankPool, fresh: Callable[..., Any]) -> None:
    saved = fresh("tp2-sp-ep2-etp1", "bfloat16", (0, 1))
    again, scalars = run(pool, second, "bfloat16", (), saved)
    assert scalars == saved[1]
    assert again.keys() == saved[0].keys()
    assert all(np.array_equal(again[name], saved[0][name]) for name in again)


def test_bf16_goes_on_from_an_fp32_checkpoint_at_full_precision(pool: RankPool, fresh: Callable[..., Any]) -> None:
    saved = fresh("one", "float32", (0,))
    again, _ = run(pool, "dp2-dist", "bfloat16", (), saved)
    for name in (name for name in saved[0] if not name.startswith("optimizer.")):
        assert np.array_equal(again[f"optimizer.master.{name}"], saved[0][name])


def load_until(case: Case, saved: tuple[dict[str, Array], dict[str, Any]], state: str, count: int) -> str:
    """Load a state from a disk that breaks after some rectangles of a kind; give the error's name."""
    engine, _ = make_engine(case)
    tensors, left = saved[0], [count]

    def read(name: str, rect: Rect) -> Array:
        if name.startswith(f"optimizer.{state}."):
            left[0] -= 1
            if left[0] < 0:
                raise SourceError("the disk is broken")
        return np.ascontiguousarray(tensors[name][rect.slices()])

    try:
        engine.load_state(read, tensors)
    except SourceError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize("state", ["master", "exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("count", [0, 5, 40])
def test_no_read_error_is_taken_for_a_state_that_is_not_stored(
    state: str, count: int, pool: RankPool, fresh: Callable[..., Any]
) -> None:
    saved = fresh("one", "bfloat16", (0,))
    case = Case(name="one", num_ranks=1, dtype="bfloat16", model={"vocab_size": 61})
    assert pool.run(1, load_until, case, saved, state, count) == ["the disk is broken"]
