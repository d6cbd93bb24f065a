"""Takes a run's numbers and brings them wherever they are wanted: the screen, JSON Lines, TensorBoard, Weights & Biases."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import IO, Any

from runtime.log.config import LogConfig
from runtime.log.dead_experts import DeadExperts
from runtime.log.records import EvalRecord, IntervalRecord, Speed, StepRecord, summarize
from runtime.log.screen import Screen, evaluation_line, interval_line, layer_lines
from runtime.log.sinks import JsonLines, open_sinks

LOG_VERSION = 1


class MetricLog:
    """The log of a run, on the one rank that writes it."""

    def __init__(
        self,
        config: LogConfig,
        *,
        train_iters: int,
        interval: int,
        settings: Mapping[str, Any],
        speed: Speed | None = None,
        out: IO[str] | None = None,
    ) -> None:
        """Open everything that is wanted.

        Args:
            config: what is wanted.
            train_iters: the run's last iteration.
            interval: steps of a record.
            settings: the run's, kept in the log so that runs can be compared.
            speed: to tell TFLOP/s and MFU; None leaves them unknown.
            out: instead of standard output.

        Raises:
            ConfigError: something that is wanted can't be written or is not installed.
        """
        self._config, self._train_iters, self._interval, self._speed = config, train_iters, interval, speed
        self._screen = Screen(out or sys.stdout, train_iters, bar=config.progress_bar)
        self._file = JsonLines(config.file, self._screen.line) if config.file is not None else None
        self._steps: list[StepRecord] = []
        self.seconds: list[float] = []
        """Of each step so far."""
        self.memory = 0
        """Bytes at the highest peak of a step so far."""
        self.rank_loads: list[float] = []
        """Of each step so far, with expert parallelism: rows of the fullest rank of experts, of the mean."""
        self._dead = DeadExperts(config.dead_expert_steps)
        self._clock: tuple[int, float] | None = None
        self._write("run", version=LOG_VERSION, train_iters=train_iters, settings=settings)
        self._sinks = open_sinks(config, settings, self.note)

    def count_flops(self, flops_per_token: float) -> None:
        """Say how much arithmetic a token is, where that is known only once the data are open."""
        if self._speed is not None:
            self._speed = replace(self._speed, flops_per_token=flops_per_token)

    def note(self, text: str) -> None:
        """Print and keep a line for people."""
        self._screen.line(text)
        self._write("note", text=text)

    def step(self, record: StepRecord) -> None:
        """Take a step; every `interval` steps their record goes everywhere.

        Args:
            record: the step's numbers.
        """
        now = time.monotonic()
        if self._clock is None:
            self._clock = (record.iteration, now)  # the first step is slower than the others
        self._steps.append(record)
        self.seconds.append(record.seconds)
        self.memory = max(self.memory, record.memory_bytes)
        self._screen.step(record.iteration, record.lm_loss, record.num_tokens / max(record.seconds, 1e-9))
        if record.routing is not None:
            self._dead.step(record.routing.load_LE)
            if record.routing.num_ranks > 1:
                self.rank_loads.append(record.routing.rank_load)
        if record.iteration % self._interval == 0 or record.iteration == self._train_iters:
            self.flush()

    def flush(self) -> None:
        """Bring out the record of the steps since the last one, if there are any."""
        if not self._steps:
            return
        steps, self._steps = self._steps, []
        record = summarize(steps, self._speed, self._eta(steps[-1].iteration))
        if record.expert_load:
            dead = self._dead.dead()
            count = sum(map(len, dead.values()))
            record = replace(record, dead_experts=dead, scalars=dict(record.scalars) | {"dead_experts": count})
        self._screen.line(interval_line(record, self._train_iters))
        if self._config.per_layer_logging:
            for line in layer_lines(record):
                self._screen.line(line)
        self._keep(record)
        for line in self._dead.news():
            self.note(line)

    def evaluation(self, record: EvalRecord) -> None:
        """Keep and print the result of an evaluation.

        Args:
            record: the evaluation's numbers.
        """
        self._screen.line(evaluation_line(record))
        place = {"iteration": record.iteration, "consumed_train_tokens": record.consumed_tokens}
        self._write("eval", split=record.split, **place, **record.scalars())
        for sink in self._sinks:
            sink.add({f"{record.split}/{name}": value for name, value in record.scalars().items()}, record.iteration)

    def close(self) -> None:
        """Write out what is left and close files and services."""
        self.flush()
        self._screen.close()
        for sink in self._sinks:
            sink.close()
        if self._file is not None:
            self._file.close()

    def _keep(self, record: IntervalRecord) -> None:
        layers: dict[str, Any] = {}
        if record.expert_load:
            # Five digits are enough for a picture, and the file grows by layers x steps.
            short = {name: [float(f"{v:.5g}") for v in values] for name, values in record.layers.items()}
            layers = {"layers": short, "expert_load": record.expert_load}
            layers["dead"] = [[layer, expert] for layer, experts in record.dead_experts.items() for expert in experts]
        known = {"iteration": record.iteration, "num_steps": record.num_steps}
        self._write("train", **known, **record.scalars, **layers)
        curves = {f"train/{name}": value for name, value in record.scalars.items() if value is not None}
        if self._config.per_layer_logging:
            curves |= {f"train/{name}": value for name, value in record.layer_scalars().items()}
        for sink in self._sinks:
            sink.add(curves, record.iteration)

    def _write(self, kind: str, **fields: Any) -> None:
        if self._file is not None:
            self._file.write({"kind": kind, "time": time.time(), **fields})

    def _eta(self, iteration: int) -> float | None:
        """Seconds until the last iteration at the pace since the first one, evaluations and saves included."""
        if self._clock is None or iteration <= self._clock[0]:
            return None
        pace = (time.monotonic() - self._clock[1]) / (iteration - self._clock[0])
        return pace * max(self._train_iters - iteration, 0)
