"""The comparison of exchanges runs to its end without a GPU."""

from __future__ import annotations

import subprocess
import sys


def test_every_way_has_a_row() -> None:
    command = [sys.executable, "-m", "benchmarks.exchanges", "--model", "tiny", "--numbers", "2", "--steps", "1"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    rows = [line.split(" | ") for line in lines if line.startswith("| ")][2:]
    assert [row[0].removeprefix("| ") for row in rows] == [
        "no exchanges", "no exchanges, graphs", "numbers of rows read", "room set aside", "room set aside, graphs",
    ]  # fmt: skip
    assert all(float(row[1]) > 0 for row in rows)
