"""Every key of every family's config.json, flipped: `python -m tests.fuzz.config_keys [--family NAME] [--key KEY] [--json] [--table]`.

Of a tiny genuine model of each family each key gets other values of its kind, is removed, and keys of the hub's files are added;
transformers loads the folder and so do import-hf, the trainer, export-megatron and upcycle. Each flip is `followed` (the logits are
transformers' to 1e-5 in fp32), `harmless` (nothing changes, there as here), `refused` by name, or `carried` (families that the trainer
refuses as a whole: the tensors are those that transformers wants). Anything else is a finding, and the exit code 1.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import traceback
from collections import Counter, defaultdict
from pathlib import Path

from moeconv.families import FAMILIES
from tests.fuzz.flips import Flip, flips
from tests.fuzz.judge import Judge, bound_memory
from tests.fuzz.verdicts import Verdict, state_of, verdict
from tests.moeconv.models import RAM

KINDS = ("followed", "harmless", "refused", "carried", "finding")


def run_flip(judge: Judge, flip: Flip) -> Verdict:
    """Give the verdict on one flip; what is raised is a finding."""
    try:
        return verdict(judge, [flip.key], json.dumps(flip.config).encode())
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return Verdict(
            "finding",
            f"traceback: {type(error).__name__}: {str(error)[:120]} at {Path(where.filename).name}:{where.lineno}",
        )


def run_family(model_type: str, key: str | None = None) -> list[tuple[Flip, Verdict]]:
    """Flip every key of a family, or one."""
    with tempfile.TemporaryDirectory(prefix="moeconv-keys-", dir=RAM) as folder:
        judge = Judge(model_type, Path(folder))
        wanted = [flip for flip in flips(judge.config, judge.serialised) if key in (None, flip.key)]
        return [(flip, run_flip(judge, flip)) for flip in wanted]


def main() -> int:
    """Parse the command line, run, print.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(
        description="Flip each key of each family's config.json, and compare with transformers."
    )
    parser.add_argument("--family", choices=list(FAMILIES), action="append", help="only this one; may be repeated")
    parser.add_argument("--key", help="only this key")
    parser.add_argument("--table", action="store_true", help="print family x key, not the sums alone")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    flags = parser.parse_args()
    bound_memory()
    results = {}
    print(f"{'family':<18}" + "".join(f"{kind:>10}" for kind in ("keys", *KINDS)), file=sys.stderr)
    for name in flags.family or FAMILIES:
        results[name] = run_family(name, flags.key)
        counts = Counter(found.kind for _, found in results[name])
        numbers = [len({flip.key for flip, _ in results[name]}), *(counts[kind] for kind in KINDS)]
        print(f"{name:<18}" + "".join(f"{number:>10,}" for number in numbers), file=sys.stderr, flush=True)
        for flip, found in results[name]:
            if found.kind == "finding":
                print(f"    {flip.key} = {flip.value}: {found.what}", file=sys.stderr, flush=True)
    if flags.json:
        rows = {n: [[f.key, f.value, v.kind, v.what] for f, v in found] for n, found in results.items()}
        print(json.dumps(rows, indent=1))
    else:
        report(results, table=flags.table)
    return 1 if any(found.kind == "finding" for rows in results.values() for _, found in rows) else 0


def report(results: dict[str, list[tuple[Flip, Verdict]]], *, table: bool) -> None:
    """Print the sums, the table and the findings."""
    total = Counter(found.kind for rows in results.values() for _, found in rows)
    print(f"{total.total():,} flips: " + ", ".join(f"{total[kind]:,} {kind}" for kind in KINDS))
    for name, rows in results.items() if table else ():
        kinds: dict[str, set[str]] = defaultdict(set)
        for flip, found in rows:
            kinds[flip.key].add(found.kind)
        print(f"\n| {name}: key | state | its flips |\n| --- | --- | --- |")
        for key, seen in kinds.items():
            print(
                f"| {key} | {state_of(name, key) or 'unknown'} | {', '.join(kind for kind in KINDS if kind in seen)} |"
            )


if __name__ == "__main__":
    sys.exit(main())
