"""What surrounds a command: streams that can't be written, signals, sizes and paths that mean nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from cli.main import ExitCode
from moeconv.checkpoint import open_checkpoint
from moeconv.convert import Options, write_sharded
from moeconv.layout.degrees import Degrees
from tests.cli.conftest import digests

ROOT = Path(__file__).parents[2]
Call = Callable[..., Result]
# Waits where the tensors are written, until the signal comes.
SLOW = """
import signal, sys, time
import moeconv.sweep
from cli.main import run
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has background jobs, and what they start, ignore it
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and nohup this
real = moeconv.sweep._pwrite
def slow(*args):
    real(*args)
    if {slow}:
        print("writing", file=sys.stderr, flush=True)
        time.sleep(1)
moeconv.sweep._pwrite = slow
run(sys.argv[1:])
"""


def shell(line: str, *words: object) -> subprocess.CompletedProcess[str]:
    """Call the program by a line of the shell, in which "$@" stands for it and its words."""
    command = ["sh", "-c", line, "sh", sys.executable, "-m", "cli", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_a_result_that_can_not_be_printed_is_told_from_a_failure(mixtral: Path, tmp_path: Path) -> None:
    done = shell('"$@" > /dev/full', "import-hf", mixtral, tmp_path / "a")
    assert done.returncode == ExitCode.UNPRINTED == 4
    assert done.stderr == "error: the result can't be printed: No space left on device; everything was done\n"
    open_checkpoint(tmp_path / "a")
    assert shell('"$@" 2>&-', "import-hf", mixtral, tmp_path / "b").returncode == 0
    assert shell('"$@" >&-', "import-hf", mixtral, tmp_path / "c").returncode == 0
    assert digests(tmp_path / "a") == digests(tmp_path / "b") == digests(tmp_path / "c")
    assert shell('LC_ALL=C PYTHONIOENCODING=ascii "$@"', "import-hf", mixtral, tmp_path / "größe").returncode == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_an_interrupted_run_says_how_to_go_on(mixtral: Path, tmp_path: Path, number: int, code: int) -> None:
    words = ["import-hf", str(mixtral), str(tmp_path / "a"), "--workers", "1"]
    program = [sys.executable, "-c", SLOW.format(slow="True"), *words]
    with subprocess.Popen(program, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "writing\n"
        process.send_signal(number)
        said = process.stderr.read()
    assert process.returncode == code
    # A worker may still end its piece, and print, after this.
    assert f"interrupted: {tmp_path / 'a'}.partial keeps what was finished; go on with --resume" in said.splitlines()
    again = subprocess.run([sys.executable, "-c", SLOW.format(slow="False"), *words, "--resume"], cwd=ROOT)
    assert again.returncode == 0
    write_sharded(open_checkpoint(mixtral), tmp_path / "whole", Degrees(), Options())
    assert digests(tmp_path / "a") == digests(tmp_path / "whole")


def test_sizes_and_degrees_that_mean_nothing(call: Call, mixtral: Path, tmp_path: Path) -> None:
    assert call("import-hf", mixtral, tmp_path / "a").exit_code == 0
    for size in ("0", "0.4", "9" * 400 + "GB", "-1", "x"):
        result = call("export-hf", tmp_path / "a", tmp_path / "hf", "--max-shard-size", size)
        assert (result.exit_code, "max-shard-size" in result.stderr) == (2, True)
    for words in (("--pp-layers", "9" * 5000), ("--pp", "0"), ("--tp", "-1"), ("--etp", "0"), ("--pp-layers", "1,,2")):
        for command in (("import-hf",), ("export-megatron", "--format", "torch")):
            result = call(command[0], mixtral, tmp_path / "b", *command[1:], *words)
            assert (result.exit_code, "Invalid value" in result.stderr) == (2, True)
    result = call("import-hf", mixtral, tmp_path / "b", "--pp", "1000000")
    assert (result.exit_code, "at most 4 stages fit" in result.stderr) == (1, True)


def test_paths_that_can_not_be(call: Call, mixtral: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for source in ("x" * 300, tmp_path / ("y" * 5000), tmp_path / "pipe", "nul\0byte"):
        for command in ("inspect", "verify"):
            result = call(command, source)
            assert (result.exit_code, result.stderr.count("\n"), len(result.stderr) < 1000) == (1, 1, True)
    result = call("import-hf", mixtral, tmp_path / ("z" * 250))
    assert (result.exit_code, "can't be an output: File name too long" in result.stderr) == (1, True)
