"""Whole runs through torchrun: trained, stopped, broken and started again."""

from __future__ import annotations

import json
import re
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import MixtralForCausalLM

from moeconv.checkpoint import open_checkpoint
from moeconv.convert import Options, write_hf
from runtime.data.config import DataConfig
from runtime.data.loader import DataSource
from tests.runtime.launch import run, start, steps
from tests.runtime.tiny import make_checkpoint, make_text
from tests.runtime.words import VOCAB_SIZE

ITERATIONS = 12


class Workplace:
    """A checkpoint, text, and the uninterrupted run that everything is compared with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checkpoint = make_checkpoint(folder / "tiny")
        self.text = make_text(folder / "text.txt")
        self.status, self.output = run(2, self.arguments("plain", "--eval-iters", -1), fault="slow-save")
        self.losses = {i: r["lm_loss"] for i, r in steps(folder / "plain.jsonl").items()}

    def arguments(self, name: str, *extra: object) -> list[object]:
        return [
            "--load", self.checkpoint, "--data", self.text, "--save", self.folder / name,
            "--log-file", self.folder / f"{name}.jsonl", "--data-cache-path", self.folder / "cache",
            "--train-iters", ITERATIONS, "--save-interval", 4, "--seq-length", 64, "--micro-batch-size", 2,
            "--global-batch-size", 8, "--lr", 3e-3, "--lr-decay-style", "cosine", "--lr-warmup-iters", 2,
            "--split", "95,5,0", "--moe-aux-loss-coeff", 1e-2, "--expert-model-parallel-size", 2, "--use-distributed-optimizer",
            *extra,
        ]  # fmt: skip

    def saved(self, name: str) -> list[str]:
        return sorted(path.name for path in (self.folder / name).iterdir() if path.name != "run.yaml")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("runs"))


def check_equal_to_plain(place: Workplace, name: str) -> None:
    losses = {i: r["lm_loss"] for i, r in steps(place.folder / f"{name}.jsonl").items()}
    assert losses == pytest.approx(place.losses, rel=1e-6)


def test_loss_falls_and_checkpoints_are_there(place: Workplace) -> None:
    assert place.status == 0, place.output
    assert place.losses[ITERATIONS] < place.losses[1] - 0.5
    assert place.saved("plain") == ["iter_0000004", "iter_0000008", "iter_0000012", "latest"]
    assert (place.folder / "plain" / "latest").resolve().name == "iter_0000012"
    assert (place.folder / "plain" / "latest" / "run.yaml").read_text() == (
        place.folder / "plain" / "run.yaml"
    ).read_text()


def test_transformers_loads_the_export_with_the_runtimes_loss(place: Workplace) -> None:
    exported = place.folder / "exported"
    write_hf(open_checkpoint(place.folder / "plain" / "latest"), exported, None, Options())
    records = [json.loads(line) for line in (place.folder / "plain.jsonl").read_text().splitlines()]
    [evaluation] = [record for record in records if "eval_lm_loss" in record]
    config = DataConfig(data_path=(str(place.text),), split=(95, 5, 0), seq_length=64, vocab_size=VOCAB_SIZE)
    samples = DataSource(replace(config, data_cache_path=place.folder / "cache"), exported).samples("valid")
    rows = torch.from_numpy(np.stack([samples.sample(i) for i in range(samples.num_samples)]))
    model = MixtralForCausalLM.from_pretrained(exported, dtype=torch.float32)
    with torch.no_grad():
        logits = model(input_ids=rows[:, :-1]).logits
    expected = torch.nn.functional.cross_entropy(logits.double().flatten(0, 1), rows[:, 1:].flatten())
    assert evaluation["eval_tokens"] == rows[:, 1:].numel()
    assert evaluation["eval_lm_loss"] == pytest.approx(float(expected), rel=1e-6)


def test_the_log_says_what_computes_the_experts(place: Workplace) -> None:
    assert "grouped GEMMs of the experts: torch, chosen by auto" in place.output


def test_a_backend_that_is_not_installed_is_refused_before_anything_is_loaded(place: Workplace) -> None:
    status, output = run(2, place.arguments("refused", "--moe-grouped-gemm-backend", "grouped_gemm"))
    assert status != 0
    assert sum(line.startswith("error: --moe-grouped-gemm-backend") for line in output.splitlines()) == 1, output
    assert not (place.folder / "refused").exists()


def test_training_goes_on_during_a_save(place: Workplace) -> None:
    lines = place.output.splitlines()
    saved = next(i for i, line in enumerate(lines) if "saved iteration 4 " in line)
    later = next(i for i, line in enumerate(lines) if line.startswith("iteration 6/"))
    assert later < saved


def test_ctrl_c_saves_and_the_same_command_goes_on(place: Workplace) -> None:
    process = start(2, place.arguments("term"), fault="slow-steps")
    log = place.folder / "term.jsonl"
    deadline = time.monotonic() + 60
    while not (log.exists() and log.read_text().count('"kind":"train"') >= 5) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)  # what SIGTERM does is the same code
    output, _ = process.communicate(timeout=60)
    last = max(steps(log))
    assert output.count("SIGINT: leaving after this step and its save") == 1
    assert "KeyboardInterrupt" not in output
    assert 5 <= last < ITERATIONS, output
    assert f"asked to stop: saving after iteration {last} and leaving" in output
    assert (place.folder / "term" / "latest").resolve().name == f"iter_{last:07d}"
    status, output = run(2, place.arguments("term"))
    assert status == 0, output
    assert f"going on after iteration {last}" in output
    check_equal_to_plain(place, "term")


def test_a_failing_rank_ends_the_attempt_and_torchrun_resumes_it(place: Workplace) -> None:
    status, output = run(2, place.arguments("raise"), fault="raise", max_restarts=1)
    assert status == 0, output
    own = output.index("[rank 1] failed in iteration 7:\nTraceback")
    assert own < output.index("RuntimeError: parity error in memory") < output.index("[rank 0] ends in iteration 7: ")
    assert "going on after iteration 4" in output
    check_equal_to_plain(place, "raise")


def test_a_hanging_rank_is_named_with_its_stack(place: Workplace) -> None:
    status, output = run(2, place.arguments("hang", "--distributed-timeout-minutes", 0.08), fault="hang")
    assert status != 0
    assert re.search(r"rank \d on \S+ stands still for \d+ s in iteration 3 \(--distributed-timeout-minutes\)", output)
    assert "launch.py" in output  # where rank 1 sleeps


def test_a_failed_write_is_reported_and_training_goes_on(place: Workplace) -> None:
    status, output = run(2, place.arguments("full"), fault="full-disk")
    assert status == 0, output
    assert "SAVE FAILED at iteration 4: rank 1:" in output
    assert "No space left on device" in output
    assert "the last good checkpoint is none yet" in output
    assert place.saved("full") == ["iter_0000008", "iter_0000012", "latest"]
    check_equal_to_plain(place, "full")


def test_a_rank_killed_during_a_save_leaves_the_last_good_checkpoint(place: Workplace) -> None:
    begin = time.monotonic()
    status, output = run(2, place.arguments("kill"), fault="kill-in-save")
    assert status != 0
    assert "Signal 9 (SIGKILL)" in output
    assert time.monotonic() - begin < 60
    assert "iter_0000008" not in place.saved("kill"), output
    assert (place.folder / "kill" / "latest").resolve().name == "iter_0000004"
    status, output = run(2, place.arguments("kill", "--keep-last", 1))
    assert status == 0, output
    assert "going on after iteration 4" in output
    assert place.saved("kill") == ["iter_0000012", "latest"]
    check_equal_to_plain(place, "kill")
