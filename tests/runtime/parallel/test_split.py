"""A run that goes on from its own checkpoint keeps the layers of its stages, and its losses are one rank's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moeconv.checkpoint import open_checkpoint
from runtime.parity.ranks import RankPool
from tests.runtime.jobs import Job, run_jobs
from tests.runtime.tiny import make_checkpoint


def losses(log: Path) -> list[float]:
    records = map(json.loads, log.read_text().splitlines())
    return [record["lm_loss"] for record in records if "lm_loss" in record]


def test_a_run_keeps_its_split_without_being_told(tmp_path: Path, pool: RankPool) -> None:
    model = make_checkpoint(tmp_path / "tiny")

    def job(ranks: int, name: str, iterations: int, more: str = "") -> Job:
        words = f"--load {model} --save {tmp_path / name} --log-file {tmp_path / name}.jsonl --train-iters {iterations}"
        words += (
            " --mock-data --tokenizer-type NullTokenizer --seq-length 32 --micro-batch-size 1 --global-batch-size 4"
        )
        return Job(ranks, (*words.split(), "--lr", "1e-3", "--lr-decay-iters", "2", "--fp32", *more.split()))

    pp2 = "--pipeline-model-parallel-size 2"
    run_jobs([job(2, "split", 1, f"{pp2} --pp-layers 3,1"), job(2, "split", 2, pp2), job(1, "one", 2)], pool)
    saved = open_checkpoint(tmp_path / "split" / "latest").degrees
    assert (saved.pp, saved.pp_layers) == (2, (3, 1))
    assert len(losses(tmp_path / "split.jsonl")) == 2
    assert losses(tmp_path / "split.jsonl") == pytest.approx(losses(tmp_path / "one.jsonl"), rel=1e-5)
