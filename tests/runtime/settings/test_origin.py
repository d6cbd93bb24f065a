"""Whether a run begins with drawn weights: only where that is meant, and said loudly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moeconv.errors import MoeconvError
from runtime.checkpoint.config import CheckpointConfig
from runtime.job.processes import Process
from runtime.settings.flags import parse_flags
from runtime.settings.origin import Origin, nothing_at
from runtime.start import prepare
from tests.support.configs import tiny_config

MODEL = "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --max-position-embeddings 128 --vocab-size 96 --seq-length 32"


def origin(line: str, model: str = MODEL) -> Origin:
    _, found = prepare(
        parse_flags(f"{line} {model} --mock-data --train-iters 2".split()), Process(rank=0, local_rank=0, world_size=1)
    )
    return found


def test_an_empty_folder_and_one_that_is_to_be_made(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for line, why in {
        f"--load {tmp_path}/empty --save {tmp_path}/out": f"no checkpoint at --load {tmp_path}/empty, which is empty",
        f"--load {tmp_path}/empty --save {tmp_path}/empty": f"no checkpoint at --load {tmp_path}/empty, which is empty",
        f"--load {tmp_path}/out --save {tmp_path}/out": f"no checkpoint at --load {tmp_path}/out, which isn't there yet",
        f"--save {tmp_path}/out": f"no checkpoint at --save {tmp_path}/out, which isn't there yet",
        "": "neither --load nor --save is given",
    }.items():
        found = origin(line)
        assert found.drawn
        assert found.notes[0].startswith(f"DRAWING WEIGHTS: {why}. A new Llama as the flags say: --seed 1234")
        with pytest.raises(MoeconvError, match=r"--exit-on-missing-checkpoint: .*; leave the flag out to draw weights"):
            origin(f"{line} --exit-on-missing-checkpoint")
        with pytest.raises(MoeconvError, match=r"say what it is: --num-layers, .* missing"):
            origin(line, "")


@pytest.mark.parametrize("save", ["--save {0}/out", ""])
def test_a_misspelt_load_never_draws(save: str, tmp_path: Path) -> None:
    with pytest.raises(
        MoeconvError, match=r"--load .*/typo: no such folder\. To draw weights, give --load and --save the"
    ):
        origin(f"--load {tmp_path}/typo {save.format(tmp_path)}")


@pytest.mark.parametrize("flag", ["--load {0}", "--save {0}", "--load {0} --save {0}"])
def test_a_folder_of_other_things_is_named(flag: str, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    (tmp_path / "photos").mkdir()
    with pytest.raises(
        MoeconvError, match=r"holds no checkpoint, but notes\.txt, photos\. To draw weights, name an empty"
    ):
        origin(flag.format(tmp_path))


def test_a_checkpoint_of_another_program_is_told_apart(tmp_path: Path) -> None:
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("100")
    (tmp_path / "iter_0000100" / "mp_rank_00").mkdir(parents=True)
    (tmp_path / "iter_0000100" / "mp_rank_00" / "model_optim_rng.pt").touch()
    with pytest.raises(MoeconvError, match=r"a Megatron-Core checkpoint.*import-megatron"):
        origin(f"--load {tmp_path} --save {tmp_path}")
    with pytest.raises(MoeconvError, match="to start from what is there, name it with --load"):
        origin(f"--save {tmp_path}")


def test_a_run_that_died_before_its_first_save_begins_again(tmp_path: Path) -> None:
    for name in ("run.yaml", "metrics.jsonl", ".trial-12ab"):
        (tmp_path / name).touch()
    for name in ("iter_0000010.partial", "tensorboard", "cache", "wandb"):
        (tmp_path / name).mkdir()
    logs = f"--tensorboard-dir {tmp_path}/tensorboard --data-cache-path {tmp_path}/cache/tokens"
    assert origin(f"--load {tmp_path} --save {tmp_path} {logs}").drawn
    with pytest.raises(MoeconvError, match="holds no checkpoint, but cache, tensorboard"):
        origin(f"--save {tmp_path}")


def test_another_runs_folder_is_a_checkpoint_to_load(tmp_path: Path) -> None:
    (tmp_path / "run" / "iter_0000002").mkdir(parents=True)
    (tmp_path / "run" / "run.yaml").touch()
    with pytest.raises(MoeconvError, match=r"holds no checkpoint, but iter_0000002, run\.yaml"):
        nothing_at(CheckpointConfig(load=tmp_path / "run", save=tmp_path / "out"))
    (tmp_path / "run" / "iter_0000002" / "moeconv.json").touch()
    for place in ("run", "run/iter_0000002"):
        assert nothing_at(CheckpointConfig(load=tmp_path / place, save=tmp_path / "out")) is None


def test_a_config_that_exists_is_enough(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny_config("qwen3_moe", initializer_range=0.05)))
    found = origin(f"--init-config {tmp_path} --save {tmp_path}/out --seed 5 --init-method-std 0.01", "")
    assert "A new Qwen3-MoE as " in found.notes[0]
    assert f"{tmp_path} says: --seed 5, standard deviation 0.01 " in found.notes[0]
    assert found.checkpoint.model.family.model_type == "qwen3_moe"
    with pytest.raises(MoeconvError, match=r"--num-layers is 2; .* has 4"):
        origin(f"--init-config {tmp_path} --save {tmp_path}/out")


def test_a_step_needs_a_folder() -> None:
    with pytest.raises(MoeconvError, match="--ckpt-step 5 needs a folder with checkpoints: --load or --save"):
        origin("--ckpt-step 5")
