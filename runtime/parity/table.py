"""The proof as a table: a row for each layout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from runtime.parity.case import Case, Outcome, errors, outcome, run_rank
from runtime.parity.cases import CASES
from runtime.parity.ranks import RankError, RankPool

TOLERANCE = 1e-5
_COLUMNS = ("lm_loss", "aux_loss", "grad_norm", "gradients", "weights")


def chosen(words: Sequence[str]) -> list[Case]:
    """Give the cases whose names contain all of these words."""
    return [case for case in CASES if all(word in case.name for word in words)]


def table(cases: Sequence[Case], pool: RankPool) -> Iterator[tuple[str, bool]]:
    """Train each layout, and one rank beside it.

    Args:
        cases: the layouts.
        pool: ranks, as many as the largest one needs.

    Yields:
        A line, and whether all is well with it; the first one is the heading.
    """
    width = max(len(case.name) for case in cases)
    references: dict[str, Outcome] = {}
    yield f"{'layout':{width}}  ranks  " + "  ".join(f"{name:>9}" for name in _COLUMNS), True
    for case in cases:
        try:
            if case.key not in references:
                references[case.key] = outcome(pool.run(1, run_rank, case.reference))
            found = errors(outcome(pool.run(case.num_ranks, run_rank, case)), references[case.key])
        except RankError as error:
            yield f"{case.name:{width}}  {error}", False
            continue
        good = max(found.values()) < TOLERANCE
        numbers = "  ".join(f"{found[name]:9.1e}" for name in _COLUMNS)
        yield f"{case.name:{width}}  {case.num_ranks:5}  {numbers}{'' if good else '  FAILED'}", good
