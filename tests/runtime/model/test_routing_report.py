"""What a step reports of its routers, against a count by hand of what each router of each rank was given."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from moeconv.families.compute import Router
from runtime.moe import router
from runtime.moe.tape import active_tape
from runtime.parity.case import Case, global_batch, make_engine, own_share
from runtime.parity.cases import DIST, SP, case
from runtime.parity.ranks import RankPool

TOPK, NUM_EXPERTS = 2, 8
SIGMOID = Router(experts=NUM_EXPERTS, top_k=TOPK, score="sigmoid", normalise=True)
DROPPING: dict[str, Any] = {"moe": {"capacity_factor": 1.0}}
CASES = (
    case("1 rank", 1, **DROPPING),
    case("1 rank padded", 1, moe={"capacity_factor": 0.5, "pad_to_capacity": True}),
    case("ep2", 2, {"ep": 2} | DIST, **DROPPING),
    case("tp2", 2, {"tp": 2}, **DROPPING),
    case("tp2 sp ep2 etp1 padded", 2, {"tp": 2, "ep": 2, "etp": 1} | SP, moe={"capacity_factor": 1.0, "pad_to_capacity": True}),
    case("cp2", 2, {"cp": 2}, **DROPPING),
    case("pp2 a stage without MoE", 2, {"pp": 2}, model={"model_type": "qwen3_moe", "mlp_only_layers": [0, 1]}, **DROPPING),
    case("pp2 ep2 recomputed", 4, {"pp": 2, "ep": 2}, recompute={"granularity": "full"}, **DROPPING),
    case("ep2 dropless", 2, {"ep": 2}),
    case("sigmoid", 1, moe={"router": SIGMOID, "capacity_factor": 1.0}),
)  # fmt: skip


class Count:
    """Sums over what one rank's routers are given, in numpy and fp64."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        self.rows: dict[int, np.ndarray[Any, Any]] = {}  # layer -> tokens, dropped, not finite, entropy

    def add(self, layer: int, logits: np.ndarray[Any, Any]) -> None:
        bad = ~np.isfinite(logits).all(1)
        exps = np.exp(logits - logits.max(1, keepdims=True))
        scores = exps / exps.sum(1, keepdims=True)
        if "router" in self.options:
            scores = 1 / (1 + np.exp(-logits))
            scores /= scores.sum(1, keepdims=True)
        entropy = -(scores * np.log(scores)).sum()
        chosen = np.bincount(np.argsort(-logits, axis=1)[:, :TOPK].ravel(), minlength=NUM_EXPERTS)
        dropped = 0
        if "capacity_factor" in self.options:
            capacity = int(np.ceil(len(logits) * TOPK / NUM_EXPERTS * self.options["capacity_factor"]))
            dropped = int(np.maximum(chosen - capacity, 0).sum())
        row = np.array([len(logits), dropped, bad.sum(), entropy])
        self.rows[layer] = self.rows.get(layer, np.zeros(4)) + row


def run_rank(case: Case, bad_token: int | None) -> tuple[dict[int, Any], dict[str, Any]]:
    engine, mesh = make_engine(case, on_nonfinite="skip")
    count = Count(case.moe)
    for stage in engine.module:
        for layer in stage.layers:
            for gate in (module for module in layer.modules() if isinstance(module, router.Router)):

                def seen(module: Any, args: Any, index: int = layer.index) -> None:
                    tape = active_tape()
                    if tape is None or not tape.replaying:
                        with torch.no_grad(), np.errstate(all="ignore"):
                            count.add(index, (args[0].double() @ module.weight.double().t()).numpy())

                gate.register_forward_pre_hook(seen)
        if bad_token is not None and stage.embedding is not None:
            stage.embedding.weight.data[bad_token] = torch.inf
    report = engine.train_step(own_share(global_batch(case, 0), mesh)).routing
    assert report is not None
    names = ("tokens_L", "dropped_L", "nonfinite_L", "entropy_L", "aux_loss_L", "z_loss_L")
    got: dict[str, Any] = {name: getattr(report, name).tolist() for name in names}
    got |= {"share": report.dropped_share, "entropy": report.entropy, "nonfinite": report.nonfinite}
    got["added"] = report.added_loss
    return count.rows, got


def by_hand(ranks: list[dict[int, Any]]) -> np.ndarray[Any, Any]:
    """[L, 4] sums over ranks of tokens, dropped choices, tokens with bad logits, entropy."""
    total = np.zeros((4, 4))
    for rows in ranks:
        for layer, row in rows.items():
            total[layer] += row
    return total


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_shares_and_entropy_are_those_counted_by_hand(case: Case, pool: RankPool) -> None:
    results = pool.run(case.num_ranks, run_rank, case, None)
    want, got = by_hand([rows for rows, _ in results]), results[0][1]
    assert all(other == got for _, other in results), "every rank reports the same"
    active = want[:, 0] > 0
    assert active.tolist() == [layer not in case.model.get("mlp_only_layers", []) for layer in range(4)]
    assert got["tokens_L"] == want[:, 0].tolist()
    assert want[active, 0].tolist() == [4 * 2 * 16] * active.sum(), "the hand saw every token once"
    assert got["dropped_L"] == want[:, 1].tolist()
    assert (want[active, 1] > 0).all() == ("capacity_factor" in case.moe), "tokens are dropped where a capacity is set"
    assert got["share"] == pytest.approx(want[:, 1].sum() / (want[:, 0].sum() * TOPK), rel=1e-12)
    assert got["nonfinite_L"] == [0, 0, 0, 0]
    entropies = want[active, 3] / want[active, 0]
    np.testing.assert_allclose(np.array(got["entropy_L"])[active], entropies, rtol=1e-5)
    assert got["entropy"] == pytest.approx(entropies.mean(), rel=1e-5)
    assert 0 < got["entropy"] < np.log(NUM_EXPERTS)
    # The coefficients are those of make_engine.
    assert got["added"] == pytest.approx(0.02 * sum(got["aux_loss_L"]) + 1e-3 * sum(got["z_loss_L"]), rel=1e-6)
    assert got["added"] > 0.05


def test_the_loss_of_pooled_layers_is_added_once(pool: RankPool) -> None:
    options: dict[str, Any] = {"aux_loss_mode": "hf", "aux_loss_coeff": (0.5,), "z_loss_coeff": 0.0}
    [(_, got)] = pool.run(1, run_rank, case("hf", 1, moe=options), None)
    assert len(set(got["aux_loss_L"])) == 1
    assert got["added"] == pytest.approx(0.5 * got["aux_loss_L"][0])


@pytest.mark.parametrize("layout", [{}, {"ep": 2}, {"tp": 2}], ids=str)
def test_logits_that_are_not_finite_are_counted(layout: dict[str, Any], pool: RankPool) -> None:
    num_ranks = 2 if layout else 1
    results = pool.run(num_ranks, run_rank, case("bad", num_ranks, layout), 7)
    want, got = by_hand([rows for rows, _ in results])[:, 2], results[0][1]
    assert got["nonfinite_L"] == want.tolist()
    assert 0 < want[0] < 4 * 2 * 16, "some tokens, not all"
    assert got["nonfinite"] == want.sum()
