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
    assert folder.latest(root) != partial
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


def test_what_a_killed_removal_left_is_no_checkpoint_and_is_cleared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for iteration in (5, 10):
        save(tmp_path, iteration)

    def killed(path: Path, *args: object, **options: object) -> None:
        (path / "weights").unlink()
        raise KeyboardInterrupt  # as SIGKILL does: the rest stays

    with monkeypatch.context() as patch:
        patch.setattr(folder.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            folder.prune(tmp_path, 1)
    assert list(folder.complete(tmp_path)) == [10]
    assert folder.incomplete(tmp_path) == []
    folder.Claim(tmp_path).release()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["iter_0000010", "latest"]


def test_others_folders_are_left_alone(tmp_path: Path) -> None:
    save(tmp_path, 5)
    for name in ("iter_0000010/mp_rank_00", "mine.partial", "iter_x.old", "data.old"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "iter_0000007.old").symlink_to("elsewhere")
    folder.Claim(tmp_path).release()
    save(tmp_path, 15)
    names = {p.name for p in tmp_path.iterdir()}
    assert {"iter_0000010", "mine.partial", "iter_x.old", "data.old", "elsewhere", "iter_0000007.old"} <= names
    assert [p.name for p in folder.incomplete(tmp_path)] == ["iter_0000010"]


def test_two_runs_cannot_save_to_one_folder(tmp_path: Path) -> None:
    claim = folder.Claim(tmp_path / "out")
    partial = folder.prepare(tmp_path / "out", 5)
    with pytest.raises(WriteError, match="another run is saving to this folder"):
        folder.Claim(tmp_path / "out")
    assert partial.is_dir(), "the second one has removed nothing"
    claim.release()
    folder.Claim(tmp_path / "out").release()
    assert not partial.exists()


def test_after_going_back_later_saves_stay_and_do_not_count(tmp_path: Path) -> None:
    for iteration in (100, 200, 300):
        save(tmp_path, iteration)
    for iteration in (120, 140, 160):  # a run that went back to 100
        save(tmp_path, iteration)
        folder.prune(tmp_path, 2)
    assert list(folder.complete(tmp_path)) == [140, 160, 200, 300]
    assert folder.latest(tmp_path) == tmp_path / "iter_0000160"
    save(tmp_path, 200, "again")
    folder.prune(tmp_path, 2)
    assert list(folder.complete(tmp_path)) == [160, 200, 300]
    assert (tmp_path / "latest" / "weights").read_text() == "again"


def test_a_damaged_save_names_the_newest_older_one_that_opens(tmp_path: Path) -> None:
    for iteration in (5, 10, 15, 20):
        save(tmp_path, iteration, "good" if iteration < 15 else "bad")

    def opens(path: Path) -> None:
        if (path / "weights").read_text() == "bad":
            raise SourceError("bad")

    text = folder.way_back(tmp_path / "iter_0000020", opens)
    assert text == ". The newest older save that opens is iter_0000010: --ckpt-step 10 goes on from it"
    assert folder.at_step(tmp_path, 10) == tmp_path / "iter_0000010"
    assert folder.way_back(tmp_path / "iter_0000005", opens) == f". No older save in {tmp_path} opens"
    assert folder.way_back(tmp_path / "model", opens) == ""
    with pytest.raises(SourceError, match=r"--ckpt-step 7: .* it has those of 5, 10, 15, 20"):
        folder.at_step(tmp_path, 7)
    with pytest.raises(SourceError, match=r"--ckpt-step 7: .* it has none"):
        folder.at_step(tmp_path / "nothing", 7)
