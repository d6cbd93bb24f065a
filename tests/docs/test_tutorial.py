"""The tutorial shows what its commands print."""

from __future__ import annotations

from pathlib import Path

from tests.docs.tutorial import PAGE, masked


def test_the_outputs_are_what_is_printed(day: Path) -> None:
    """`python -m tests.docs.tutorial` writes them anew."""
    made, page = (day / "tutorial.made").read_text(encoding="utf8"), PAGE.read_text(encoding="utf8")
    assert masked(made).splitlines() == masked(page).splitlines()


def test_the_loss_falls_and_the_page_says_so(day: Path) -> None:
    losses = [
        float(line.split("lm loss ")[1].split()[0]) for line in PAGE.read_text().splitlines() if "lm loss" in line
    ]
    assert len(losses) == 5
    assert losses[-1] < losses[0]
    assert (day / "report.html").stat().st_size > 10_000
