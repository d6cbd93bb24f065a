"""What a report shows, as JSON: curves with few enough points to draw, whatever a run's length."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from array import array
from collections.abc import Sequence
from typing import Any

from runtime.report.read import LAYER_CURVES, Curves, RunLog

MAX_POINTS = 1600  # of a curve: more than a screen has columns
MAX_COLUMNS = 320  # of a heat map
_MAX_NOTES = 500
_RUNNING_SECONDS = 300.0
Number = float | int | None


def report_data(runs: Sequence[RunLog], *, live: bool = False) -> dict[str, Any]:
    """Put together what the page draws.

    Args:
        runs: the runs, read.
        live: whether the page asks again.

    Returns:
        JSON values.
    """
    return {"live": live, "made": time.time(), "runs": [_run(run) for run in runs]}


def _run(run: RunLog) -> dict[str, Any]:
    begin = run.starts[0] if run.starts else (run.train.time[0] if len(run.train) else 0.0)
    return {
        "name": run.name,
        "path": str(run.path),
        "summary": summary(run),
        "settings": run.settings,
        "curves": _curves(run.train, begin),
        "evals": {split: _curves(curves, begin) for split, curves in run.evals.items()},
        "heat": _heat(run),
        "experts": _experts(run),
        "dead": run.dead,
        "notes": [[when, iteration, text] for when, iteration, text in run.notes[-_MAX_NOTES:]],
        "notes_left_out": max(len(run.notes) - _MAX_NOTES, 0),
        "bad_lines": run.bad_lines,
    }


def summary(run: RunLog) -> dict[str, Any]:
    """Give a run's state in a few numbers.

    Args:
        run: the run.

    Returns:
        JSON values; None is unknown.
    """
    train, values = run.train, run.train.values
    best = {split: _smallest(curves.values.get("eval_lm_loss", array("d"))) for split, curves in run.evals.items()}
    speeds = [v for v in values.get("tokens_per_second", array("d"))[-1000:] if math.isfinite(v)]
    shares = [v for v in values.get("mfu", array("d"))[-1000:] if math.isfinite(v)]
    memory = [v for v in values.get("memory_gb", array("d")) if math.isfinite(v)]
    done = 0 < run.train_iters <= run.iteration
    state = "finished" if done else "running" if time.time() - run.last_time < _RUNNING_SECONDS else "stopped"
    return {
        "state": state,
        "model": run.settings.get("job.model"),
        "parameters": run.settings.get("job.parameters"),
        "device": run.settings.get("job.device"),
        "world_size": run.settings.get("job.world_size"),
        "experts": run.settings.get("job.experts"),
        "iteration": run.iteration,
        "train_iters": run.train_iters,
        "tokens": train.tokens[-1] if len(train) else 0,
        "lm_loss": _last(values.get("lm_loss", array("d"))),
        "best_eval": best,
        "tokens_per_second": statistics.median(speeds) if speeds else None,
        "mfu": statistics.median(shares) if shares else None,
        "memory_gb": max(memory, default=None),
        "hours": (run.last_time - run.starts[0]) / 3600 if run.starts else None,
        "starts": len(run.starts),
        "skipped_steps": int(sum(v for v in values.get("skipped_steps", array("d")) if math.isfinite(v))),
        "dead_experts": len(run.dead),
    }


def _last(values: Sequence[float]) -> Number:
    return next((value for value in reversed(values) if math.isfinite(value)), None)


def _smallest(values: Sequence[float]) -> Number:
    return min((value for value in values if math.isfinite(value)), default=None)


def _curves(curves: Curves, begin: float) -> dict[str, list[list[Number]]]:
    """Give each curve as columns: iteration, tokens, hours, value."""
    out: dict[str, list[list[Number]]] = {}
    for name, values in sorted(curves.values.items()):
        places = thin(values, MAX_POINTS)
        if places:
            out[name] = [
                [curves.iteration[i] for i in places],
                [curves.tokens[i] for i in places],
                [rounded((curves.time[i] - begin) / 3600) for i in places],
                [rounded(values[i]) for i in places],
            ]
    return out


def thin(values: Sequence[float], most: int) -> list[int]:
    """Choose the points of a curve that are drawn: of each of equal parts the lowest and the highest, so that no spike is lost.

    Args:
        values: the curve; NaN and infinite ones are no points.
        most: points at most.

    Returns:
        Rising places in `values`; the first and the last finite one are among them.
    """
    good = [i for i, value in enumerate(values) if math.isfinite(value)]
    if len(good) <= most:
        return good
    chosen = {good[0], good[-1]}
    parts = (most - 2) // 2
    for part in range(parts):
        piece = good[part * len(good) // parts : (part + 1) * len(good) // parts]
        chosen |= {min(piece, key=values.__getitem__), max(piece, key=values.__getitem__)}
    return sorted(chosen)


def rounded(value: float) -> Number:
    """Give six significant digits; None for what is not finite."""
    if not math.isfinite(value):
        return None
    short = float(f"{value:.6g}")
    return int(short) if short.is_integer() and abs(short) < 1e15 else short


def _heat(run: RunLog) -> dict[str, Any] | None:
    """Give the layers' numbers by step, in at most MAX_COLUMNS parts of equally many records.

    Of the load the worst in the part is told, of the others the mean.
    """
    rows = run.layers.get(LAYER_CURVES[0])
    if not rows:
        return None
    layers = [layer for layer, value in enumerate(rows[-1]) if math.isfinite(value)]
    count = min(len(rows), MAX_COLUMNS)
    bounds = [part * len(rows) // count for part in range(count + 1)]
    pieces = [range(a, b) for a, b in itertools.pairwise(bounds)]
    out: dict[str, Any] = {
        "layers": layers,
        "from": [run.train.iteration[piece[0]] for piece in pieces],
        "to": [run.train.iteration[piece[-1]] for piece in pieces],
    }
    for name in LAYER_CURVES:
        table = run.layers[name]
        take = max if name == LAYER_CURVES[0] else _mean
        out[name] = [[_cell([table[i][layer] for i in piece], take) for piece in pieces] for layer in layers]
    return out


def _cell(values: list[float], take: Any) -> Number:
    finite = [value for value in values if math.isfinite(value)]
    return float(f"{take(finite):.4g}") if finite else None


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _experts(run: RunLog) -> dict[str, Any] | None:
    """Give each expert's share of its layer's choices in the last record, 1 where it has its part."""
    layers = [layer for layer, row in enumerate(run.expert_load) if sum(row)]
    if not layers:
        return None
    share = [
        [rounded(n * len(run.expert_load[i]) / sum(run.expert_load[i])) for n in run.expert_load[i]] for i in layers
    ]
    return {"layers": layers, "share": share, "iteration": run.iteration}
