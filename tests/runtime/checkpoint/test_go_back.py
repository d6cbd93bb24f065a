"""A damaged latest save: the error names the way back, and the way back is right when it is gone. Leaving early."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from moeconv import import_hf
from moeconv.io.safetensors import read_header
from moeconv.layout.degrees import Degrees
from runtime.parity.ranks import RankError, RankPool
from tests.runtime.jobs import Job, run_jobs
from tests.runtime.launch import steps
from tests.runtime.tiny import make_checkpoint, make_text
from tests.support.ranks import make_pool


class Place:
    """A tiny model and text, and one rank that runs the trainer on them."""

    def __init__(self, folder: Path, pool: RankPool) -> None:
        self.folder, self._pool = folder, pool
        self._load, self._text = make_checkpoint(folder / "tiny"), make_text(folder / "text.txt")

    def train(self, name: str, *extra: object, iterations: int = 4) -> None:
        save = self.folder / name
        words = ["--load", self._load, "--data", self._text, "--save", save, "--data-cache-path", self.folder / "cache"]
        words += ["--train-iters", iterations, "--save-interval", 1, "--seq-length", 32, "--lr-decay-iters", 10, *extra]
        run_jobs([Job(1, tuple(map(str, words)))], self._pool)

    def losses(self, name: str) -> dict[int, float]:
        return {i: record["lm_loss"] for i, record in steps(self.folder / name / "metrics.jsonl").items()}

    def latest(self, name: str) -> str:
        return (self.folder / name / "latest").resolve().name


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, pool: RankPool) -> Place:
    return Place(tmp_path_factory.mktemp("back"), pool)


def cut_short(save: Path) -> None:
    path = next(save.glob("dense-*.safetensors"))
    path.write_bytes(path.read_bytes()[:-5])


def lose_a_file(save: Path) -> None:
    next(save.glob("experts-*.safetensors")).unlink()


def spoil_the_position(save: Path) -> None:
    (save / "trainer.json").write_text("{}")


@pytest.mark.parametrize("damage", [cut_short, lose_a_file, spoil_the_position])
def test_the_way_back_from_damage_is_named_and_right(place: Place, damage: Callable[[Path], None]) -> None:
    name = damage.__name__
    place.train(name)
    whole = place.losses(name)
    assert sorted(whole) == [1, 2, 3, 4]
    for iteration in (3, 4):
        damage(place.folder / name / f"iter_000000{iteration}")
    with pytest.raises(RankError, match=r"newest older save that opens is iter_0000002: --ckpt-step 2 goes on from it"):
        place.train(name, iterations=6)
    place.train(name, "--ckpt-step", 2, iterations=3)
    assert place.latest(name) == "iter_0000003", "the later one, of before, is not the latest"
    place.train(name, iterations=6)  # the same command without the flag goes on from there
    log = (place.folder / name / "metrics.jsonl").read_text().splitlines()
    done = [(r["iteration"], r["lm_loss"]) for r in map(json.loads, log) if r["kind"] == "train"]
    assert [iteration for iteration, _ in done] == [1, 2, 3, 4, 3, 4, 5, 6]
    assert dict(done[4:6]) == {3: whole[3], 4: whole[4]}, "the steps that are done again are the same to the bit"


def names(file: Path) -> set[str]:
    return {entry.name for entry in read_header(file).entries}


def flip_a_byte(file: Path, tensor: str) -> None:
    """Change a byte in the middle of a stored tensor."""
    (entry,) = (entry for entry in read_header(file).entries if entry.name == tensor)
    place = (entry.begin + entry.end) // 2
    data = bytearray(file.read_bytes())
    data[place] ^= 8
    file.write_bytes(data)


@pytest.mark.parametrize("prefix", ["", "optimizer.exp_avg_sq."])
def test_a_flipped_byte_is_found_when_it_is_loaded(place: Place, prefix: str) -> None:
    name = f"flip{len(prefix)}"
    place.train(name, iterations=3)
    damaged = f"{prefix}model.layers.1.self_attn.o_proj.weight"
    save = place.folder / name / "iter_0000003"
    (file,) = (path for path in save.glob("*.safetensors") if damaged in names(path))
    flip_a_byte(file, damaged)
    found = rf"{damaged} .* has checksum .* newest older save that opens is iter_0000002: --ckpt-step 2 goes on from it"
    with pytest.raises(RankError, match=found):
        place.train(name, iterations=5)
    place.train(name, "--ckpt-step", 2, iterations=5)
    assert sorted(place.losses(name)) == [1, 2, 3, 4, 5]


def test_a_flipped_byte_is_found_in_rectangles_that_are_read_in_part(place: Place) -> None:
    """Two ranks hold halves of what is stored whole, as parts of other rectangles: neither can check what it reads."""
    whole, ranks = place.folder / "whole", 2
    import_hf(make_checkpoint(place.folder / "source"), whole, Degrees())
    damaged = "model.layers.0.self_attn.q_proj.weight"
    (file,) = (path for path in whole.glob("*.safetensors") if damaged in names(path))
    flip_a_byte(file, damaged)
    words = ["--load", whole, "--data", place.folder / "text.txt", "--train-iters", 1, "--seq-length", 32]
    words += ["--tensor-model-parallel-size", ranks, "--data-cache-path", place.folder / "cache"]
    with pytest.raises(RankError, match=rf"{damaged} .* has checksum"), contextlib.closing(make_pool(ranks)) as pool:
        run_jobs([Job(ranks, tuple(map(str, words)))], pool)


def test_going_back_where_nothing_is_names_what_there_is(place: Place) -> None:
    place.train("few", iterations=2)
    with pytest.raises(RankError, match=r"--ckpt-step 7: .* it has those of 1, 2"):
        place.train("few", "--ckpt-step", 7)


def test_exit_interval_and_duration_save_and_leave(place: Place) -> None:
    place.train("interval", "--exit-interval", 2, "--save-interval", 0, iterations=5)
    assert place.latest("interval") == "iter_0000002"
    assert sorted(place.losses("interval")) == [1, 2]
    place.train("interval", "--exit-interval", 2, "--save-interval", 0, iterations=5)
    place.train("interval", "--exit-interval", 2, "--save-interval", 0, iterations=5)
    assert sorted(place.losses("interval")) == [1, 2, 3, 4, 5]
    notes = [json.loads(line) for line in (place.folder / "interval" / "metrics.jsonl").read_text().splitlines()]
    texts = [note["text"] for note in notes if note["kind"] == "note"]
    assert "--exit-interval 2 divides the iteration: saving after iteration 2 and leaving" in texts
    place.train("duration", "--exit-duration-in-mins", 1e-9, iterations=5)
    assert place.latest("duration") == "iter_0000001"
