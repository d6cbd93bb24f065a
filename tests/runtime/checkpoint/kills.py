"""Kills a training that saves each step at random moments, and looks what is left each time.

`python -m tests.runtime.checkpoint.kills --kills 30` kills all ranks, one rank or the launcher with SIGKILL, looks at the
save folder, and starts the run again until it has come to its end.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from moeconv.checking import verify
from moeconv.checkpoint import open_checkpoint
from runtime.checkpoint import folder as folders
from tests.runtime.launch import start
from tests.runtime.tiny import make_checkpoint, make_text

VICTIMS = ("all ranks", "rank 0", "rank 1", "launcher")


@dataclass
class Findings:
    """What the kills have shown."""

    kills: Counter[str] = field(default_factory=Counter)
    debris: Counter[str] = field(default_factory=Counter)
    """Kinds of names that kills left behind, which the next start must remove."""
    losses: dict[int, set[tuple[float, float]]] = field(default_factory=dict)
    """Iteration -> loss and gradient norm of each time that it was done."""


class KillTest:
    """A run of 2 ranks that saves each step and keeps two checkpoints."""

    def __init__(self, folder: Path, iterations: int, seed: int) -> None:
        self.save, self.log = folder / "run", folder / "log.jsonl"
        self._random = random.Random(seed)
        self._arguments: list[object] = [
            "--load", make_checkpoint(folder / "tiny"), "--data", make_text(folder / "text.txt"), "--save", self.save,
            "--log-file", self.log, "--data-cache-path", folder / "cache", "--train-iters", iterations, "--save-interval", 1,
            "--keep-last", 2, "--seq-length", 32, "--micro-batch-size", 1, "--global-batch-size", 4, "--split", "95,5,0",
            "--expert-model-parallel-size", 2, "--use-distributed-optimizer", "--lr-decay-iters", 1000,
        ]  # fmt: skip
        self.findings = Findings()

    def records(self) -> list[dict[str, Any]]:
        lines = self.log.read_bytes().splitlines(keepends=True) if self.log.exists() else []
        found = [json.loads(line) for line in lines if line.endswith(b"\n")]
        return [record for record in found if record["kind"] == "train"]

    def kill_once(self, victim: str) -> None:
        """Start or go on, kill somebody within two steps or so, and wait until all are gone."""
        before = len(self.records())
        launcher = start(2, self._arguments, fault="slow-renames")
        deadline = time.monotonic() + 240
        while len(self.records()) < before + 1:
            assert launcher.poll() is None, launcher.communicate()[0]
            assert time.monotonic() < deadline, "the run does not begin"
            time.sleep(0.02)
        ranks = psutil.Process(launcher.pid).children()
        pace = max(record["step_seconds"] for record in self.records()[-1:])
        time.sleep(self._random.uniform(0, 3 * pace))
        chosen = {
            "all ranks": ranks,
            "rank 0": ranks[:1],
            "rank 1": ranks[1:2],
            "launcher": [psutil.Process(launcher.pid)],
        }
        for process in chosen[victim]:
            process.send_signal(signal.SIGKILL)
        launcher.communicate(timeout=120)
        for process in ranks:  # those of a killed launcher go on until somebody ends them
            if victim == "launcher" and process.is_running():
                process.send_signal(signal.SIGKILL)
            process.wait(60)
        self.findings.kills[victim] += 1

    def look(self) -> None:
        """Check what a reader meets: whole checkpoints under their names, the rest under names that it passes over."""
        assert folders.incomplete(self.save) == []
        found = folders.complete(self.save)
        for path in found.values():
            verify(open_checkpoint(path))
        done = [record["iteration"] for record in self.records()]
        if found:
            assert folders.latest(self.save) is not None
            assert max(found) >= max(done) - 2, "no more than the save under way and the step after it is lost"
        for path in self.save.iterdir():
            if path.name not in {*(p.name for p in found.values()), "latest", "run.yaml"}:
                self.findings.debris[path.suffix] += 1

    def finish(self) -> None:
        """Let the run come to its end, and check that it is the one without any kill."""
        process = start(2, self._arguments)
        output, _ = process.communicate(timeout=240)
        assert process.returncode == 0, output
        names = sorted(path.name for path in self.save.iterdir() if path.name != "run.yaml")
        assert len(names) == 3, f"two checkpoints and the link to the latest, no debris: {names}"
        for record in self.records():
            self.findings.losses.setdefault(record["iteration"], set()).add((record["lm_loss"], record["grad_norm"]))
        assert all(len(values) == 1 for values in self.findings.losses.values()), (
            "a step done again gives the same bits"
        )

    def run(self, kills: int) -> Findings:
        for number in range(kills):
            self.kill_once(VICTIMS[number % len(VICTIMS)])
            self.look()
        self.finish()
        return self.findings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        # Far enough for every kill to meet a run that goes on.
        test = KillTest(Path(folder), 8 * arguments.kills + 8, arguments.seed)
        findings = test.run(arguments.kills)
    repeated = len(findings.losses)
    print(f"kills: {dict(findings.kills)}")
    print(f"left behind and removed by the next start: {dict(findings.debris) or 'nothing'}")
    print(f"{repeated} iterations, each with one loss and one gradient norm however often it was done")


if __name__ == "__main__":
    main()
