"""Print how far each layout's training is from that of one rank: `python -m benchmarks.parity [WORDS OF A NAME ...]`.

Each row is a layout of up to 8 CPU ranks (gloo, fp32) that trains a tiny Mixtral for two steps on the same global batch
as one rank. The numbers are largest relative errors: of the loss, of the balancing loss, of the gradient norm, and over
all tensors, each against its own largest value, of the gradients of the first step and the weights after the second.
"""

from __future__ import annotations

import sys

from tests.runtime.parallel.cases import CASES
from tests.runtime.parallel.parity import Outcome, errors, outcome, run_rank
from tests.runtime.ranks import RankError, RankPool

COLUMNS = ("lm_loss", "aux_loss", "grad_norm", "gradients", "weights")
TOLERANCE = 1e-5


def main() -> int:
    """Run the cases whose names contain all the given words.

    Returns:
        0 if every error is below the tolerance.
    """
    words = sys.argv[1:]
    chosen = [case for case in CASES if all(word in case.name for word in words)]
    width = max((len(case.name) for case in chosen), default=0)
    pool = RankPool(8)
    references: dict[str, Outcome] = {}
    failed = 0
    print(f"{'layout':{width}}  ranks  " + "  ".join(f"{name:>9}" for name in COLUMNS))
    for case in chosen:
        try:
            if case.key not in references:
                references[case.key] = outcome(pool.run(1, run_rank, case.reference))
            found = errors(outcome(pool.run(case.num_ranks, run_rank, case)), references[case.key])
        except RankError as error:
            print(f"{case.name:{width}}  {error}")
            failed += 1
            continue
        bad = max(found.values()) >= TOLERANCE
        failed += bad
        numbers = "  ".join(f"{found[name]:9.1e}" for name in COLUMNS)
        print(f"{case.name:{width}}  {case.num_ranks:5}  {numbers}{'  FAILED' if bad else ''}", flush=True)
    pool.close()
    print(f"{len(chosen) - failed} of {len(chosen)} layouts within {TOLERANCE}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
