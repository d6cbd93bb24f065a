"""Kills at random moments of a run that saves each step; `python -m tests.runtime.checkpoint.kills` does many."""

from __future__ import annotations

from pathlib import Path

from tests.runtime.checkpoint.kills import KillTest


def test_kills_leave_whole_checkpoints_and_no_debris(tmp_path: Path) -> None:
    test = KillTest(tmp_path, 20, seed=0)
    for victim in ("launcher", "rank 1"):
        test.kill_once(victim)
        test.look()
    test.finish()
    assert sum(test.findings.kills.values()) == 2
    assert max(test.findings.losses) == 20
