"""Hostile inputs by the million: `python -m tests.fuzz --cases 1000000 [--target NAME] [--seed 0] [--json]`.

Genuine tiny files are mutated and read, each in a process with 1.3 GB of address space above its start and 20 s a case,
watched by an audit hook. Prints for each target how many cases were refused and accepted, how many ended in a traceback,
contradict themselves although they were accepted, or escaped (opened a file outside, imported, executed), and the peak of
memory. Exit code 1 where there was any of the latter three. The same seed gives the same cases; a case alone is run again with
`--target NAME --case NUMBER`, and its traceback is shown.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

from tests.fuzz.corpus import build
from tests.fuzz.targets import TARGETS

ROOT = Path(__file__).parents[2]
CHUNK = 20_000
COLUMNS = ("cases", "refused", "accepted", "tracebacks", "contradictory", "escapes", "peak MB")


def shares(cases: int, names: list[str]) -> dict[str, int]:
    """Share cases among targets, at least one each."""
    total = sum(TARGETS[name][1] for name in names)
    return {name: max(1, cases * TARGETS[name][1] // total) for name in names}


def run_target(name: str, cases: int, seed: int, work: Path) -> dict[str, Any]:
    """Run a target's cases in processes of their own.

    Args:
        name: the target.
        cases: how many.
        seed: determines them.
        work: a folder with the corpus in it.

    Returns:
        The sums of what the processes counted.
    """
    out: dict[str, Any] = {"cases": 0, "refused": 0, "accepted": 0, "peak": 0}
    out |= {"tracebacks": {}, "contradictions": {}, "escapes": {}}
    state, first = work / "state", 0
    while first < cases:
        last = min(first + CHUNK, cases)
        words = [name, work / "corpus", seed, first, last, state]
        command = [sys.executable, "-m", "tests.fuzz.sandbox", *map(str, words)]
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        if done.returncode:
            died = int(state.read_text()) if state.exists() else first
            reason = (done.stderr.strip().splitlines() or ["without a word"])[-1][:100]
            _add(out["tracebacks"], {f"DIED ({done.returncode}): {reason}": [died, 1]})
            out["cases"] += died + 1 - first
            first = died + 1
            continue
        found = json.loads(done.stdout.splitlines()[-1])
        for key in ("cases", "refused", "accepted"):
            out[key] += found[key]
        for key in ("tracebacks", "contradictions", "escapes"):
            _add(out[key], found[key])
        out["peak"] = max(out["peak"], found["peak"])
        first = last
    return out


def _add(table: dict[str, list[int]], more: dict[str, list[int]]) -> None:
    for what, (first, count) in more.items():
        table.setdefault(what, [first, 0])[1] += count


def row(found: dict[str, Any]) -> list[int]:
    """Give the numbers of a line of the table."""
    wrong = [sum(count for _, count in found[key].values()) for key in ("tracebacks", "contradictions", "escapes")]
    return [found["cases"], found["refused"], found["accepted"], *wrong, round(found["peak"] / 1e6)]


def show_case(name: str, seed: int, number: int, work: Path) -> None:
    """Run one case here, without limits, and let its traceback be seen."""
    scratch = work / "scratch"
    scratch.mkdir()
    print(TARGETS[name][0](work / "corpus", scratch)(Random(f"{seed} {name} {number}")))


def main() -> int:
    """Parse the command line, run, print.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(description="Read mutations of genuine tiny files, under limits and watched.")
    parser.add_argument("--cases", type=int, default=10_000, help="cases in all, shared among the targets")
    parser.add_argument("--target", choices=list(TARGETS), action="append", help="only this one; may be repeated")
    parser.add_argument("--seed", type=int, default=0, help="determines every case")
    parser.add_argument("--case", type=int, help="run this case of --target alone, and show what happens")
    parser.add_argument("--json", action="store_true", help="print the counts as JSON")
    flags = parser.parse_args()
    names = flags.target or list(TARGETS)
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(prefix="moeconv-fuzz-", dir=memory) as folder:
        work = Path(folder)
        (work / "corpus").mkdir()
        build(work / "corpus")
        if flags.case is not None:
            show_case(names[0], flags.seed, flags.case, work)
            return 0
        results = {}
        print(f"{'target':<22}" + "".join(f"{column:>15}" for column in COLUMNS), file=sys.stderr)
        for name, cases in shares(flags.cases, names).items():
            results[name] = run_target(name, cases, flags.seed, work)
            print(f"{name:<22}" + "".join(f"{n:>15,}" for n in row(results[name])), file=sys.stderr, flush=True)
    return report(results, as_json=flags.json)


def report(results: dict[str, dict[str, Any]], *, as_json: bool) -> int:
    """Print the sums, and what went wrong.

    Args:
        results: what `run_target` gave, by target.
        as_json: print everything as JSON.

    Returns:
        The exit code: 1 where anything went wrong.
    """
    rows = {name: row(found) for name, found in results.items()}
    total = [sum(column) for column in list(zip(*rows.values(), strict=True))[:-1]]
    wrong = Counter({key: total[COLUMNS.index(key)] for key in ("tracebacks", "contradictory", "escapes")})
    if as_json:
        print(json.dumps({"targets": results, "total": dict(zip(COLUMNS, total, strict=False))}, indent=1))
    else:
        print(f"{'total':<22}" + "".join(f"{n:>15,}" for n in total) + f"{max(r[-1] for r in rows.values()):>15,}")
        for name, found in results.items():
            for key in ("tracebacks", "contradictions", "escapes"):
                for what, (first, count) in found[key].items():
                    print(f"{name}: {key}: {what}: {count} cases, the first is --target '{name}' --case {first}")
    return 1 if wrong.total() else 0


if __name__ == "__main__":
    sys.exit(main())
