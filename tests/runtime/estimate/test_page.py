"""The page in a real browser: bars as wide as the bytes, every pass on the timeline, nothing fetched, nothing logged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from cli.main import main
from tests.runtime.report.browser import Browser, find_browser
from tests.support.configs import tiny_config

FLAGS = (
    "--gpus 8 --pp 4 --vpp 1 --ep 2 --global-batch-size 16 --seq-length 64 --use-distributed-optimizer --dtype bfloat16"
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    (folder / "config.json").write_text(json.dumps(tiny_config() | {"torch_dtype": "bfloat16"}))
    words = ["plan", str(folder), *FLAGS.split(), "--html", str(folder / "p.html"), "--trace", str(folder / "t.json")]
    result = CliRunner().invoke(main, [*words, "--json"])
    assert result.exit_code == 0, result.output
    (folder / "result.json").write_text(result.output)
    return folder


def test_the_trace_has_every_pass(files: Path) -> None:
    trace = json.loads((files / "t.json").read_text())["traceEvents"]
    spans = [event for event in trace if event["ph"] == "X"]
    passes = [span for span in spans if span["cat"] in ("forward", "backward")]
    assert len(passes) == 4 * 2 * 8  # stages, passes, micro-batches
    assert {span["tid"] for span in spans} == {0, 2, 4, 6}
    seconds = json.loads((files / "result.json").read_text())["step"]["seconds"]
    assert max(span["ts"] + span["dur"] for span in spans) == pytest.approx(seconds * 1e6, rel=1e-3)


def test_a_page_is_not_written_over_something_else(files: Path, tmp_path: Path) -> None:
    other = tmp_path / "mine.html"
    other.write_text("<p>mine")
    result = CliRunner().invoke(main, ["plan", str(files), *FLAGS.split(), "--html", str(other)])
    assert result.exit_code == 1
    assert "exists and is no plan" in result.output
    assert other.read_text() == "<p>mine"


@pytest.mark.skipif(find_browser() is None, reason="there is no Chromium here")
def test_the_page_shows_the_plan(files: Path) -> None:
    value: dict[str, Any] = json.loads((files / "result.json").read_text())
    with Browser() as browser:
        browser.open((files / "p.html").as_uri())
        assert browser.problems == []
        assert browser.requests == [(files / "p.html").as_uri()]
        widths = browser.run(
            "[...document.querySelectorAll('#memory .stack')].map((row) => Object.fromEntries([...row.querySelectorAll('.piece')]"
            ".map((piece) => [piece.dataset.kind, parseFloat(piece.style.width)])))"
        )
        stages = value["memory"]["stages"]
        assert len(widths) == len(stages) == 4
        for row, stage in zip(widths, stages, strict=True):
            assert row["gradients"] / row["weights"] == pytest.approx(stage["gradients"] / stage["weights"], rel=1e-3)
        assert browser.run("+document.getElementById('timeline').dataset.events") == 4 * (2 * 8 + 3)
        assert browser.run("document.getElementById('flags').textContent") == " ".join(value["flags"])
        # Looking closer, and back.
        box = browser.run(
            "(b => [b.left, b.top, b.width])(document.getElementById('timeline').getBoundingClientRect())"
        )
        browser.mouse("mousePressed", box[0] + 0.4 * box[2], box[1] + 30, button="left", clickCount=1)
        browser.mouse("mouseReleased", box[0] + 0.6 * box[2], box[1] + 30, button="left", clickCount=1)
        assert browser.run("+document.getElementById('timeline').dataset.low") > 0
        browser.run("document.getElementById('reset').click()")
        assert browser.run("+document.getElementById('timeline').dataset.low") == 0
        assert browser.problems == []
