"""Runs on conversations: stopped and gone on with bit for bit, and under another layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from runtime.parity.ranks import RankPool
from tests.runtime.data.chats import CHATML, make_chats, with_template, without_marks
from tests.runtime.jobs import Job, run_jobs
from tests.runtime.launch import steps
from tests.runtime.tiny import make_checkpoint
from tests.runtime.words import real_text

FLAGS = (
    "--train-iters 4 --seq-length 128 --micro-batch-size 2 --global-batch-size 4 --lr 3e-3 --split 90,10,0 --eval-iters -1 "
    "--eval-interval 2 --save-interval 2"
)
LAYOUT = "--context-parallel-size 2"


def records(path: Path) -> tuple[dict[int, float], dict[int, float]]:
    """Losses of steps and of evaluations, by iteration."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    evaluations = {line["iteration"]: line["eval_lm_loss"] for line in lines if line["kind"] == "eval"}
    return {step: record["lm_loss"] for step, record in steps(path).items()}, evaluations


def test_a_run_on_conversations_goes_on_exactly_and_elsewhere(tmp_path: Path, pool: RankPool) -> None:
    tiny = make_checkpoint(tmp_path / "tiny")
    with_template(tiny, without_marks(CHATML), tiny)
    (tmp_path / "t.jinja").write_text(CHATML)
    text = real_text()
    chats = make_chats([text[begin : begin + 60] for begin in range(0, len(text), 700)], 50)
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(record) + "\n" for record in chats))
    common: list[Any] = [
        "--load",
        tiny,
        "--finetune-data",
        tmp_path / "chats.jsonl",
        "--data-cache-path",
        tmp_path / "cache",
    ]

    def job(ranks: int, name: str, log: str, *more: str) -> Job:
        words = [*common, *FLAGS.split(), "--save", tmp_path / name, "--log-file", tmp_path / f"{log}.jsonl", *more]
        return Job(ranks, tuple(map(str, words)))

    jobs = [job(1, "plain", "plain"), job(1, "again", "first", "--exit-interval", "2"), job(1, "again", "second")]
    jobs += [job(1, "other", "third", "--exit-interval", "2", "--chat-template", str(tmp_path / "t.jinja"))]
    jobs += [job(2, "other", "fourth", *LAYOUT.split(), "--chat-template", str(tmp_path / "t.jinja"))]
    run_jobs(jobs, pool)
    plain, evaluations = records(tmp_path / "plain.jsonl")
    assert list(plain) == [1, 2, 3, 4]
    assert list(evaluations) == [2, 4]
    first, second = records(tmp_path / "first.jsonl")[0], records(tmp_path / "second.jsonl")
    assert first | second[0] == plain
    assert second[1] == {4: evaluations[4]}
    # The template with marks gives the masks of the one without, and the saved checkpoint carries it.
    moved = records(tmp_path / "third.jsonl")[0] | records(tmp_path / "fourth.jsonl")[0]
    assert moved == pytest.approx(plain, rel=1e-6)
    assert AutoTokenizer.from_pretrained(tmp_path / "other" / "iter_0000004").chat_template == CHATML
    assert len(list((tmp_path / "cache").glob("*.bin"))) == 2, "going on tokenizes nothing anew"
