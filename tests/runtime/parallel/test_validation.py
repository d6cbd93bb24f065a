"""Evaluations that decide: when a run ends, and which checkpoint is its best, whatever interrupts it and under any layout."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from moeconv.checkpoint import open_checkpoint
from runtime.checkpoint import folder as folders
from runtime.errors import ConfigError
from runtime.job.processes import Process
from runtime.parity.ranks import RankPool
from runtime.settings.flags import parse_flags
from runtime.start import prepare
from runtime.validation import Validation
from tests.runtime.jobs import Job, run_jobs
from tests.runtime.tiny import make_checkpoint

LORA = ("--lora-rank", "4", "--lora-targets", "*.self_attn.*", "*.experts.*")
PATIENCE, MOST = 2, 14


class Workplace:
    """A run that ends by itself; the same left after 3 steps and gone on with on two ranks, and then once more."""

    def __init__(self, folder: Path, pool: RankPool) -> None:
        self.folder, self.base = folder, make_checkpoint(folder / "base")
        draw = np.random.default_rng(1)
        for name, size in (("train", 4000), ("valid", 400)):  # some tokens come often: that is soon learned
            (folder / f"{name}.bin").write_bytes((draw.geometric(0.1, size) % 384).astype(np.uint16).tobytes())
        run_jobs([Job(1, self.words("whole")), Job(1, self.words("cut", "--exit-interval", "3"))], pool)
        run_jobs([Job(2, self.words("cut", "--tensor-model-parallel-size", "2")), Job(1, self.words("cut"))], pool)

    def words(self, name: str, *more: str) -> tuple[str, ...]:
        words = ["--load", self.base, "--save", self.folder / name, "--log-file", self.folder / f"{name}.jsonl"]
        words += ["--train-data-path", self.folder / "train.bin", "--valid-data-path", self.folder / "valid.bin"]
        words += ["--bare-dtype", "uint16", "--data-cache-path", self.folder / "cache", "--train-iters", MOST]
        words += ["--micro-batch-size", 4]  # sample by sample, the evaluations would take longest
        # The rate grows until it does harm.
        words += ["--seq-length", 32, "--lr", 0.3, "--lr-decay-iters", 40, "--lr-warmup-iters", 20, *LORA]
        words += ["--eval-interval", 1, "--eval-iters", -1, "--early-stop", PATIENCE, "--keep-best", "--keep-last", 1]
        return tuple(map(str, [*words, *more]))

    def losses(self, name: str) -> dict[int, float]:
        """The validation losses of a run's log."""
        records = map(json.loads, (self.folder / f"{name}.jsonl").read_text().splitlines())
        return {r["iteration"]: r["eval_lm_loss"] for r in records if r.get("split") == "valid"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, pool: RankPool) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("validation"), pool)


def expected(losses: dict[int, float]) -> tuple[int, int]:
    """By hand: the best iteration, and the one after which the run ends."""
    best = 1
    for iteration, loss in losses.items():
        if loss < losses[best]:
            best = iteration
        elif iteration - best == PATIENCE:
            return best, iteration
    return best, MOST


@pytest.mark.parametrize("name", ["whole", "cut"])
def test_a_run_ends_when_evaluations_are_no_better_and_keeps_the_best(name: str, place: Workplace) -> None:
    losses, root = place.losses(name), place.folder / name
    best, last = expected(losses)
    assert 1 < best < last < MOST, losses
    assert list(losses) == list(range(1, last + 1))
    assert list(folders.complete(root)) == [best, last], "--keep-last 1 leaves the best one"
    assert (root / "best").resolve() == folders.at_step(root, best)
    assert folders.latest(root) == folders.at_step(root, last)


def test_a_run_that_was_left_counts_on_under_another_layout(place: Workplace) -> None:
    whole, cut = place.losses("whole"), place.losses("cut")
    assert cut.keys() == whole.keys()
    assert all(math.isclose(cut[step], whole[step], rel_tol=1e-4) for step in whole)
    a, b = (json.loads((place.folder / name / "latest" / "trainer.json").read_text()) for name in ("whole", "cut"))
    for key in ("iteration", "best_iteration", "waited"):
        assert a["validation"][key] == b["validation"][key]


def test_the_best_is_a_checkpoint_like_others(place: Workplace) -> None:
    best = place.folder / "whole" / "best"
    assert open_checkpoint(best, adapters=True).adapter is not None
    words = ("--load", str(best), "--skip-train", "--eval-iters", "1", "--mock-data", "--seq-length", "128")
    _, origin = prepare(parse_flags(words), Process())
    assert origin.adapters is not None
    assert origin.path == best


def test_better_is_by_more_than_the_least_difference() -> None:
    seen = Validation()
    for iteration, loss in enumerate((3.0, 2.5, 2.45, 2.42, math.nan, 2.3), 1):
        seen = seen.after(iteration, loss, 0.1)
        if iteration == 5:
            assert (seen.waited, seen.best_iteration, seen.best_loss) == (3, 4, 2.42)
    assert (seen.waited, seen.best_iteration, seen.reference_loss) == (0, 6, 2.3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--early-stop", "2"], "--early-stop 2 does nothing here: it needs --eval-interval and --eval-iters"),
        (["--keep-best"], "--keep-best does nothing here: it needs --save"),
        (["--keep-best", "--save", "x"], "--keep-best does nothing here: it needs --eval-interval"),
        (["--early-stop-min-delta", "0.1"], "--early-stop-min-delta 0.1 does nothing here: it needs --early-stop"),
    ],
)
def test_what_would_do_nothing(words: list[str], message: str, place: Workplace) -> None:
    base = ["--load", str(place.base), "--mock-data", "--train-iters", "2", "--seq-length", "32"]
    with pytest.raises(ConfigError, match=message):
        prepare(parse_flags([*base, *words]), Process())
