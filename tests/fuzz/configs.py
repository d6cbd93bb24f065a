"""Random configs and indexes beside genuine tensors: `python -m tests.fuzz.configs --per-family 1000 [--family NAME] [--seed 0] [--json]`.

config.json of a tiny genuine folder of each family is mutated (values, types, keys that are missing, renamed, added or nested, as a tree, as
text and as bytes; and the legal values of `flips`, several at once), and so, apart, is model.safetensors.index.json. import-hf, the
trainer, export-megatron and upcycle read it, and where the trainer would compute, transformers' logits of the same folder are the judge.
Counted are: refused; followed and harmless (accepted, with transformers' logits); carried (families that the trainer refuses as a whole);
findings: tracebacks and silent differences. Exit code 1 where there was one. A case alone is run again with `--case NUMBER`.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from moeconv.checkpoint import open_checkpoint
from moeconv.errors import MoeconvError
from moeconv.families import FAMILIES
from moeconv.io.hf_folder import CONFIG, INDEX
from tests.fuzz.flips import EXTRA, SET, flips
from tests.fuzz.judge import TOLERANCE, Judge, bound_memory, gap
from tests.fuzz.mutate import mutate_json, nasty
from tests.fuzz.verdicts import Verdict, verdict
from tests.moeconv.models import RAM

KINDS = ("refused", "followed", "harmless", "carried", "finding")
Case = Callable[[Random], Verdict]


def config_case(judge: Judge) -> Case:
    """Make the cases of config.json."""
    pool = list(flips(judge.config, judge.serialised))

    def case(rng: Random) -> Verdict:
        raw = _legal(rng, judge, pool) if rng.random() < 0.6 else mutate_json(rng, judge.raw, judge.config)
        return verdict(judge, _changed_keys(judge.config, raw), raw, named=False)

    return case


def _legal(rng: Random, judge: Judge, pool: list[Any]) -> bytes:
    """Put legal values, now and then strange ones, into some keys of the base at once."""
    config = copy.deepcopy(rng.choice(pool).config if rng.random() < 0.7 else judge.config)
    for _ in range(rng.choice((0, 1, 1, 2, 3))):
        key = rng.choice([*config, *EXTRA, *SET])
        values = [*SET.get(key, ()), *EXTRA.get(key, ())] or [config.get(key)]
        config[key] = copy.deepcopy(rng.choice(values)) if rng.random() < 0.7 else nasty(rng)
    return json.dumps(config).encode("utf-8", "surrogatepass")


def _changed_keys(base: dict[str, Any], raw: bytes) -> list[str]:
    """Name the keys that are other than the base's; none where it is no JSON object."""
    try:
        config = json.loads(raw)
    except (ValueError, RecursionError):
        return []
    if not isinstance(config, dict):
        return []
    return [
        key for key in {**base, **config} if key not in base or key not in config or not _same(base[key], config[key])
    ]


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and (a == b or a != a)


def index_case(judge: Judge) -> Case:
    """Make the cases of the index: an accepted one names every tensor where it is, and transformers loads the genuine model."""
    raw = (judge.folder / INDEX).read_bytes()
    tree = json.loads(raw)
    (judge.folder / CONFIG).write_bytes(judge.raw)
    want = open_checkpoint(judge.folder).pieces

    def case(rng: Random) -> Verdict:
        changed = mutate_json(rng, raw, tree)
        (judge.folder / INDEX).write_bytes(changed)
        try:
            found = open_checkpoint(judge.folder).pieces
            theirs = judge.judge(judge.raw, training=False)
        except MoeconvError as error:
            return Verdict("refused", str(error))
        finally:
            (judge.folder / INDEX).write_bytes(raw)
        if found != want:
            return Verdict("finding", "other pieces than the genuine index has")
        if theirs.other:
            return Verdict("finding", f"accepted, while transformers lacks {theirs.other[0]}")
        assert judge.base_theirs.logits is not None
        if theirs.logits is not None and gap(theirs.logits, judge.base_theirs.logits) > TOLERANCE:
            return Verdict("finding", "transformers loads another model")
        return Verdict("harmless")

    return case


def run_case(case: Case, rng: Random) -> Verdict:
    """Give the verdict of one case; what is raised is a finding."""
    try:
        return case(rng)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return Verdict(
            "finding",
            f"traceback: {type(error).__name__}: {str(error)[:120]} at {Path(where.filename).name}:{where.lineno}",
        )


def run_family(model_type: str, cases: int, seed: int, first: int = 0) -> dict[str, list[Verdict]]:
    """Run the cases of a family: config.json's, and the index's."""
    with tempfile.TemporaryDirectory(prefix="moeconv-configs-", dir=RAM) as folder:
        judge = Judge(model_type, Path(folder))
        makers = {"config": config_case, "index": index_case}
        return {
            what: [
                run_case(case, Random(f"{seed} {model_type} {what} {number}")) for number in range(first, first + cases)
            ]
            for what, make in makers.items()
            for case in [make(judge)]
        }


def main() -> int:
    """Parse the command line, run, print.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(
        description="Mutate config.json and the index at random, and compare with transformers."
    )
    parser.add_argument("--per-family", type=int, default=100, help="cases of each file of each family")
    parser.add_argument("--family", choices=list(FAMILIES), action="append", help="only this one; may be repeated")
    parser.add_argument("--seed", type=int, default=0, help="determines every case")
    parser.add_argument("--case", type=int, help="run this case alone")
    parser.add_argument("--json", action="store_true", help="print the counts as JSON")
    flags = parser.parse_args()
    bound_memory()
    total: dict[str, Counter[str]] = {"config": Counter(), "index": Counter()}
    rows: dict[str, dict[str, Counter[str]]] = {}
    print(f"{'family':<18}{'file':<8}" + "".join(f"{kind:>10}" for kind in KINDS), file=sys.stderr)
    for name in flags.family or FAMILIES:
        found = run_family(name, flags.per_family if flags.case is None else 1, flags.seed, flags.case or 0)
        rows[name] = {what: Counter(v.kind for v in verdicts) for what, verdicts in found.items()}
        for what, verdicts in found.items():
            total[what] += rows[name][what]
            print(
                f"{name:<18}{what:<8}" + "".join(f"{rows[name][what][kind]:>10,}" for kind in KINDS),
                file=sys.stderr,
                flush=True,
            )
            for number, one in enumerate(verdicts, flags.case or 0):
                if one.kind == "finding" or flags.case is not None:
                    print(f"    case {number}: {one.kind}: {one.what}", file=sys.stderr, flush=True)
    if flags.json:
        print(
            json.dumps({name: {what: dict(c) for what, c in found.items()} for name, found in rows.items()}, indent=1)
        )
    for what, counts in total.items() if not flags.json else ():
        print(f"{'all':<18}{what:<8}" + "".join(f"{counts[kind]:>10,}" for kind in KINDS))
    return 1 if any(counts["finding"] for counts in total.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
