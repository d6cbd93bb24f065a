"""The measurements as tables in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.multi_gpu.job import Task
from benchmarks.multi_gpu.parity import NUMBERS

NAME_WIDTH = 90  # of a kernel's name


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """A task and what came of it."""

    task: Task
    result: Any
    """What the task gave; None where it failed or had nothing to say."""
    failed: str | None


def report(records: Sequence[Record], machine: dict[str, Any]) -> tuple[str, bool]:
    """Write all tables.

    Args:
        records: what was measured.
        machine: device, ranks, torch and command.

    Returns:
        The text, and whether nothing failed, every layout trains like one rank and every resumed state is the saved one.
    """
    parts = ["`{command}`, {ranks} x {device}, torch {torch}.\n".format(**machine)]
    makers: dict[str, Callable[[list[Record]], str]] = {
        "parity": _parity, "training": _training, "traffic": _traffic, "scaling": _scaling, "save": _save,
        "resume": _resume,
    }  # fmt: skip
    for kind, make in makers.items():
        found = [r for r in records if r.task.kind == kind and r.result is not None]
        if found:
            parts.append(make(found))
    failed = [r for r in records if r.failed is not None]
    if failed:
        rows = [(r.task.kind, r.task.label, r.task.world, r.failed) for r in failed]
        parts.append(_table("Failed", ("measurement", "layout", "ranks", "why"), rows))
    verdicts = {"parity": "within", "resume": "equal"}
    good = all(r.result[verdicts[r.task.kind]] for r in records if r.task.kind in verdicts and r.result is not None)
    return "\n".join(parts), good and not failed


def _table(title: str, heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [f"### {title}", "", _line(heads), _line(["---"] * len(heads))]
    return "\n".join([*lines, *(_line(row) for row in rows), ""])


def _line(cells: Sequence[Any]) -> str:
    return "| " + " | ".join("-" if cell is None else str(cell) for cell in cells) + " |"


def _number(value: float | None, digits: int = 1) -> str | None:
    return None if value is None else f"{value:,.{digits}f}"


def _percent(value: float | None) -> str | None:
    return None if value is None else f"{value:.1%}"


def _parity(records: list[Record]) -> str:
    out = []
    for dtype in ("float32", "bfloat16"):
        rows = []
        for r in (r for r in records if r.task.options["dtype"] == dtype):
            errors, rounding = r.result["errors"], r.result.get("rounding", {})
            cells = [f"{errors[n]:.1e}" + (f" ({rounding[n]:.1e})" if n in rounding else "") for n in NUMBERS]
            rows.append((r.task.label, r.task.world, *cells, "yes" if r.result["within"] else "NO"))
        if rows:
            heads = ("layout", "ranks", *(n.replace("load", "choices moved") for n in NUMBERS), "within")
            note = "" if dtype == "float32" else " (in brackets: one rank in bf16 against fp32)"
            out.append(_table(f"Largest relative errors against one rank, {dtype}{note}", heads, rows))
    return "\n".join(out)


def _training(records: list[Record]) -> str:
    rows: list[Sequence[Any]] = []
    kinds: list[Sequence[Any]] = []
    exchanges: list[Sequence[Any]] = []
    shares: list[Sequence[Any]] = []
    largest: list[Sequence[Any]] = []
    for r in records:
        x, memory = r.result, r.result["memory_gb"]
        rows.append((
            r.task.label, x["layers"], _number(x["parameters"] / 1e9, 2), _number(x["tokens"], 0), _number(x["ms"]),
            _number(x["tokens_per_second"], 0), _number(x["tflops_per_gpu"], 0), _percent(x["utilization"]),
            _number(x["fullest"], 2), *(_number(size, 2) for size in memory.values()),
        ))  # fmt: skip
        if x.get("overlap"):
            o = x["overlap"]
            shares.append((r.task.label, *(_number(o[f"{name}_ms"]) for name in ("computing", "exposed", "idle"))))
            largest += [(r.task.label, name[:NAME_WIDTH], calls, _number(ms)) for name, calls, ms in o["largest"]]
            for kind, k in o["kinds"].items():
                hidden = _percent(k["hidden_ms"] / k["ms"])
                kinds.append((r.task.label, kind, k["calls"], _number(k["ms"]), hidden, None, None))
            total, exposed = o["communication_ms"], o["exposed_ms"]
            hidden = _percent(1 - exposed / total) if total else None
            kinds.append((r.task.label, "together", None, _number(total), hidden, _number(exposed), _number(x["ms"])))
        if x.get("exchange"):
            e = x["exchange"]
            ratio = _number(e["in_step_ms"] / e["floor_ms"], 2) if e["in_step_ms"] else None
            alone = (_number(e["mb"]), _number(e["gb_s"]), _number(e["floor_ms"], 2))
            exchanges.append((r.task.label, *alone, _number(e["in_step_ms"], 2), ratio))
    memory_heads = [f"{name}, GB" for name in records[0].result["memory_gb"]]
    first = ("layout", "layers", "G parameters", "tokens a step", "ms", "tokens/s", "TFLOP/s a GPU", "utilisation")
    out = [_table("A training step", (*first, "fullest rank", *memory_heads), rows)]
    if shares:
        columns = ("layout", "computing, ms", "communication alone, ms", "nothing, ms")
        out.append(_table("Where a step of the first rank goes", columns, shares))
    if kinds:
        names = ("layout", "NCCL kernels", "calls", "ms", "hidden", "exposed ms", "step ms")
        out.append(_table("Communication in a step of the first rank", names, kinds))
    if exchanges:
        fields = ("layout", "MB a rank", "GB/s alone", "4 alone, ms", "4 in a step, ms", "ratio")
        out.append(_table("A layer's exchanges of rows with a micro-batch", fields, exchanges))
    if largest:
        out.append(_table("Largest kernels", ("layout", "kernel", "calls", "ms"), largest))
    return "\n".join(out)


def _traffic(records: list[Record]) -> str:
    rows = [
        (x["name"], r.task.world, _number(x["mb"]), _number(x["ms"], 3), _number(x["gb_s"]))
        for r in records
        for x in r.result
    ]
    return _table("Collectives alone", ("collective", "ranks", "MB", "ms", "GB/s over a link"), rows)


def _scaling(records: list[Record]) -> str:
    rows = []
    speeds = {(r.task.label, r.task.options["mode"], r.task.world): r.result for r in records}
    for (label, mode, world), x in sorted(speeds.items()):
        one = speeds.get((label, mode, 1))
        speed = x["tokens_per_second"]
        share = _percent(speed / world / one["tokens_per_second"]) if one else None
        rows.append((label, mode, world, x["layers"], _number(x["tokens"], 0), _number(speed, 0), share))
    heads = ("layout", "scaling", "ranks", "layers", "tokens a step", "tokens/s", "of ideal")
    return _table("Scaling", heads, rows)


def _save(records: list[Record]) -> str:
    rows = []
    for r in records:
        x = r.result
        rows.append((
            r.task.label, r.task.world, _number(x["gb"], 2), _number(x["disk_gb_s"], 2), _number(x["copy_s"], 2),
            _number(x["sync_s"], 2), _number(x["gb"] / x["sync_s"], 2), _number(x["stall_s"], 2),
            _number(x["async_s"], 2), _number(x["step_ms"]), _number(x["step_meanwhile_ms"]),
        ))  # fmt: skip
    heads = (
        "layout", "ranks", "GB", "disk alone, GB/s", "copy to the host, s", "synchronous, s", "GB/s",
        "training waits if asynchronous, s", "until it is on the disk, s", "step, ms", "step meanwhile, ms",
    )  # fmt: skip
    return _table("Saving weights, masters and moments", heads, rows)


def _resume(records: list[Record]) -> str:
    rows = []
    for r in records:
        x = r.result
        speed = _number(x["gb"] / x["load_s"], 2)
        cells = (_number(x["load_s"], 2), speed, "yes" if x["equal"] else "NO", f"{x['loss_error']:.1e}")
        rows.append((r.task.options["saved"], r.task.label, r.task.world, *cells))
    heads = ("saved under", "taken up under", "ranks", "s", "GB/s", "equal bits", "next loss, relative error")
    return _table("Taken up under other layouts", heads, rows)
