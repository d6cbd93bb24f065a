"""Every layout trains like one rank: losses, gradients, gradient norm, weights after two steps."""

from __future__ import annotations

import pytest

from tests.runtime.parallel.cases import CASES
from tests.runtime.parallel.parity import EMPTY_EXPERT, Case, Outcome, errors, model_of, outcome, run_rank
from tests.runtime.ranks import RankPool

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def references() -> dict[str, Outcome]:
    return {}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_layout_equals_one_rank(case: Case, pool: RankPool, references: dict[str, Outcome]) -> None:
    if case.key not in references:
        references[case.key] = outcome(pool.run(1, run_rank, case.reference))
    want = references[case.key]
    found = errors(outcome(pool.run(case.num_ranks, run_rank, case)), want)
    assert max(found.values()) < TOLERANCE, found
    # What the reference must contain for the comparison to mean something.
    assert want.numbers["grad_norm"][0] > case.optim.get("clip_grad", 0.5), "gradients are clipped"
    if want.load:
        assert (want.load[0].sum(1) > 0).sum() == len(model_of(case).moe_layers)
    if want.load and not case.model.keys() & {"mlp_only_layers", "model_type"} and not case.moe:
        assert (want.load[0][:, EMPTY_EXPERT] == 0).all(), "one expert gets no token"
