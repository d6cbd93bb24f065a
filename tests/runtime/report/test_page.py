"""The page in a real browser: every chart has its points, nothing is logged as an error, nothing is fetched."""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from cli.main import main
from runtime.report.read import open_runs
from runtime.report.serve import ReportServer
from tests.runtime.report.browser import Browser, find_browser
from tests.runtime.report.logs import NUM_EXPERTS, NUM_LAYERS, write_log

needs_browser = pytest.mark.skipif(find_browser() is None, reason="there is no Chromium here")
CURVES = (
    "lm_loss", "learning_rate", "grad_norm", "loss", "load_max_over_mean", "aux_loss", "router_entropy", "dropped_share",
    "dead_experts", "z_loss", "tokens_per_second", "tflops_per_gpu", "mfu", "step_seconds", "data_wait", "memory_gb",
)  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as browser:
        yield browser


@pytest.fixture
def page(tmp_path: Path) -> Path:
    write_log(tmp_path / "a" / "metrics.jsonl", 30)
    write_log(tmp_path / "b" / "metrics.jsonl", 20, lr=2e-3, data={"path": "</script><script>throw 1</script>"})
    result = CliRunner().invoke(
        main, ["report", str(tmp_path / "a"), str(tmp_path / "b"), "-o", str(tmp_path / "r.html"), "--json"]
    )
    assert result.exit_code == 0, result.output
    value = json.loads(result.output)
    assert [(run["name"], run["iteration"], run["state"]) for run in value["runs"]] == [
        ("a", 30, "finished"),
        ("b", 20, "finished"),
    ]
    return tmp_path / "r.html"


def show(browser: Browser, url: str) -> None:
    browser.problems.clear()
    browser.requests.clear()
    browser.open(url)


def points(browser: Browser) -> dict[str, int]:
    found: dict[str, int] = browser.run(
        "Object.fromEntries([...document.querySelectorAll('[data-chart]')].map((f) => [f.dataset.chart, +f.dataset.points]))"
    )
    return found


def vertices(browser: Browser, chart: str) -> list[int]:
    """Points of each line that is drawn."""
    script = f"[...document.querySelectorAll('[data-chart={chart}] path.line')].map((p) => p.getAttribute('d').split(/[ML]/).length - 1)"
    found: list[int] = browser.run(script)
    return found


@needs_browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_every_chart_has_its_points_and_nothing_complains(browser: Browser, page: Path, dark: bool) -> None:
    browser.dark(dark)
    show(browser, page.as_uri())
    assert points(browser) == dict.fromkeys(CURVES, 50) | {"eval_lm_loss": 10}
    for chart in CURVES:
        assert vertices(browser, chart) == [30, 20], chart
    assert vertices(browser, "eval_lm_loss") == [3, 3, 2, 2]
    sizes = "[f.dataset.heat, [+f.dataset.rows, +f.dataset.columns, +f.dataset.cells]]"
    cells = f"Object.fromEntries([...document.querySelectorAll('[data-heat]')].map((f) => {sizes}))"
    layers, experts = NUM_LAYERS, NUM_EXPERTS
    assert browser.run(cells) == {
        "layers-0": [layers, 30, 90], "experts-0": [layers, experts, 12],
        "layers-1": [layers, 20, 60], "experts-1": [layers, experts, 12],
    }  # fmt: skip
    assert browser.run("document.querySelector('[data-dead]').textContent") == "a: dead experts now: layer 2: 1"
    text = browser.run("document.body.innerText")
    assert "saved iteration 30 to <b>somewhere</b></script> in 1.0 s" in text
    assert browser.problems == []
    assert [url for url in browser.requests if not url.startswith("data:")] == [page.as_uri()]
    back, front = browser.run(
        "[document.body, document.querySelector('h1')].map((e, i) => getComputedStyle(e)[i ? 'color' : 'backgroundColor'])"
    )
    luminance = [sum(int(part) for part in color[4:-1].split(",")) for color in (back, front)]
    assert abs(luminance[0] - luminance[1]) > 450, "text stands out from its ground"
    assert (luminance[0] < luminance[1]) is dark


@needs_browser
def test_the_picture_is_not_empty(browser: Browser, page: Path, tmp_path: Path) -> None:
    """The heat map's pixels are coloured by value: the skewed layer is brighter than the balanced one."""
    show(browser, page.as_uri())
    script = """(() => {
      const canvas = document.querySelector('[data-heat=layers-0] canvas');
      const pen = canvas.getContext('2d');
      const place = (r) => [...pen.getImageData(canvas.width * 0.9, (r + 0.5) * 26 + 2, 1, 1).data].slice(0, 3).reduce((a, b) => a + b);
      return [place(0), place(1)];
    })()"""
    balanced, skewed = browser.run(script)
    assert skewed > balanced + 50


@needs_browser
def test_hover_tells_the_numbers(browser: Browser, page: Path) -> None:
    show(browser, page.as_uri())
    box = browser.run(
        "(r => [r.x, r.y, r.width, r.height])(document.querySelector('[data-chart=learning_rate] svg.plot').getBoundingClientRect())"
    )
    browser.mouse("mouseMoved", box[0] + 53, box[1] + box[3] / 2)
    text = browser.run("document.querySelector('[data-chart=learning_rate] .tip').innerText")
    assert "step 1" in text
    assert "200 tokens" in text
    assert "0.001 a" in text
    assert "0.002 b" in text
    assert browser.problems == []


@needs_browser
def test_runs_are_hidden_axes_chosen_and_parts_enlarged(browser: Browser, page: Path) -> None:
    show(browser, page.as_uri())
    browser.run("document.querySelectorAll('.chip')[1].click()")
    assert points(browser)["lm_loss"] == 30
    browser.run("document.querySelectorAll('.chip')[1].click()")
    browser.run("[...document.querySelectorAll('#axis button')].find((b) => b.textContent === 'tokens').click()")
    labels = browser.run(
        "[...document.querySelectorAll('[data-chart=lm_loss] svg.plot text')].map((t) => t.textContent)"
    )
    assert "6k" in labels
    box = browser.run(
        "(r => [r.x, r.y, r.width, r.height])(document.querySelector('[data-chart=lm_loss] svg.plot').getBoundingClientRect())"
    )
    middle, y = box[0] + 52 + (box[2] - 64) / 2, box[1] + box[3] / 2
    browser.mouse("mousePressed", box[0] + 45, y, button="left", clickCount=1)
    browser.mouse("mouseMoved", middle, y, button="left", buttons=1)
    browser.mouse("mouseReleased", middle, y, button="left", clickCount=1)
    assert points(browser)["lm_loss"] in (30, 31), "15 or so steps of two runs"
    assert points(browser)["grad_norm"] == points(browser)["lm_loss"], "all charts show the same part"
    browser.run("document.getElementById('reset').click()")
    assert points(browser)["lm_loss"] == 50
    assert browser.problems == []


@needs_browser
def test_the_configuration_shows_what_differs(browser: Browser, page: Path) -> None:
    show(browser, page.as_uri())
    rows = "[...document.querySelectorAll('#config tr')].slice(1).map((r) => [...r.children].map((c) => c.textContent))"
    found: list[list[str]] = browser.run(rows)
    assert found == [["optim.lr", "0.001", "0.002"], ["data.path", "\u2013", "</script><script>throw 1</script>"]]
    browser.run("document.querySelector('#config input[type=checkbox]').click()")
    assert len(browser.run(rows)) == 7
    assert browser.problems == []


@needs_browser
@pytest.mark.parametrize("iterations", [0, 1])
def test_a_run_that_has_just_begun_and_a_dense_one(browser: Browser, tmp_path: Path, iterations: int) -> None:
    log = write_log(tmp_path / "log.jsonl", iterations, experts=False)
    result = CliRunner().invoke(main, ["report", str(log), "-o", str(tmp_path / "r.html")])
    assert result.exit_code == 0, result.output
    show(browser, (tmp_path / "r.html").as_uri())
    assert points(browser).get("lm_loss", 0) == iterations
    assert "aux_loss" not in points(browser)
    assert browser.problems == []


@needs_browser
def test_the_served_page_follows_the_run(browser: Browser, tmp_path: Path) -> None:
    log = write_log(tmp_path / "log.jsonl", 5)
    server = ReportServer(open_runs([log]), 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        show(browser, server.url)
        assert points(browser)["lm_loss"] == 5
        write_log(log, 8, first=6)
        deadline = time.monotonic() + 20
        while points(browser)["lm_loss"] != 8 and time.monotonic() < deadline:
            time.sleep(0.2)
        assert points(browser)["lm_loss"] == 8
        assert browser.run("document.getElementById('live').textContent") == "live"
        assert browser.problems == []
        browser.open("about:blank")
    finally:
        server.shutdown()
        server.server_close()


def test_the_server_answers_this_machine_alone(tmp_path: Path) -> None:
    server = ReportServer(open_runs([write_log(tmp_path / "log.jsonl", 5)]), 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with urllib.request.urlopen(server.url + "data") as answer:
            data: dict[str, Any] = json.load(answer)
        assert data["runs"][0]["summary"]["iteration"] == 5
        for path, host, status in (("data", "evil.example", 403), ("../../etc/passwd", "127.0.0.1", 404)):
            request = urllib.request.Request(server.url + path, headers={"Host": host})
            with pytest.raises(urllib.error.HTTPError) as failure:
                urllib.request.urlopen(request)
            failure.value.close()
            assert failure.value.code == status
        assert server.server_address[0] == "127.0.0.1"
    finally:
        server.shutdown()
        server.server_close()


def test_another_file_is_not_overwritten(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log.jsonl", 3)
    (tmp_path / "mine.html").write_text("<p>mine</p>")
    result = CliRunner().invoke(main, ["report", str(log), "-o", str(tmp_path / "mine.html")])
    assert result.exit_code == 1
    assert "exists and is no report" in result.output
    assert (tmp_path / "mine.html").read_text() == "<p>mine</p>"
    for _ in range(2):
        result = CliRunner().invoke(main, ["report", str(log), "-o", str(tmp_path / "r.html")])
        assert result.exit_code == 0, result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.jsonl", "mine.html", "r.html"]
