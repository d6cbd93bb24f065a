"""What a search found, as JSON and as lines for people."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Any

from runtime.estimate.describe import GB, as_json, layout_name, notes, recompute_name
from runtime.estimate.flags import trainer_flags
from runtime.estimate.search import Found
from runtime.estimate.step import Estimate


def found_json(found: Found) -> dict[str, Any]:
    """Give all numbers of a search's layouts as JSON values."""
    return {
        "layouts": [as_json(estimate) for estimate in found.best],
        "tried": found.tried,
        "left_out": dict(found.reasons),
        "smallest": as_json(found.smallest) if found.smallest is not None and not found.best else None,
    }


def found_lines(found: Found, seconds: float) -> Iterator[str]:
    """Give a table of the layouts, and why others are not in it.

    Args:
        found: what was found.
        seconds: how long it took.

    Yields:
        The lines.
    """
    if found.best:
        yield from _table(found)
    left = "; ".join(f"{count:,} {reason}" for reason, count in found.reasons.items())
    yield f"{found.tried:,} tried in {seconds:.1f} s; left out: {left or 'none'}"
    if not found.best and found.host is not None:
        yield (
            f"NOTHING FITS: what fits the GPUs keeps at least {found.host / GB:.1f} GB in a machine's memory, which is more than "
            "--host-memory says"
        )
    elif not found.best and found.smallest is not None:
        least = found.smallest
        yield (
            f"NOTHING FITS: the smallest is {layout_name(least.setup)} with {least.peak / GB:.1f} GB a GPU, of which "
            f"{least.memory[least.fullest].state.total / GB:.1f} GB are weights, gradients, masters and moments; a run can "
            f"use {least.machine.memory / GB:.1f} GB"
        )
    if found.best:
        best = found.best[0]
        yield from (f"note: {note}" for note in dict.fromkeys(n for e in found.best for n in notes(e)))
        yield ""
        yield f"flags of the first: {shlex.join(trainer_flags(best.setup))}"


def _on_host(best: Estimate) -> str:
    if not best.setup.optim.on_host:
        return ""
    return (
        f", masters and moments in the machines' memory ({best.host / GB:.0f} GB of the fullest under the first layout)"
    )


def _table(found: Found) -> Iterator[str]:
    setup = found.best[0].setup
    yield (
        f"{setup.model.family.name} on {setup.world_size} x {found.best[0].machine.gpu}, {setup.global_batch_size} sequences "
        f"of {setup.seq_length} tokens a step, moments in {setup.optim.moments_dtype}{_on_host(found.best[0])}"
    )
    yield ""
    heads = ("micro-batch", "recomputed", "ms", "tokens/s a GPU", "used", "waiting", "exposed", "peak GB", "on host")
    widths = (11, 12, 9, 14, 6, 7, 7, 7, 7)
    columns = list(zip(heads, widths, strict=True))[: None if setup.optim.on_host else -1]
    width = max(len(layout_name(e.setup)) for e in found.best)
    yield "layout".ljust(width) + "".join("  " + head.rjust(n) for head, n in columns)
    for e in found.best:
        used = e.utilization
        cells = (
            f"{e.setup.micro_batch_size} x {e.setup.num_microbatches}",
            recompute_name(e.setup),
            f"{e.seconds * 1e3:,.0f}",
            f"{e.tokens_per_second / e.setup.world_size:,.0f}",
            f"{used:.1%}" if used is not None else "",
            f"{e.bubble:.1%}",
            f"{e.exposed / e.seconds:.1%}",
            f"{e.peak / GB:.1f}",
            f"{e.setup.optim.on_host:.0%}",
        )
        yield layout_name(e.setup).ljust(width) + "".join(
            "  " + c.rjust(n) for c, (_, n) in zip(cells, columns, strict=False)
        )
    yield ""
