"""What people see of a run: a line an interval, and on a terminal a bar below it."""

from __future__ import annotations

import contextlib
import math
from typing import IO, Any

from runtime.log.dead_experts import describe
from runtime.log.records import EvalRecord, IntervalRecord


def interval_line(record: IntervalRecord, train_iters: int) -> str:
    """Write the numbers of an interval in one line.

    Args:
        record: the numbers.
        train_iters: the run's last iteration.

    Returns:
        The line; what is unknown or can't be is left out.
    """
    value = {name: math.nan if number is None else number for name, number in record.scalars.items()}
    parts = [f"iteration {record.iteration}/{train_iters}"]

    def add(name: str, text: str, *, always: bool = True) -> None:
        if name in record.scalars and record.scalars[name] is not None and (always or value[name]):
            parts.append(text.format(value[name]))

    if "aux_loss" in value:  # without further losses the two are one
        add("loss", "loss {:.6f}")
    add("lm_loss", "lm loss {:.6f}")
    add("aux_loss", "aux loss {:.4f}")
    add("z_loss", "z loss {:.4f}")
    add("grad_norm", "grad norm {:.4f}")
    add("learning_rate", "lr {:.3e}")
    add("tokens_per_second", "{:.0f} tokens/s")
    add("tflops_per_gpu", "{:.4g} TFLOP/s/GPU")
    add("mfu", "MFU {:.1%}")
    add("step_seconds", "{:.3g} s/step")
    add("data_wait", "data wait {:.1%}")
    add("memory_gb", "memory {:.2f} GB")
    add("load_max_over_mean", "expert load max/mean {:.2f}")
    add("rank_load", "rank load max/mean {:.2f}")
    add("dropped_share", "dropped {:.2%}")
    add("router_entropy", "router entropy {:.3f}")
    add("nonfinite_logits", "NON-FINITE ROUTER LOGITS {:.0f}", always=False)
    add("skipped_steps", "skipped {:.0f}", always=False)
    add("repeated_steps", "done twice {:.0f}", always=False)
    if record.dead_experts:
        parts.append(f"dead experts {sum(map(len, record.dead_experts.values()))}")
    for name in ("params_norm", "num_zeros", "global_batch_size"):
        add(name, name.replace("_", " ") + " {:.8g}")
    if record.scalars.get("eta_seconds") is not None:
        parts.append(f"ETA {duration(value['eta_seconds'])}")
    return " | ".join(parts)


def layer_lines(record: IntervalRecord) -> list[str]:
    """Write the numbers of each layer's router, a line a layer.

    Args:
        record: the numbers.

    Returns:
        The lines; layers without experts have none.
    """
    lines = []
    for number, row in enumerate(record.expert_load):
        if sum(row):
            values = {name: values[number] for name, values in record.layers.items()}
            text = " | ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in values.items())
            dead = record.dead_experts.get(number)
            lines.append(f"  layer {number} | {text}" + (f" | dead {describe({number: list(dead)})}" if dead else ""))
    return lines


def evaluation_line(record: EvalRecord) -> str:
    """Write the result of an evaluation in one line."""
    bits = "" if record.bits_per_byte is None else f"bits per byte {record.bits_per_byte:.4f} | "
    return (
        f"{record.split} at iteration {record.iteration} | lm loss {record.lm_loss:.6f} | "
        f"perplexity {record.perplexity:.4f} | {bits}{record.tokens} tokens in {record.seconds:.1f} s"
    )


def duration(seconds: float) -> str:
    """Write a time as people read it, such as 2 d 03:04:05."""
    if not math.isfinite(seconds):
        return "?"
    days, rest = divmod(round(seconds), 86400)
    clock = f"{rest // 3600}:{rest // 60 % 60:02d}:{rest % 60:02d}"
    return f"{days} d {clock}" if days else clock


class Screen:
    """Standard output: lines, and a bar of the run's steps where it is a terminal."""

    def __init__(self, out: IO[str], train_iters: int, *, bar: bool) -> None:
        """Begin with lines alone.

        Args:
            out: where to print.
            train_iters: the run's last iteration.
            bar: whether a bar is wanted; there is none off a terminal.
        """
        self._out, self._train_iters = out, train_iters
        self._wanted = bar and train_iters > 0 and out.isatty()
        self._bar: Any = None

    def line(self, text: str) -> None:
        """Print a line; a reader that is gone ends nothing."""
        with contextlib.suppress(OSError, ValueError):
            if self._bar is not None:
                self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
            else:
                print(text, file=self._out, flush=True)

    def step(self, iteration: int, lm_loss: float, tokens_per_second: float) -> None:
        """Move the bar.

        Args:
            iteration: the step that is done.
            lm_loss: of the step.
            tokens_per_second: of the step.
        """
        if not self._wanted:
            return
        with contextlib.suppress(OSError, ValueError):
            if self._bar is None:
                self._bar = self._start(iteration)
            self._bar.update(self._task, completed=iteration, loss=f"{lm_loss:.4f}", speed=f"{tokens_per_second:.0f}")

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            with contextlib.suppress(OSError, ValueError):
                self._bar.stop()
            self._bar = None

    def _start(self, iteration: int) -> Any:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]} | {task.fields[speed]} tokens/s | left"),
            TimeRemainingColumn(),
        )
        console = Console(file=self._out)
        bar = Progress(*columns, console=console, transient=True, refresh_per_second=4, redirect_stderr=False)
        self._task = bar.add_task("training", total=self._train_iters, completed=iteration, loss="", speed="")
        bar.start()
        return bar
