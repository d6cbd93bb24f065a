"""The save folder: which checkpoint is the latest, what a killed save leaves, what is kept."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from moeconv.errors import SourceError, WriteError
from moeconv.io.manifest import MANIFEST
from runtime.checkpoint import folder
from runtime.checkpoint.position import TrainerState


def save(root: Path, iteration: int, content: str = "") -> Path:
    partial = folder.prepare(root, iteration)
    (partial / "weights").write_text(content)
    assert folder.latest(root) is None or folder.latest(root) != partial
    (partial / MANIFEST).write_text("{}")
    return folder.publish(partial)


def test_the_latest_is_the_last_published(tmp_path: Path) -> None:
    root = tmp_path / "out"
    assert folder.latest(root) is None
    assert folder.resolve(root) == root
    for iteration in (5, 10, 15):
        final = save(root, iteration)
        assert folder.latest(root) == folder.resolve(root) == final
        assert os.readlink(root / "latest") == final.name
    assert list(folder.complete(root)) == [5, 10, 15]
    (final / MANIFEST).unlink()  # a damaged latest is passed over
    assert folder.latest(root) == root / "iter_0000010"


def test_what_a_killed_save_left_is_no_checkpoint_and_is_cleared(tmp_path: Path) -> None:
    save(tmp_path, 5)
    left = folder.prepare(tmp_path, 10)
    (left / MANIFEST).write_text("{}")  # killed between the manifest and the renaming
    assert folder.latest(tmp_path) == tmp_path / "iter_0000005"
    save(tmp_path, 10, "new")
    assert (tmp_path / "iter_0000010" / "weights").read_text() == "new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["iter_0000005", "iter_0000010", "latest"]


def test_an_iteration_saved_again_replaces_the_old_one(tmp_path: Path) -> None:
    save(tmp_path, 5, "old")
    save(tmp_path, 5, "new")
    assert (tmp_path / "latest" / "weights").read_text() == "new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["iter_0000005", "latest"]


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for iteration in (5, 10, 100):
        save(tmp_path, iteration)
    folder.prune(tmp_path, 0)
    assert list(folder.complete(tmp_path)) == [5, 10, 100]
    folder.prune(tmp_path, 2)
    assert list(folder.complete(tmp_path)) == [10, 100]
    folder.prune(tmp_path, 1)
    assert list(folder.complete(tmp_path)) == [100]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="--save"):
        folder.prepare(tmp_path / "file", 5)


def test_the_state_comes_back_and_malformed_ones_are_refused(tmp_path: Path) -> None:
    state = TrainerState(iteration=3, consumed_train_samples=24, seed=7, optimizer={"step": 3})
    assert TrainerState.from_json(state.to_json(), tmp_path) == state
    for text in ("", "[]", '{"version": 1, "unknown": 2}', '{"iteration": 1}', '{"version": 99}'):
        with pytest.raises(SourceError):
            TrainerState.from_json(text, tmp_path)
