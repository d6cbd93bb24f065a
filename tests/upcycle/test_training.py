"""An upcycled model trains in the runtime, expert-parallel, from where the dense model was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from moeconv.checkpoint import open_checkpoint
from moeconv.convert import Options, write_hf, write_sharded
from moeconv.layout.degrees import Degrees
from moeconv.upcycling.planned import plan_upcycle
from moeconv.upcycling.recipe import Recipe
from runtime.parity.ranks import RankPool
from tests.runtime.jobs import Job, run_jobs
from tests.runtime.launch import steps
from tests.runtime.tiny import make_text
from tests.runtime.words import VOCAB_SIZE, make_tokenizer
from tests.upcycle.hub import make_folder

ITERATIONS = 24
RECIPES: dict[str, dict[str, Any]] = {
    "virtual-group": {"method": "virtual-group", "granularity": 2, "experts": 8},
    "drop": {"method": "drop", "experts": 4},
}


def test_upcycled_models_train_and_return(tmp_path: Path, pool: RankPool) -> None:
    dense = make_folder(tmp_path / "dense", "llama", vocab_size=VOCAB_SIZE)
    make_tokenizer(dense)
    text = make_text(tmp_path / "text.txt")

    def job(name: str, iterations: int, *extra: object) -> Job:
        words = [
            "--load", tmp_path / name, "--data", text, "--save", tmp_path / "runs" / name, "--log-file", tmp_path / f"{name}.jsonl",
            "--data-cache-path", tmp_path / "cache", "--train-iters", iterations, "--seq-length", 64, "--micro-batch-size", 2,
            "--global-batch-size", 8, "--lr", 3e-3, "--use-distributed-optimizer", *extra,
        ]  # fmt: skip
        return Job(2, tuple(map(str, words)))

    for name, recipe in RECIPES.items():
        write_sharded(plan_upcycle(open_checkpoint(dense), Recipe(**recipe)), tmp_path / name, Degrees(ep=2), Options())
    experts = ("--expert-model-parallel-size", 2, "--moe-aux-loss-coeff", 1e-2)
    jobs = [job("dense", 1), job("virtual-group", ITERATIONS, *experts), job("drop", ITERATIONS, *experts)]
    run_jobs(jobs, pool)
    losses = {name: steps(tmp_path / f"{name}.jsonl") for name in ("dense", *RECIPES)}
    assert losses["virtual-group"][1]["lm_loss"] == pytest.approx(losses["dense"][1]["lm_loss"], rel=1e-5)
    for name in RECIPES:
        assert losses[name][ITERATIONS]["lm_loss"] < losses[name][1]["lm_loss"] - 0.5
        assert all(min(layer) > 0 for layer in losses[name][ITERATIONS]["expert_load"])
        write_hf(open_checkpoint(tmp_path / "runs" / name / "latest"), tmp_path / f"{name}-hf", None, Options())
        model, report = AutoModelForCausalLM.from_pretrained(tmp_path / f"{name}-hf", output_loading_info=True)
        assert not report["missing_keys"]
        assert model.config.model_type == "mixtral"
