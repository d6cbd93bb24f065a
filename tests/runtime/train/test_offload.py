"""Runs whose optimizer state is in the host's memory: their saves, read where the state lies, are those of runs without."""

from __future__ import annotations

import gc
import warnings
from pathlib import Path

import pytest

from moeconv.checkpoint import open_checkpoint
from moeconv.errors import WriteError
from runtime.checkpoint import writer
from tests.runtime.launch import run_here
from tests.runtime.tiny import make_checkpoint

COMMON = "--seq-length 16 --micro-batch-size 2 --lr 3e-3 --mock-data --num-workers 0 --bf16 --moments-dtype bfloat16"
HOST = "--optimizer-cpu-offload"


def train(model: Path, save: Path, words: str) -> list[str]:
    """A run in this process, as its only rank; what it printed."""
    return run_here(["--load", model, "--save", save, *COMMON.split(), *words.split()])


def tensors(path: Path) -> dict[str, bytes]:
    checkpoint = open_checkpoint(path)
    return {name: checkpoint.read(name).tobytes() for name in checkpoint.tensors}


def test_saves_are_those_of_a_run_without_and_are_taken_up_by_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_checkpoint(tmp_path / "tiny")
    copied: list[int] = []
    stage = writer.Saver.stage
    monkeypatch.setattr(
        writer.Saver, "stage", lambda self, found, **how: copied.append(len(found)) or stage(self, found, **how)
    )
    train(model, tmp_path / "plain", "--train-iters 2 --save-interval 1")
    train(model, tmp_path / "host", f"--train-iters 2 --save-interval 1 {HOST}")
    found = [tensors(tmp_path / name / f"iter_000000{i}") for name in ("plain", "host") for i in (1, 2)]
    assert found[:2] == found[2:]
    count = sum(not name.startswith("optimizer.") for name in found[0])
    assert set(copied[:2]) == {len(found[0])}
    assert set(copied[2:]) == {count}, "masters and moments are not copied a second time"
    train(model, tmp_path / "plain", f"--train-iters 3 {HOST}")
    train(model, tmp_path / "host", "--train-iters 3")
    last = tensors(tmp_path / "plain" / "latest")
    assert last == tensors(tmp_path / "host" / "latest")
    # Saves have fp32 masters where a run keeps what the weights lack of them alone; the source in fp32 may hold ties.
    train(model, tmp_path / "remainders", "--train-iters 1")
    train(model, tmp_path / "remainders", "--train-iters 2 --master-weights remainder")
    assert tensors(tmp_path / "remainders" / "latest") == found[1]
    train(model, tmp_path / "remainders", f"--train-iters 3 --master-weights remainder {HOST}")
    assert tensors(tmp_path / "remainders" / "latest") == last


def test_a_last_save_that_fails_ends_the_run_with_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise WriteError("the disk is full")

    monkeypatch.setattr(writer, "write_shard_file", broken)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # the log of a run that an error ends; nothing closes it
        with pytest.raises(WriteError, match="iteration 1 was not saved: rank 0: the disk is full"):
            train(make_checkpoint(tmp_path / "tiny"), tmp_path / "save", f"--train-iters 1 {HOST}")
        gc.collect()
