"""A process in which cases run: bounded in memory and time, and watched for what no reader of data ever does."""

from __future__ import annotations

import codecs
import faulthandler
import gc
import json
import os
import resource
import signal
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

from moeconv.errors import MoeconvError
from tests.fuzz.targets import TARGETS

MEMORY_BYTES = 1_300_000_000
CASE_SECONDS = 20
_ROOT = Path(__file__).parents[2]
# Nothing of this happens while data are read, whatever they say.
_NEVER = (
    "exec",
    "compile",
    "pickle.find_class",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "subprocess.Popen",
)
_NEVER_BEGINNING = ("socket.", "ctypes.", "marshal.", "code.")


class HungError(BaseException):
    """A case took longer than it may."""


class Watch:
    """An audit hook, which stays for the life of the process: counts opens outside a folder, and calls of what was never meant."""

    def __init__(self, folder: Path) -> None:
        self._allowed = (str(folder), os.path.realpath(folder))
        self.on = False
        self.escapes: Counter[str] = Counter()
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "open":
            path = args[0]
            if isinstance(path, int):
                return
            text = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else repr(path)
            if os.path.isabs(text) and not os.path.realpath(text).startswith(self._allowed):
                self.escapes[f"open {text[:80]}"] += 1
        elif event == "import":
            if args[0].partition(".")[0] not in sys.stdlib_module_names and args[0] not in sys.modules:
                self.escapes[f"import {args[0]}"] += 1
        elif event in _NEVER or event.startswith(_NEVER_BEGINNING):
            self.escapes[event] += 1


def run(name: str, corpus: Path, seed: int, first: int, last: int, state: Path) -> dict[str, Any]:
    """Run the cases `first` to `last` of a target.

    Args:
        name: the target.
        corpus: the genuine files.
        seed: with the target's name and a case's number it determines the case.
        first: the first case's number.
        last: one past the last.
        state: a file that holds the number of the case that runs, for whoever finds this process dead.

    Returns:
        Counts: cases, refused, accepted; `tracebacks`, `contradictions`, `escapes` by what they are, each with the first
        case's number and how many; peak memory over that at the start, in bytes.
    """
    target, _ = TARGETS[name]
    fd = os.open(state, os.O_WRONLY | os.O_CREAT)
    with tempfile.TemporaryDirectory(dir=corpus.parent) as scratch:
        watch = Watch(corpus.parent)
        for encoding in ("cp437", "raw-unicode-escape", "utf-16", "utf-32", "latin1", "ascii", "idna"):
            codecs.lookup(encoding)  # loaded when it is first used
        case = target(corpus, Path(scratch))
        for index in range(20):  # modules that are loaded late are loaded now
            _outcome(case, Random(f"warm {name} {index}"), {})
        before = _limit()
        signal.signal(signal.SIGALRM, _hung)
        found: dict[str, Any] = {"cases": 0, "refused": 0, "accepted": 0}
        kinds: dict[str, dict[str, list[int]]] = {"tracebacks": {}, "contradictions": {}}
        for index in range(first, last):
            os.pwrite(fd, f"{index:<20}".encode(), 0)
            faulthandler.dump_traceback_later(3 * CASE_SECONDS, exit=True)
            signal.alarm(CASE_SECONDS)
            watch.on = True
            kind = _outcome(case, Random(f"{seed} {name} {index}"), kinds, index)
            watch.on = False
            signal.alarm(0)
            found["cases"] += 1
            found[kind] = found.get(kind, 0) + 1
            if not index % 500:
                gc.collect()
        faulthandler.cancel_dump_traceback_later()
        peak = _resident("VmHWM") - before
        escapes = {what: [first, count] for what, count in watch.escapes.items()}
    os.close(fd)
    return found | kinds | {"escapes": escapes, "peak": peak}


def _outcome(case: Any, rng: Random, kinds: dict[str, dict[str, list[int]]], index: int = 0) -> str:
    try:
        wrong = case(rng)
    except MoeconvError:
        return "refused"
    except HungError as error:
        return _count(kinds, "tracebacks", f"HUNG at {_where(error)}", index)
    except Exception as error:
        return _count(kinds, "tracebacks", f"{type(error).__name__} at {_where(error)}", index)
    if wrong is None:
        return "accepted"
    return _count(kinds, "contradictions", wrong[:120], index)


def _count(kinds: dict[str, dict[str, list[int]]], kind: str, what: str, index: int) -> str:
    kinds.setdefault(kind, {}).setdefault(what, [index, 0])[1] += 1
    return "wrong"


def _where(error: BaseException) -> str:
    """Give the last line of the project's own code that a traceback passed; no source is opened for it."""
    steps = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    own = [step for step in steps if step[0].startswith(str(_ROOT / "moeconv"))]
    file, line = (own or steps)[-1]
    return f"{os.path.relpath(file, _ROOT)}:{line}"


def _limit() -> int:
    """Bound this process's address space, and begin a new peak of resident memory; give what is resident now, in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + MEMORY_BYTES, resource.RLIM_INFINITY))
    Path("/proc/self/clear_refs").write_text("5")
    return _resident("VmRSS")


def _resident(kind: str) -> int:
    """Read resident memory, or its peak, in bytes; the peak that getrusage gives begins with that of the parent."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind))
    return int(line.split()[1]) * 1024


def _hung(number: int, frame: FrameType | None) -> None:
    raise HungError


def main() -> None:
    """Run what the command line says, and print the counts as JSON: target, corpus, seed, first, last, state."""
    name, corpus, seed, first, last, state = sys.argv[1:]
    print(json.dumps(run(name, Path(corpus), int(seed), int(first), int(last), Path(state))))


if __name__ == "__main__":
    main()
