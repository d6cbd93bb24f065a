"""Where curves are kept besides the screen. One that is lost is said once, and training goes on without it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, Protocol

from runtime.errors import ConfigError
from runtime.log.config import LogConfig
from runtime.log.records import as_json

Note = Callable[[str], None]
_FINISH_SECONDS = 60.0


class Sink(Protocol):
    """Something that keeps named curves."""

    def add(self, scalars: Mapping[str, float], iteration: int) -> None:
        """Take the numbers of an iteration."""

    def close(self) -> None:
        """Bring what was taken to its place."""


class JsonLines:
    """A file with one JSON object a line, which outlives a disk that is full for a while."""

    def __init__(self, path: Path, note: Note) -> None:
        """Open the file; what is in it stays.

        Args:
            path: the file.
            note: told when lines get lost, and when they are written again.

        Raises:
            ConfigError: it can't be written.
        """
        self.path, self._note, self._failing = path, note, False
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file: IO[str] = path.open("a", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--log-file {path}: can't be written: {error.strerror}") from None

    def write(self, fields: Mapping[str, Any]) -> None:
        """Write a record; a failure is noted, not raised.

        Args:
            fields: the record's names and values.
        """
        try:
            self._file.write(json.dumps(as_json(fields), separators=(",", ":")) + "\n")
            self._file.flush()
        except OSError as error:
            if not self._failing:
                self._failing = True  # first: the note comes back here
                self._note(f"the log {self.path} can't be written ({error.strerror}): training goes on without it")
            return
        if self._failing:
            self._failing = False
            self._note(f"the log {self.path} is written again; some lines before this one may be missing")

    def close(self) -> None:
        """Close the file."""
        try:
            self._file.close()
        except OSError as error:
            self._note(f"the end of the log {self.path} is not written: {error.strerror}")


class Tensorboard:
    """Curves in a tensorboard folder."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ConfigError(
                "--tensorboard-dir: tensorboard is not installed; pip install moeconv[tensorboard]"
            ) from None
        try:
            self._writer: Any = SummaryWriter(str(folder))
        except OSError as error:
            raise ConfigError(f"--tensorboard-dir {folder}: can't be written: {error.strerror}") from None

    def add(self, scalars: Mapping[str, float], iteration: int) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, iteration)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """Curves on Weights & Biases."""

    def __init__(self, project: str, name: str, settings: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError:
            raise ConfigError("--wandb-project: wandb is not installed; pip install moeconv[wandb]") from None
        try:
            self._run: Any = wandb.init(project=project, name=name or None, config=dict(as_json(settings)))
        except (wandb.errors.UsageError, wandb.errors.AuthenticationError) as error:
            raise ConfigError(
                f"--wandb-project: {error}; log in with `wandb login`, or set WANDB_MODE=offline to upload later"
            ) from None

    def add(self, scalars: Mapping[str, float], iteration: int) -> None:
        self._run.log(dict(scalars), step=iteration)

    def close(self) -> None:
        # Without a network the upload is tried again for hours; what is on disk can be sent later with `wandb sync`.
        failure: list[BaseException] = []

        def finish() -> None:
            try:
                self._run.finish()
            except BaseException as error:  # told by whoever waits for this thread
                failure.append(error)

        thread = threading.Thread(target=finish, name="wandb", daemon=True)
        thread.start()
        thread.join(_FINISH_SECONDS)
        if thread.is_alive():
            raise TimeoutError(f"the upload isn't complete after {_FINISH_SECONDS:.0f} s; `wandb sync` sends the rest")
        if failure:
            raise failure[0]


class Guarded:
    """A sink whose failures are noted once and end its use, and not the training."""

    def __init__(self, name: str, make: Callable[[], Sink], note: Note) -> None:
        """Make the sink.

        Args:
            name: for the note.
            make: makes it; only a ConfigError, which the user can mend, gets through.
            note: told once what happened.

        Raises:
            ConfigError: what `make` says about the settings.
        """
        self._name, self._note = name, note
        self._sink: Sink | None = None
        try:
            self._sink = make()
        except ConfigError:
            raise
        except Exception as error:  # whatever a service does, training is worth more
            self._lose(error)

    def add(self, scalars: Mapping[str, float], iteration: int) -> None:
        """Take the numbers of an iteration."""
        if self._sink is not None:
            try:
                self._sink.add(scalars, iteration)
            except Exception as error:
                self._lose(error)

    def close(self) -> None:
        """Bring what was taken to its place."""
        if self._sink is not None:
            try:
                self._sink.close()
            except Exception as error:
                self._lose(error)

    def _lose(self, error: Exception) -> None:
        self._sink = None
        reason = str(error).strip().splitlines()[:1] or [""]
        self._note(f"{self._name} is lost ({type(error).__name__}: {reason[0]}): training goes on without it")


def open_sinks(config: LogConfig, settings: Mapping[str, Any], note: Note) -> list[Guarded]:
    """Open the sinks that a run wants.

    Args:
        config: which.
        settings: the run's, for services that keep them.
        note: told when one is lost.

    Returns:
        The sinks.

    Raises:
        ConfigError: one can't work as it is set.
    """
    sinks = []
    folder, project = config.tensorboard_dir, config.wandb_project
    if folder is not None:
        sinks.append(Guarded("tensorboard", lambda: Tensorboard(folder), note))
    if project is not None:
        sinks.append(Guarded("wandb", lambda: Wandb(project, config.wandb_name, settings), note))
    return sinks
