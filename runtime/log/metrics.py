"""A run's numbers: lines for people, JSONL, tensorboard, Weights & Biases."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

from runtime.errors import ConfigError
from runtime.log.config import LogConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRecord:
    """The numbers of one optimizer step."""

    iteration: int
    """Counts from 1."""
    consumed_train_samples: int
    """Sequences of all steps up to this one."""
    lm_loss: float
    """Mean cross entropy, nats a token."""
    aux_loss: float
    """Load-balancing loss without its coefficient, mean over layers; 1.0 is balanced."""
    z_loss: float
    """Router z-loss without its coefficient, mean over layers."""
    grad_norm: float
    """Global L2 norm before clipping."""
    learning_rate: float
    skipped: bool
    """The step had a NaN or inf and was left out."""
    seconds: float
    tokens_per_second: float
    expert_load: list[list[int]]
    """[layers with experts][experts]: tokens sent to each expert in the step; empty for a dense model."""
    measured: dict[str, float] = field(default_factory=dict)
    """What was measured beside the step, by name: params_norm, num_zeros."""

    @property
    def load_max_over_mean(self) -> float:
        """The most loaded expert's tokens over the mean, in the layer where that is largest; 1.0 is balanced."""
        ratios = [max(row) * len(row) / sum(row) for row in self.expert_load if sum(row)]
        return max(ratios, default=math.nan)

    def as_json(self) -> dict[str, Any]:
        """Give the record as the log file has it; numbers that JSON lacks become null."""
        fields = {name: getattr(self, name) for name in self.__slots__ if name != "measured"} | self.measured
        fields["expert_load_max_over_mean"] = self.load_max_over_mean
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in fields.items()}

    def scalars(self) -> dict[str, float]:
        """Give the record as named curves."""
        names = ("lm_loss", "aux_loss", "z_loss", "grad_norm", "learning_rate", "tokens_per_second")
        return {f"train/{name}": getattr(self, name) for name in names} | {
            "train/expert_load_max_over_mean": self.load_max_over_mean,
            **{f"train/{name}": value for name, value in self.measured.items()},
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalRecord:
    """The result of an evaluation."""

    iteration: int
    split: str
    lm_loss: float
    """Mean cross entropy, nats a token."""
    tokens: int
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """Give the record as the log file has it."""
        keys = {"lm_loss": "eval_lm_loss", "tokens": "eval_tokens"}
        return {keys.get(name, name): getattr(self, name) for name in self.__slots__}

    def scalars(self) -> dict[str, float]:
        """Give the record as named curves."""
        return {f"{self.split}/lm_loss": self.lm_loss}


class Sink(Protocol):
    """Something that keeps named curves."""

    def add(self, scalars: dict[str, float], iteration: int) -> None:
        """Take the numbers of an iteration."""

    def close(self) -> None:
        """Bring what was taken to its place."""


class Tensorboard:
    """Curves in a tensorboard folder."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ConfigError(
                "--tensorboard-dir: tensorboard is not installed; pip install moeconv[tensorboard]"
            ) from None
        self._writer: Any = SummaryWriter(str(folder))

    def add(self, scalars: dict[str, float], iteration: int) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, iteration)

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """Curves on Weights & Biases."""

    def __init__(self, project: str, name: str, settings: dict[str, Any]) -> None:
        try:
            import wandb
        except ImportError:
            raise ConfigError("--wandb-project: wandb is not installed; pip install moeconv[wandb]") from None
        self._run: Any = wandb.init(project=project, name=name or None, config=settings)

    def add(self, scalars: dict[str, float], iteration: int) -> None:
        self._run.log(scalars, step=iteration)

    def close(self) -> None:
        self._run.finish()


class MetricLog:
    """Takes the records of one process and writes them wherever they are wanted."""

    def __init__(
        self,
        config: LogConfig,
        *,
        train_iters: int,
        interval: int,
        settings: dict[str, Any],
        out: IO[str] | None = None,
    ) -> None:
        self._train_iters, self._interval = train_iters, interval
        self._out = out or sys.stdout
        self._since: list[StepRecord] = []
        self._sinks: list[Sink] = []
        if config.tensorboard_dir is not None:
            self._sinks.append(Tensorboard(config.tensorboard_dir))
        if config.wandb_project is not None:
            self._sinks.append(Wandb(config.wandb_project, config.wandb_name, settings))
        self._file: IO[str] | None = None
        if config.file is not None:
            try:
                config.file.parent.mkdir(parents=True, exist_ok=True)
                self._file = config.file.open("a", encoding="utf-8")
            except OSError as error:
                raise ConfigError(f"--log-file {config.file}: can't be written: {error.strerror}") from None

    def note(self, text: str) -> None:
        """Print a line for people."""
        print(text, file=self._out, flush=True)

    def step(self, record: StepRecord) -> None:
        """Keep a step; every `interval` steps print a line with their means.

        Args:
            record: the step's numbers.
        """
        self._write(record.as_json())
        self._since.append(record)
        if record.iteration % self._interval == 0 or record.iteration == self._train_iters:
            self._print(self._since)
            for sink in self._sinks:
                sink.add(record.scalars(), record.iteration)
            self._since = []

    def evaluation(self, record: EvalRecord) -> None:
        """Keep and print the result of an evaluation.

        Args:
            record: the evaluation's numbers.
        """
        self._write(record.as_json())
        self.note(
            f"{record.split} at iteration {record.iteration} | lm loss {record.lm_loss:.6f} | "
            f"{record.tokens} tokens in {record.seconds:.1f} s"
        )
        for sink in self._sinks:
            sink.add(record.scalars(), record.iteration)

    def close(self) -> None:
        """Write out what is left and close files and services."""
        for sink in self._sinks:
            sink.close()
        if self._file is not None:
            self._file.close()

    def _write(self, fields: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(fields) + "\n")
            self._file.flush()

    def _print(self, records: list[StepRecord]) -> None:
        last = records[-1]
        done = [r for r in records if not r.skipped]
        seconds = sum(r.seconds for r in records)
        tokens = sum(r.tokens_per_second * r.seconds for r in records)

        def mean(name: str) -> float:
            return sum(getattr(r, name) for r in done) / len(done) if done else math.nan

        parts = [
            f"iteration {last.iteration}/{self._train_iters}",
            f"lm loss {mean('lm_loss'):.6f}",
            f"grad norm {mean('grad_norm'):.4f}",
            f"lr {last.learning_rate:.3e}",
            f"{tokens / seconds if seconds else 0:.0f} tokens/s",
            f"{1000 * seconds / len(records):.0f} ms/step",
        ]
        if last.expert_load:
            parts.insert(2, f"aux loss {mean('aux_loss'):.4f}")
            parts.append(f"expert load max/mean {last.load_max_over_mean:.2f}")
        parts += [f"{name.replace('_', ' ')} {value:.8g}" for name, value in last.measured.items()]
        if len(done) < len(records):
            parts.append(f"skipped {len(records) - len(done)}")
        self.note(" | ".join(parts))
