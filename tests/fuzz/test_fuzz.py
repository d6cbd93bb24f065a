"""A short run of the fuzzer, and that it would see what it looks for."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fuzz.__main__ import row, shares
from tests.fuzz.corpus import build
from tests.fuzz.targets import TARGETS

ROOT = Path(__file__).parents[2]
CASES = 1000
BAD = """
import os, sys, json, time
from pathlib import Path
from moeconv.errors import SourceError
from tests.fuzz import sandbox, targets
sandbox.CASE_SECONDS = 1

def bad(corpus, scratch):
    def case(rng):
        index = case.number = getattr(case, "number", -21) + 1
        if index == 0: raise SourceError("refused")
        if index == 1: open("/etc/hostname").close()
        if index == 2: os.system("true")
        if index == 3: return "contradicts itself"
        if index == 4: raise ValueError("not of ours")
        if index == 5: bytes(2_000_000_000)
        if index == 6: time.sleep(5)
        if index == 7: held.append(b"x" * 200_000_000)
        return None
    return case

held = []
targets.TARGETS["bad"] = (bad, 1)
root = Path(sys.argv[1])
print(json.dumps(sandbox.run("bad", root / "corpus", 0, 0, 10, root / "state")))
"""


@pytest.fixture(scope="module")
def work() -> Iterator[Path]:
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(prefix="moeconv-fuzz-", dir=memory) as folder:
        (Path(folder) / "corpus").mkdir()
        build(Path(folder) / "corpus")
        yield Path(folder)


def run(program: str, *words: object) -> Any:
    done = subprocess.run([sys.executable, "-c", program, *map(str, words)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_the_sandbox_sees_what_it_looks_for(work: Path) -> None:
    found = run(BAD, work)
    assert (found["cases"], found["refused"], found["accepted"]) == (10, 1, 5)
    assert sorted(found["escapes"]) == ["open /etc/hostname", "os.system"]
    assert list(found["contradictions"].values()) == [[3, 1]]
    assert sorted(what.split()[0] for what in found["tracebacks"]) == ["HUNG", "MemoryError", "ValueError"]
    assert found["peak"] > 150_000_000
    assert row(found)[3:6] == [3, 1, 2]


SHORT = """
import json, sys
from pathlib import Path
from tests.fuzz import sandbox
root, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
print(json.dumps({n: sandbox.run(n, root / "corpus", 7, 0, c, root / "state") for n, c in cases.items()}))
"""


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_few_thousand_cases(work: Path) -> None:
    cases = shares(CASES, list(TARGETS))
    found = run(SHORT, work, json.dumps(cases))
    assert {name: counts["cases"] for name, counts in found.items()} == cases
    for key in ("tracebacks", "contradictions", "escapes"):
        assert {name: counts[key] for name, counts in found.items() if counts[key]} == {}
    assert [name for name, counts in found.items() if not counts["refused"]] in ([], ["dump_pickle"])
    assert sum(counts["accepted"] for counts in found.values()) > CASES // 20
