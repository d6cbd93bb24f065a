"""Logs as curves: restarts, torn lines, growing files, and points chosen from many."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from moeconv.errors import SourceError
from runtime.report.data import MAX_COLUMNS, MAX_POINTS, report_data, summary, thin
from runtime.report.read import RunLog, find_log, open_runs
from tests.runtime.report.logs import load, write_log


def test_curves_are_the_log(tmp_path: Path) -> None:
    [run] = open_runs([write_log(tmp_path / "a.jsonl", 20)])
    assert list(run.train.iteration) == list(range(1, 21))
    assert list(run.train.tokens) == [200 * i for i in range(1, 21)]
    assert list(run.train.values["lm_loss"]) == pytest.approx([2 + math.exp(-i / 10) for i in range(1, 21)])
    assert list(run.evals) == ["valid", "code"]
    assert list(run.evals["valid"].iteration) == [10, 20]
    assert list(run.evals["code"].values["eval_lm_loss"]) == pytest.approx([2.49, 2.48])
    assert list(run.evals["code"].tokens) == [2000, 4000]
    assert list(run.layers["load_max_over_mean"][6]) == pytest.approx([1.0, 107 / 100, 1.0])
    assert run.expert_load == load(20)
    assert run.dead == [[2, 1]]
    assert run.settings["optim.lr"] == 1e-3
    assert (run.train_iters, run.bad_lines) == (20, 0)
    assert run.notes[0][1:] == (14, "experts without a token for 5 steps: layer 2: 1")
    assert summary(run)["best_eval"] == pytest.approx({"valid": 2.48, "code": 2.48})
    assert summary(run)["state"] == "finished"


def test_a_restart_replaces_the_steps_that_were_done_again(tmp_path: Path) -> None:
    log = write_log(tmp_path / "a.jsonl", 25)
    write_log(log, 30, first=18, lr=2e-3)
    [run] = open_runs([log])
    assert list(run.train.iteration) == list(range(1, 31))
    assert list(run.train.values["learning_rate"]) == [1e-3] * 17 + [2e-3] * 13
    assert len(run.layers["router_entropy"]) == 30
    assert list(run.evals["valid"].iteration) == [10, 20, 30]
    assert "started again, changed: optim.lr 0.001 -> 0.002" in [text for _, _, text in run.notes]
    assert summary(run)["starts"] == 2


def test_torn_lines_are_counted_and_the_last_waits(tmp_path: Path) -> None:
    log = write_log(tmp_path / "a.jsonl", 5)
    whole = log.read_bytes()
    lines = whole.splitlines(keepends=True)
    log.write_bytes(
        lines[0] + lines[1][:40] + b"\n" + b'{"kind":"train","iteration":null}\n' + b"".join(lines[2:4]) + lines[4][:30]
    )
    [run] = open_runs([log])
    assert run.bad_lines == 2
    assert list(run.train.iteration) == [2, 3]
    assert run.update() is False
    with log.open("ab") as file:
        file.write(lines[4][30:] + lines[5])
    assert run.update() is True
    assert list(run.train.iteration) == [2, 3, 4, 5]
    assert run.bad_lines == 2


def test_a_run_is_found_by_its_folder(tmp_path: Path) -> None:
    save = tmp_path / "runs" / "base"
    (save / "iter_0000010").mkdir(parents=True)
    (save / "latest").symlink_to("iter_0000010")
    log = write_log(save / "metrics.jsonl", 2)
    for path in (log, save, save / "iter_0000010", save / "latest"):
        assert find_log(path).samefile(log)
    other = write_log(tmp_path / "other" / "base" / "log.jsonl", 2)
    assert [run.name for run in open_runs([save, other.parent])] == ["base", "log"]
    twin = write_log(tmp_path / "other" / "base" / "metrics.jsonl", 2)
    assert [run.name for run in open_runs([save, twin])] == ["runs/base", "other/base"]
    with pytest.raises(SourceError, match="the same file"):
        open_runs([save, log])


def test_what_is_no_log_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no such file or folder"):
        open_runs([tmp_path / "nothing"])
    with pytest.raises(SourceError, match=r"no metrics.jsonl in it; name the file"):
        open_runs([tmp_path])
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text('{"text": "a sample"}\n')
    with pytest.raises(SourceError, match=r"it has a.jsonl, b.jsonl: name one of them"):
        open_runs([tmp_path])
    with pytest.raises(SourceError, match="none of its 1 lines is a record"):
        open_runs([tmp_path / "a.jsonl"])


@pytest.mark.parametrize("size", [0, 1, 2, 1599, 1600, 1601, 100_000])
def test_thinning_keeps_ends_and_extremes(size: int) -> None:
    values = np.random.default_rng(0).normal(size=size)
    places = thin(values.tolist(), MAX_POINTS)
    assert len(places) <= MAX_POINTS
    assert places == sorted(set(places))
    if size <= MAX_POINTS:
        assert places == list(range(size))
        return
    assert (places[0], places[-1]) == (0, size - 1)
    assert len(places) > MAX_POINTS // 2
    assert {int(values.argmin()), int(values.argmax())} <= set(places)


def test_what_is_not_finite_is_no_point() -> None:
    assert thin([1.0, math.nan, math.inf, 2.0], 10) == [0, 3]


def test_a_long_run_gives_little_data_and_keeps_its_spike(tmp_path: Path) -> None:
    run = RunLog(tmp_path, "long")
    for i in range(1, 30_001):
        run.train.add(i, i, float(i), {"lm_loss": 9.0 if i == 12_345 else 2.0})
        run.layers.setdefault("load_max_over_mean", []).append([1.0, 4.0 if i == 12_345 else 2.0])  # type: ignore[arg-type]
        for name in ("router_entropy", "dropped_share"):
            run.layers.setdefault(name, []).append([0.5, math.nan])  # type: ignore[arg-type]
    data = report_data([run])["runs"][0]
    steps, _, _, losses = data["curves"]["lm_loss"]
    assert losses[steps.index(12_345)] == 9.0
    heat = data["heat"]
    assert len(heat["from"]) == len(heat["load_max_over_mean"][1]) == MAX_COLUMNS
    assert [max(row) for row in heat["load_max_over_mean"]] == [1.0, 4.0]
    assert set(heat["dropped_share"][1]) == {None}
    assert heat["from"][0] == 1
    assert heat["to"][-1] == 30_000
    assert len(json.dumps(data)) < 500_000
