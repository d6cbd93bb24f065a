"""A run's log as curves: read line by line, and again from where it ended while the run goes on."""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moeconv.errors import SourceError
from runtime.log.config import LOG_NAME

_KINDS = ("run", "train", "eval", "note")
_NOT_CURVES = {"kind", "time", "iteration", "num_steps", "layers", "expert_load", "dead", "split"}
LAYER_CURVES = ("load_max_over_mean", "router_entropy", "dropped_share")


def find_log(path: Path) -> Path:
    """Find the log that a path means.

    Args:
        path: the log itself, the folder of --save, or a checkpoint in it.

    Returns:
        The file.

    Raises:
        SourceError: there is none, or several.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise SourceError(f"{path}: no such file or folder; expected a run's log (--log-file) or its --save folder")
    for candidate in (path / LOG_NAME, path.resolve().parent / LOG_NAME):
        if candidate.is_file():
            return candidate
    found = sorted(path.glob("*.jsonl"))
    if len(found) == 1:
        return found[0]
    have = f"; it has {', '.join(p.name for p in found[:5])}: name one of them" if found else ""
    raise SourceError(f"{path}: no {LOG_NAME} in it{have or '; name the file that --log-file said'}")


@dataclass
class Curves:
    """Values that come with an iteration each; a value that is missing is NaN."""

    iteration: array[int] = field(default_factory=lambda: array("q"))
    tokens: array[int] = field(default_factory=lambda: array("q"))
    time: array[float] = field(default_factory=lambda: array("d"))
    values: dict[str, array[float]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.iteration)

    def add(self, iteration: int, tokens: int, time: float, values: Mapping[str, float | None]) -> None:
        """Add a record; those of the same or later iterations were done again and go."""
        self.cut(iteration)
        size = len(self)
        self.iteration.append(iteration)
        self.tokens.append(tokens)
        self.time.append(time)
        for name in values.keys() | self.values.keys():
            column = self.values.get(name)
            if column is None:
                column = self.values[name] = array("d", [float("nan")]) * size
            value = values.get(name)
            column.append(float("nan") if value is None else float(value))

    def cut(self, iteration: int) -> None:
        """Forget the records from an iteration on."""
        while len(self) and self.iteration[-1] >= iteration:
            columns: list[array[Any]] = [self.iteration, self.tokens, self.time, *self.values.values()]
            for column in columns:
                column.pop()


@dataclass
class RunLog:
    """One run: its curves, settings and notes, as far as the file has been read."""

    path: Path
    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    """Dotted name -> value, of the last start."""
    train_iters: int = 0
    train: Curves = field(default_factory=Curves)
    evals: dict[str, Curves] = field(default_factory=dict)
    layers: dict[str, list[array[float]]] = field(default_factory=dict)
    """Name -> for each record of `train` a value a layer."""
    expert_load: list[list[int]] = field(default_factory=list)
    """[L][E] of the last record."""
    dead: list[list[int]] = field(default_factory=list)
    """[layer, expert] of the last record."""
    notes: list[tuple[float, int, str]] = field(default_factory=list)
    """Time, iteration before it, text."""
    starts: list[float] = field(default_factory=list)
    last_time: float = 0.0
    bad_lines: int = 0
    _offset: int = 0

    @property
    def iteration(self) -> int:
        """The last step that is recorded; 0 before the first."""
        return self.train.iteration[-1] if len(self.train) else 0

    def update(self, progress: Callable[[int], None] = lambda done: None) -> bool:
        """Read what has been added to the file; a line that isn't whole yet waits for the next call.

        Args:
            progress: called with the bytes of each line.

        Returns:
            Whether there was anything.

        Raises:
            SourceError: the file can't be read, or is no log of the trainer's.
        """
        lines = 0
        try:
            size = os.stat(self.path).st_size
            if size < self._offset:
                raise SourceError(f"{self.path}: has become shorter while it was read; start the report again")
            with self.path.open("rb") as file:
                file.seek(self._offset)
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    self._offset += len(line)
                    lines += 1
                    self._line(line)
                    progress(len(line))
        except OSError as error:
            raise SourceError(f"{self.path}: can't be read: {error.strerror}") from None
        if lines and not self.starts and not len(self.train):
            raise SourceError(f"{self.path}: no log of the trainer's: none of its {lines} lines is a record of it")
        return lines > 0

    def _line(self, line: bytes) -> None:
        try:
            record = json.loads(line)
            kind = record["kind"]
            if kind in _KINDS:
                getattr(self, f"_{kind}")(record)
                self.last_time = float(record["time"])
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
            self.bad_lines += 1  # torn by a full disk or a crash: the others still tell

    def _run(self, record: dict[str, Any]) -> None:
        settings = dict(flatten(record["settings"]))
        if self.starts:
            changed = [f"{k} {self.settings.get(k)} -> {v}" for k, v in settings.items() if self.settings.get(k) != v]
            text = "started again" + (f", changed: {'; '.join(changed)}" if changed else "")
            self.notes.append((float(record["time"]), self.iteration, text))
        self.starts.append(float(record["time"]))
        self.settings, self.train_iters = settings, int(record.get("train_iters", 0))

    def _train(self, record: dict[str, Any]) -> None:
        values = {name: value for name, value in record.items() if name not in _NOT_CURVES}
        tokens = int(values.pop("consumed_train_tokens", 0))
        self.train.add(int(record["iteration"]), tokens, float(record["time"]), values)
        layers = record.get("layers", {})
        for name in LAYER_CURVES if layers else ():
            rows = self.layers.setdefault(name, [])
            del rows[len(self.train) - 1 :]
            rows.append(array("f", [float("nan") if value is None else value for value in layers[name]]))
        self.expert_load = record.get("expert_load", [])
        self.dead = record.get("dead", [])

    def _eval(self, record: dict[str, Any]) -> None:
        values = {name: record.get(name) for name in ("eval_lm_loss", "eval_perplexity")}
        curves = self.evals.setdefault(str(record["split"]), Curves())
        tokens = int(record.get("consumed_train_tokens", 0))
        curves.add(int(record["iteration"]), tokens, float(record["time"]), values)

    def _note(self, record: dict[str, Any]) -> None:
        self.notes.append((float(record["time"]), self.iteration, str(record["text"])))


def flatten(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Give nested settings as dotted names.

    Args:
        value: the settings.
        prefix: before each name.

    Yields:
        Name and value; lists are values.
    """
    for name, item in value.items():
        if isinstance(item, Mapping):
            yield from flatten(item, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", item


def open_runs(
    paths: Sequence[Path], progress: Callable[[int], Callable[[int], None]] = lambda total: lambda done: None
) -> list[RunLog]:
    """Find and read the logs of runs.

    Args:
        paths: logs, --save folders, or checkpoints in them.
        progress: takes the bytes of all logs, and gives what is called with the bytes of each line.

    Returns:
        The runs, with names that tell them apart.

    Raises:
        SourceError: a log is missing, can't be read, or is none.
    """
    logs = [find_log(path) for path in paths]
    if len({log.resolve() for log in logs}) < len(logs):
        raise SourceError("two of the runs are the same file; name each once")
    runs = [RunLog(log, name) for log, name in zip(logs, _names(logs), strict=True)]
    advance = progress(sum(log.stat().st_size for log in logs))
    for run in runs:
        run.update(advance)
    return runs


def _names(logs: list[Path]) -> list[str]:
    """Call each run by as much of its path's end as tells it from the others."""
    parts = [
        log.resolve().with_suffix("").parts if log.name != LOG_NAME else log.resolve().parent.parts for log in logs
    ]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [str(log) for log in logs]
