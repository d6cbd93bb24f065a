"""An estimate as one self-contained page: memory by kind of each stage, the timeline of a step, scaling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from runtime.estimate.describe import as_json
from runtime.estimate.scaling import scaling_json
from runtime.estimate.step import Estimate
from runtime.report.build import assemble, write_page

MARK = '<meta name="generator" content="moeconv plan">'
MAX_EVENTS = 60_000
"""Of a timeline that a browser draws; of longer ones the first and the last are shown."""
_PARTS = Path(__file__).with_name("page")


def plan_page(estimate: Estimate, imbalance: float | None = None) -> str:
    """Make the page.

    Args:
        estimate: what is shown.
        imbalance: as the estimate was made with, for the scaling curve.

    Returns:
        HTML that needs no network.
    """
    setup = estimate.setup
    title = f"{setup.model.family.name} on {setup.world_size} GPUs"
    parts = [
        {"stage": number, "rank": number % setup.parallel.pp, "parts": dict(cost.parts), "communication": cost.exposed}
        for number, cost in estimate.stages.items()
    ]
    data: dict[str, Any] = as_json(estimate) | {
        "title": title,
        "model": setup.model.family.name,
        "parts": parts,
        "ranks_of_stage": setup.world_size // setup.parallel.pp,
        "timeline": _timeline(estimate),
        "scaling": scaling_json(setup, estimate.machine, imbalance),
    }
    return assemble(_PARTS, title=title, scripts=(_PARTS / "plan.js",), styles=(_PARTS / "plan.css",), data=data)


def write_plan(path: Path, page: str) -> None:
    """Write the page, or replace an older one; errors as of `runtime.report.build.write_page`."""
    write_page(path, page, MARK, "plan")


def _timeline(estimate: Estimate) -> dict[str, Any]:
    """Rows of [kind, begin, seconds, virtual stage, micro-batch], times in ms."""
    rows = []
    most = MAX_EVENTS // max(1, len(estimate.events))
    for found in estimate.events:
        shown = found if len(found) <= most else [*found[: most // 2], *found[-most // 2 :]]
        rows.append(
            [[e.kind, round(e.begin * 1e3, 3), round(e.seconds * 1e3, 3), e.stage, e.microbatch] for e in shown]
        )
    return {"rows": rows, "end": estimate.seconds * 1e3, "cut": any(len(found) > most for found in estimate.events)}
