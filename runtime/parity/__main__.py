"""Print how far each layout's training is from that of one rank: `python -m runtime.parity [WORDS OF A NAME ...]`.

Each row is a layout of up to 8 CPU ranks (gloo, fp32) that trains a tiny model for two steps on the same global batch
as one rank. The numbers are largest relative errors: of the loss, of the balancing loss, of the gradient norm, and over
all tensors, each against its own largest value, of the gradients of the first step and the weights after the second.
"""

from __future__ import annotations

import sys

from moeconv.errors import MoeconvError
from moeconv.extras import needed


def main() -> int:
    """Run the layouts whose names contain all words of the command line.

    Returns:
        0 if every error is below the tolerance, 1 if one is not, 2 where nothing could be run.
    """
    words = sys.argv[1:]
    if {"-h", "--help"} & set(words):
        print(__doc__)
        return 0
    try:
        with needed("training"):
            from runtime.parity.ranks import RankPool
            from runtime.parity.table import TOLERANCE, chosen, table
    except MoeconvError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    cases = chosen(words)
    if not cases:
        print(f"error: no layout's name has all of: {' '.join(words)}", file=sys.stderr)
        return 2
    pool = RankPool(max(case.num_ranks for case in cases))
    failed = 0
    for line, good in table(cases, pool):
        failed += not good
        print(line, flush=True)
    pool.close()
    print(f"{len(cases) - failed} of {len(cases)} layouts within {TOLERANCE}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
