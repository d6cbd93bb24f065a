"""Every layout trains like one rank: losses, gradients, gradient norm, weights after two steps."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path

import pytest

from runtime.parity.case import EMPTY_EXPERT, Case, Outcome, errors, model_of, outcome, run_rank
from runtime.parity.cases import CASES
from runtime.parity.ranks import RankPool
from runtime.parity.table import TOLERANCE, chosen, table


@pytest.fixture(scope="module")
def references() -> dict[str, Outcome]:
    return {}


# Without pipelines, sharded states or overlaps, no communication of a layer is done in another.
AXES = {"tp", "sp", "ep", "etp", "cp"}


def lean(case: Case) -> Case:
    """The case with as little as shows what it is for.

    That is two micro-batches a rank: outside pipelines and pairs of them, more repeat what the second shows. And two of
    Mixtral's layers, which are alike, where each is computed for itself.
    """
    if case.captures:  # which on CPUs is room for rows alone, from the second step on
        case = dataclasses.replace(case, warm_up=0, num_microbatches=4)
    if case.parallel.keys() <= AXES and "model_type" not in case.model and not (case.optim or case.lora):
        case = dataclasses.replace(case, model=case.model | {"num_hidden_layers": 2})
    degrees = {name: case.parallel.get(name, 1) for name in ("pp", "cp", "tp")}
    if degrees["pp"] > 1 or case.num_microbatches != 4 or case.parallel.get("overlap_exchange"):
        return case
    num_data_ranks = case.num_ranks // math.prod(degrees.values())
    return dataclasses.replace(case, num_microbatches=min(4, 2 * num_data_ranks))


# What is replayed without exchanges differs from the rest on GPUs alone.
HERE = [lean(case) for case in CASES if not case.captures or case.parallel.get("ep", 1) > 1]


@pytest.mark.parametrize("case", HERE, ids=lambda case: case.name.replace(" ", "-"))
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
    as_drawn = case.lora.get("quantize_base") is None  # else the tokens that routers see have moved
    if want.load and as_drawn and not case.model.keys() & {"mlp_only_layers", "model_type"} and not case.moe:
        assert (want.load[0][:, EMPTY_EXPERT] == 0).all(), "one expert gets no token"


def test_the_table_has_a_row_for_each_layout(pool: RankPool) -> None:
    """`python -m runtime.parity`, which needs nothing of the tests."""
    cases = chosen(["dp2", "optimizer"])[:1]
    heading, row = table(cases, pool)
    assert heading[0].split()[:2] == ["layout", "ranks"]
    assert row[1], row[0]
    assert row[0].startswith(f"{cases[0].name}      2")
    assert all(float(number) < TOLERANCE for number in row[0].split()[-5:])


def test_no_benchmark_and_no_package_imports_tests() -> None:
    root = Path(__file__).parents[3]
    files = [p for top in ("benchmarks", "moeconv", "runtime", "cli") for p in (root / top).rglob("*.py")]
    wrong = [
        str(p) for p in files if re.search(r"^\s*(from|import) tests\b", p.read_text(encoding="utf8"), re.MULTILINE)
    ]
    assert files
    assert wrong == []
