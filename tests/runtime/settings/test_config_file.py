"""`--config` files: the same names as the flags, and a run's own file starts it again."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from transformers import LlamaConfig, Qwen2Config

from moeconv.families import family_of
from moeconv.families.base import Model
from runtime.errors import ConfigError
from runtime.settings.assemble import make_run
from runtime.settings.check import check_run
from runtime.settings.example import example
from runtime.settings.flags import parse_flags
from runtime.settings.resolved import run_file, summary
from tests.runtime.settings.lines import MEGATRON, MIXTRAL_8X7B, SCRIPT, SHORT, make


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


def test_names_groups_and_values_are_those_of_flags(tmp_path: Path) -> None:
    text = """
load: ckpt
data: {data: [a, b], split: "9,1"}
anything: {nested: {bf16: true, lr: 1e-4, moe_aux_loss_coeff: 1e-2, no-load-optim: true, seq-length: null}}
moe-permute-fusion: false
sequence-parallel: true
override-opt-param-scheduler: true
seed: 0017
"""
    given = parse_flags(["--config", str(write(tmp_path, text)), "--lr", "3", "--no-sequence-parallel", "--fp16"])
    line = "--load ckpt --data a b --split 9,1 --fp16 --moe-aux-loss-coeff 1e-2 --no-load-optim --no-moe-permute-fusion"
    assert given.values == parse_flags(f"{line} --lr 3 --no-sequence-parallel --seed 17".split()).values
    assert [note.split(":")[0] for note in given.notes] == ["--override-opt_param-scheduler"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {train-itres: 3}", "unknown setting train.train-itres; nearest: .*train-iters"),
        ("bf16: 1", "bf16 is '1'; expected true or false"),
        ("lr: [1, 2]", "lr has 2 values; expected one"),
        ("lr: fast", "--lr is 'fast'; expected a number of at least 0"),
        ("lr: 1\nlr: 2", "lr is given twice"),
        ("- lr", "expected a mapping"),
        ("lr: {", "no YAML"),
        ("moe-shared-expert-overlap: true", "--moe-shared-expert-overlap: .* leave it out"),
        ("bf16: true\nfp16: true", "--bf16 and --fp16 contradict"),
    ],
)
def test_what_a_file_cannot_say(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        parse_flags(["--config", str(write(tmp_path, text))])
    assert "run.yaml" in str(error.value)


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match=r"--config /none\.yaml: can't be read: No such file"):
        parse_flags(["--config", "/none.yaml"])


@pytest.mark.parametrize(
    "line",
    [
        SCRIPT,
        MEGATRON,
        SHORT,
        f"{SHORT} --finetune --no-save-optim --moe-token-dropping --no-moe-permute-fusion --recompute-activations",
        "--load c --mock-data --save s --train-samples 640 --global-batch-size 64 --lr-warmup-fraction 0.1 --fp16",
        f"{SHORT} --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 4 --lr 1.7e-5",
    ],
)
def test_a_runs_own_file_starts_it_again(tmp_path: Path, line: str) -> None:
    run = make(line)
    again = make(f"--config {write(tmp_path, run_file(run))}")
    for name in ("parallel", "moe", "optim", "learning_rate", "schedule", "recompute", "train", "dtype", "stated"):
        assert getattr(again, name) == getattr(run, name), name
    # Paths are absolute in the file.
    checkpoint = dataclasses.replace(run.checkpoint, load=run.checkpoint.load.absolute(), save=again.checkpoint.save)
    assert again.checkpoint == checkpoint
    assert again.data.split == run.data.split
    assert run_file(again) == run_file(run)


def test_a_runs_file_follows_other_degrees(tmp_path: Path) -> None:
    path = write(tmp_path, run_file(make(f"{SHORT} --tensor-model-parallel-size 2")))
    assert make(f"--config {path} --tensor-model-parallel-size 4").parallel.etp == 4


def test_the_summary_names_what_is_not_at_its_default() -> None:
    lines = summary(make(f"{SHORT} --moe-aux-loss-coeff 0.01 --no-load-optim"))
    assert "settings, moe: moe-aux-loss-coeff 0.01" in lines
    assert any(line.startswith("settings, checkpoint: load /") and "no-load-optim" in line for line in lines)
    assert not any("adam" in line for line in lines)


@pytest.mark.parametrize("config", [MIXTRAL_8X7B, LlamaConfig().to_dict(), Qwen2Config().to_dict()])
def test_the_example_is_a_run(tmp_path: Path, config: dict[str, object]) -> None:
    model = Model.from_config(family_of(config), config)
    text = example(model, Path("ckpt"))
    run = make_run(parse_flags(["--config", str(write(tmp_path, text))]), model, Path("ckpt"))
    check_run(run, 1)
    # What is commented out is right as well.
    known = [line.split("# ", 1)[1] for line in text.splitlines() if line.startswith("  # ") and ": " in line]
    names = [line.split(":")[0] for line in known if line.split(":")[0].replace("-", "").isalpha()]
    assert {"tensor-model-parallel-size", "dtype"} <= set(names)
    assert ("moe:" in text.splitlines()) == (model.compute.router is not None)
