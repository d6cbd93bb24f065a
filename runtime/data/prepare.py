"""From files of text to one pair of token files: in parallel, in bounded memory, and a stopped run goes on.

Beside the output stands a folder `OUT.parts` with the units that are done, the ids laid end to end so far, and a state
that says how far they are good. Units are joined in order, so the result doesn't depend on the number of processes.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from runtime.data.chat import ChatSpec
from runtime.data.errors import DataError
from runtime.data.indexed import publish, token_dtype
from runtime.data.joined import MESSAGES, Joined, Prepared, write_whole
from runtime.data.kinds import DataFile
from runtime.data.parts import PartReport, Tokenizing, read_report
from runtime.data.pool import num_cores, tokenize
from runtime.data.tokenizer import EncoderSpec
from runtime.data.units import Unit, plan_units

FORMAT = 2
"""Raised when the same input would give other ids."""
_WAIT_SECONDS = 0.5
_SMALL = 1 << 20
"""Bytes of text below which starting processes takes longer than the work."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareOptions:
    """How text is prepared."""

    text_key: str = "text"
    skip_bad_lines: int = 0
    workers: int = 0
    """Processes; 0 is one a core."""


@dataclass(frozen=True, slots=True)
class PrepareProgress:
    """How far tokenizing is."""

    done_bytes: int
    total_bytes: int
    tokens: int
    tokens_per_second: float
    bytes_per_second: float
    waiting: bool = False
    """Another process does the work."""


Spec = EncoderSpec | ChatSpec
"""How texts, or conversations, become ids."""
Report = Callable[[PrepareProgress], None]


def quiet(progress: PrepareProgress) -> None:
    """Show nothing."""


def sidecar(out: Path) -> Path:
    """Give the name of the file that keeps what preparing came to.

    Args:
        out: the .bin file.
    """
    return out.with_suffix(".prepare.json")


def read_prepared(out: Path) -> Prepared | None:
    """Read what preparing a token file came to; None for one that wasn't made here."""
    try:
        values = json.loads(sidecar(out).read_text(encoding="utf8"))
        return Prepared(**{**values, "messages": tuple(values["messages"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def prepare(
    files: Sequence[DataFile], out: Path, spec: Spec, options: PrepareOptions, report: Report = quiet
) -> Prepared:
    """Tokenize files into `out` and its .idx file, or go on with what a stopped run left.

    Args:
        files: files of text, in order.
        out: the .bin file to make; its folder exists.
        spec: how texts, or conversations, become ids.
        options: settings.
        report: told about once a second how far it is.

    Returns:
        What it came to.

    Raises:
        DataError: a line is no document, a file is damaged, the disk is full, another process writes the same output, or
            what was left was of other input. What is done is kept.
    """
    with locked(out) as mine:
        if not mine:
            raise DataError(f"{out}: another process is preparing it")
        return _prepare(files, out, spec, options, report)


def prepare_once(
    files: Sequence[DataFile],
    out: Path,
    make_spec: Callable[[], Spec],
    options: PrepareOptions,
    report: Report = quiet,
) -> None:
    """Make sure that `out` is there: whoever comes first makes it, all others wait for it however long it takes.

    No collective is involved: processes meet at a lock of the file system, which the system lets go of when its holder
    dies. Then another goes on with what is done.

    Args:
        files: files of text, in order.
        out: the .bin file.
        make_spec: gives how texts, or conversations, become ids; called only where something is to be done.
        options: settings.
        report: told about once a second how far it is.

    Raises:
        DataError: as `prepare`.
    """
    while not (out.is_file() and out.with_suffix(".idx").is_file()):
        with locked(out) as mine:
            if mine:
                if not out.is_file():
                    _prepare(files, out, make_spec(), options, report)
                return
        report(PrepareProgress(0, 0, 0, 0.0, 0.0, waiting=True))
        time.sleep(_WAIT_SECONDS)


@contextmanager
def locked(out: Path) -> Iterator[bool]:
    """Hold an output's lock.

    Args:
        out: the .bin file.

    Yields:
        Whether this process has it; another has it otherwise.

    Raises:
        DataError: the folder can't be written.
    """
    path = out.with_suffix(".lock")
    try:
        file = open(path, "a")  # noqa: SIM115  (kept open: it holds the lock)
    except OSError as error:
        raise DataError(
            f"{path.parent}: can't be written: {error.strerror or error}; name another folder (--data-cache-path)"
        ) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True
        if out.is_file():  # after a failure it stays: who waits for it must find the same file
            path.unlink(missing_ok=True)


def _prepare(files: Sequence[DataFile], out: Path, spec: Spec, options: PrepareOptions, report: Report) -> Prepared:
    folder = out.with_suffix(".parts")
    dtype = token_dtype(spec.num_values)
    try:
        folder.mkdir(exist_ok=True)
        _check_identity(folder, _identity(files, spec, options, dtype))
        joined = Joined(folder, dtype, options.skip_bad_lines)
        with joined:
            _run(files, folder, spec, options, dtype, joined, report)
            result = replace(joined.finish(out), text_key=options.text_key, eod=spec.eod, vocab_size=spec.vocab_size)
        if result.tokens == 0:
            shutil.rmtree(folder)
            raise DataError(f"{files[0].path}: no {_what(spec)} in the {len(files)} file(s) given")
        write_whole(sidecar(out), json.dumps(asdict(result), indent=1))
        publish(folder / "tokens.bin", folder / "index.idx", out)
        shutil.rmtree(folder)
        return result
    except OSError as error:
        if error.filename is not None and folder not in Path(error.filename).parents:
            raise DataError(f"{error.filename}: can't be read: {error.strerror or error}") from None
        raise DataError(
            f"{folder}: can't be written: {error.strerror or error}; make room or name another place, then start again: "
            "what is done is kept"
        ) from None


def _what(spec: Spec) -> str:
    return "conversation from which something is learned" if isinstance(spec, ChatSpec) else "text"


def _run(
    files: Sequence[DataFile],
    folder: Path,
    spec: Spec,
    options: PrepareOptions,
    dtype: np.dtype[np.generic],
    joined: Joined,
    report: Report,
) -> None:
    """Tokenize what isn't done yet, and join what is."""
    kept = {int(path.stem) for path in folder.glob("[0-9]*.json")}
    done = {index for index in kept if index >= joined.next and read_report(folder, index) is not None}
    meter = _Meter(sum(file.path.stat().st_size for file in files), joined.nbytes, report)
    count = 0

    def missing() -> Iterator[Unit]:
        nonlocal count
        for unit in plan_units(files):
            count = unit.index + 1
            if unit.index >= joined.next and unit.index not in done:
                yield unit

    how = Tokenizing(options.text_key, dtype.name, MESSAGES)
    workers = options.workers or num_cores()
    if sum(file.path.stat().st_size for file in files) < _SMALL:
        workers = 1
    joined.join(done)
    for part in tokenize(missing(), spec, how, folder, workers):
        if part is not None:
            done.add(part.index)
            meter.add(part)
            joined.join(done)
        meter.show()
    joined.join(done)
    assert joined.next == count, "every unit is joined"


def _identity(
    files: Sequence[DataFile], spec: Spec, options: PrepareOptions, dtype: np.dtype[np.generic]
) -> dict[str, Any]:
    stats = [(file.path.resolve(), file.path.stat()) for file in files]
    return {
        "format": FORMAT,
        "files": [[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in stats],
        **spec.identity,
        "text key": options.text_key,
        "type of ids": dtype.name,
    }


def _check_identity(folder: Path, identity: dict[str, Any]) -> None:
    path = folder / "plan.json"
    try:
        before = json.loads(path.read_text(encoding="utf8"))
    except (OSError, ValueError):
        write_whole(path, json.dumps(identity))
        return
    changed = [name for name in identity if before.get(name) != identity[name]]
    if changed:
        raise DataError(
            f"{folder}: was begun with other {', '.join(changed)}; remove it to start anew, or restore what it was begun with"
        )


class _Meter:
    """Counts what this run does, and tells it about once a second."""

    def __init__(self, total: int, done: int, report: Report) -> None:
        self._total, self._done, self._tell = total, done, report
        self._tokens, self._before = 0, done
        self._begin = self._last = time.monotonic()

    def add(self, part: PartReport) -> None:
        self._done += part.nbytes
        self._tokens += sum(part.lengths)

    def show(self) -> None:
        now = time.monotonic()
        if now - self._last >= 1.0:
            self._last = now
            seconds = now - self._begin
            done = min(self._done, self._total)
            rates = (self._tokens / seconds, (done - self._before) / seconds)
            self._tell(PrepareProgress(done, self._total, self._tokens, *rates))
