"""Runs that go on: ramps, further warm-ups, groups and means of the weights, saved and resumed bit for bit."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from cli.main import main
from moeconv.checkpoint import open_checkpoint
from moeconv.errors import MappingError, MoeconvError
from moeconv.quant.mean import with_mean
from tests.runtime.launch import run_here, steps
from tests.runtime.tiny import make_checkpoint, make_text

COMMON = "--seq-length 32 --micro-batch-size 2 --lr 3e-3 --lr-warmup-init 1e-5 --split 90,10,0 --num-workers 0"


class Place:
    """A checkpoint and text, and this process as the only rank."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.tiny, self.text = folder, make_checkpoint(folder / "tiny"), make_text(folder / "text.txt")
        for number in range(1, 5):  # as the steps come, so that each can be compared with those before it
            self.train("mean", f"--train-iters {number} --lr-decay-style constant --bf16 --ema-decay 0.7 {FROZEN}")

    def train(self, name: str, words: str, load: Path | None = None) -> list[str]:
        save = self.folder / name
        flags = ["--load", load or self.tiny, "--data", self.text, "--save", save]
        flags += ["--data-cache-path", self.folder / "cache", *COMMON.split(), *words.split()]
        return run_here(flags)

    def log(self, name: str) -> dict[int, dict[str, Any]]:
        return steps(self.folder / name / "metrics.jsonl")

    def latest(self, name: str) -> Path:
        return (self.folder / name / "latest").resolve()


FROZEN = "--freeze *experts.1.* *embed_tokens*"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield Place(tmp_path_factory.mktemp("on"))


def same_checkpoints(one: Path, other: Path) -> bool:
    first, second = open_checkpoint(one), open_checkpoint(other)
    assert first.tensors == second.tensors
    return all(first.read(name).tobytes() == second.read(name).tobytes() for name in first.tensors)


RAMP = (
    "--train-samples 60 --global-batch-size 12 --rampup-batch-size 4 4 24 --lr-decay-samples 60 --lr-warmup-samples 8"
)


def test_a_ramp_goes_on_where_it_was_and_takes_the_samples_in_order(place: Place) -> None:
    place.train("whole", RAMP)
    place.train("ramp", f"{RAMP} --exit-interval 3")
    lines = place.train("ramp", RAMP)
    assert any(line.startswith("going on after iteration 3, 12 samples") for line in lines)
    log = place.log("ramp")
    sizes = [record["global_batch_size"] for record in log.values()]
    consumed = np.cumsum([0, *sizes])
    assert sizes == [4, 4, 4, 8, 8, 12, 12]  # three stages of 12 and 12 samples, and 52 of 60
    assert [record["consumed_train_samples"] for record in log.values()] == consumed[1:].tolist()
    rates = [3e-3 * (1 - (done - 8) / 52) if done > 8 else 1e-5 + (3e-3 - 1e-5) * done / 8 for done in consumed[:-1]]
    assert [record["learning_rate"] for record in log.values()] == pytest.approx(rates)
    assert {i: r["lm_loss"] for i, r in log.items()} == {i: r["lm_loss"] for i, r in place.log("whole").items()}
    assert same_checkpoints(place.latest("ramp"), place.latest("whole"))


def test_another_warm_up_begins_where_the_run_goes_on_and_only_once(place: Place) -> None:
    place.train("before", "--train-iters 2 --lr-decay-style constant")
    flags = "--lr-decay-style constant --lr-rewarmup-iters 4 --train-iters 8"
    first = place.train("again", f"{flags} --exit-interval 4", load=place.folder / "before")
    assert any("the learning rate warms up again, over 4 iters" in line for line in first)
    second = place.train("again", flags)
    assert not any("warms up again" in line for line in second)
    rates = [record["learning_rate"] for record in place.log("again").values()]
    assert rates == pytest.approx([1e-5 + (3e-3 - 1e-5) * min(done / 4, 1) for done in range(6)])


def test_the_mean_of_the_weights_is_that_of_torch(place: Place) -> None:
    """Over the masters of four saves, each after one more step of the same run."""
    saves = [open_checkpoint(place.folder / "mean" / f"iter_{number:07d}") for number in range(1, 5)]
    names = [name.removeprefix("optimizer.ema.") for name in saves[0].tensors if ".ema." in name]
    assert not [name for name in names if "experts.1." in name or "embed" in name]
    assert len(names) == 4 * (3 * 3 + 4 + 3) + 2
    start = open_checkpoint(place.tiny)
    holder = torch.nn.ParameterDict({str(i): torch.from_numpy(start.read(name)) for i, name in enumerate(names)})
    judge = AveragedModel(holder, multi_avg_fn=get_ema_multi_avg_fn(0.7))
    judge.update_parameters(holder)
    for save in saves:
        with torch.no_grad():
            for i, name in enumerate(names):
                holder[str(i)].copy_(torch.from_numpy(save.read(f"optimizer.master.{name}")))
        judge.update_parameters(holder)
        for i, name in enumerate(names):
            want = judge.module[str(i)].detach().numpy()
            np.testing.assert_allclose(save.read(f"optimizer.ema.{name}"), want, rtol=1e-6, atol=1e-8, err_msg=name)


def test_a_run_that_stopped_after_each_step_is_the_uninterrupted_one(place: Place) -> None:
    lines = place.train("at once", f"--train-iters 4 --lr-decay-style constant --bf16 --ema-decay 0.7 {FROZEN}")
    assert any(line.startswith("frozen: 13 of 79 tensors") for line in lines)
    assert same_checkpoints(place.latest("at once"), place.latest("mean"))
    saved, began = open_checkpoint(place.latest("mean")), open_checkpoint(place.tiny)
    frozen = [name for name in began.tensors if "experts.1." in name or "embed" in name]
    states = {name.split(".", 2)[2] for name in saved.tensors if name.startswith("optimizer.")}
    assert states == began.tensors.keys() - set(frozen)
    for name in frozen:
        stored = torch.from_numpy(saved.read(name).view(np.int16)).view(torch.bfloat16)
        assert torch.equal(stored, torch.from_numpy(began.read(name)).bfloat16())


def test_other_groups_are_said_and_missing_moments_refused(place: Place) -> None:
    flags = "--train-iters 4 --lr-decay-style constant --bf16"
    lines = place.train("other", f"{flags} --freeze *experts.1.* *embed_tokens* *norm*", load=place.folder / "mean")
    assert (
        "the groups of tensors change: --freeze: *experts.1.* *embed_tokens* -> *experts.1.* *embed_tokens* *norm*"
        in lines
    )
    assert any(line.startswith("the mean of the weights in ") and "is not kept on" in line for line in lines)
    with pytest.raises(MoeconvError, match=r"no moments of 13 tensors .*--no-load-optim"):
        place.train("mean", flags)
    place.train("anew", f"{flags} --no-load-optim --finetune", load=place.folder / "mean")


def losses_of(lines: list[str]) -> dict[str, float]:
    """Set -> loss, of the lines of evaluations."""
    found = (line.split(" | ") for line in lines if " | perplexity " in line)
    return {place.split(" at iteration")[0]: float(loss.removeprefix("lm loss ")) for place, loss, *_ in found}


def test_the_mean_is_exported_and_evaluated(place: Place, tmp_path: Path) -> None:
    run, flags = place.folder / "mean", "--train-iters 4 --lr-decay-style constant --bf16 --ema-decay 0.7"
    evaluate = "--eval-iters -1 --eval-ema"
    lines = place.train("mean", f"{flags} {FROZEN} {evaluate}")  # nothing is left to train: it evaluates
    losses = losses_of(lines)
    assert list(losses) == ["valid", "valid ema"]
    assert losses["valid"] != losses["valid ema"]
    alone = place.train("none", f"--skip-train {evaluate} --bf16", load=run)
    assert losses_of(alone) == {"valid ema": losses["valid ema"]}
    for name, weights in (("valid", "trained"), ("valid ema", "ema")):
        words = ["export-hf", str(run / "latest"), str(tmp_path / weights), "--weights", weights]
        with contextlib.redirect_stdout(io.StringIO()):
            main(words, standalone_mode=False)
        lines = place.train("none", "--skip-train --eval-iters -1 --bf16", load=tmp_path / weights)
        assert losses_of(lines) == {"valid": losses[name]}
    saved, exported = open_checkpoint(run / "latest"), open_checkpoint(tmp_path / "ema")
    for name, info in exported.tensors.items():
        mean = f"optimizer.ema.{name}"
        assert info.dtype == "BF16"
        if mean in saved.tensors:
            want = torch.from_numpy(saved.read(mean)).bfloat16()
            assert torch.equal(torch.from_numpy(exported.read(name).view(np.int16)).view(torch.bfloat16), want), name
        else:
            assert exported.read(name).tobytes() == saved.read(name).tobytes()
    with pytest.raises(MappingError, match="holds no mean of the weights"):
        with_mean(open_checkpoint(place.tiny))


def test_megatrons_optimizer_has_no_place_for_frozen_tensors(place: Place, tmp_path: Path) -> None:
    place.train("plain", "--train-iters 1 --ema-decay 0.7 --bf16")
    for name, status, message in (("plain", 0, ""), ("mean", 1, "13 tensors have no moments")):
        words = ["export-megatron", str(place.latest(name)), str(tmp_path / name), "--format", "torch_dist"]
        done = CliRunner().invoke(main, words)
        assert (done.exit_code, message in done.output) == (status, True), done.output
