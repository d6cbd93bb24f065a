"""Commands timed beside `cp -r` of what they read, like for like: what the benchmarks of conversions share.

A conversion runs in turns with a `cp -r` of the very folder that it reads, first and second alternately, each into a new folder that
is removed before the next, and the ratio is that of each pair, of which the median counts. `cp -r` returns before its bytes are on
disk, and so do conversions with --no-sync; those that wait for the disk are set beside `cp -r; sync`. Before each command, outside of
the time: what is left to write goes to the disk, of the big files only those that it reads are in the page cache, and memory of their
size is written and freed. Without this a copy of the same bytes takes one to three times as long, after how much else the page cache
holds. Processor seconds are those of the command and what it started.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moeconv.io.carried import CarriedFile

MOECONV = [sys.executable, "-m", "cli"]

# A process's peak begins with that of the process that started it, so a small one stands between. It measures as GNU time
# does: the highest of the command and of the processes that it waited for.
LAUNCHER = """
import resource, subprocess, sys, time
begin = time.perf_counter()
code = subprocess.call(sys.argv[1:], stdout=subprocess.DEVNULL)
seconds = time.perf_counter() - begin
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(code, seconds, used.ru_utime + used.ru_stime, used.ru_maxrss)
"""


@dataclass
class Row:
    """What was measured of one command: seconds of each run, by the clock and of processors, and the highest resident memory in bytes."""

    name: str
    nbytes: int
    seconds: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    memory: int = 0
    prime: Path | None = None
    """A folder to copy and delete first: memory that was just freed is faster to fill, and so each command finds as much."""

    def run(self, command: list[str]) -> None:
        """Run a command and add what it took.

        Raises:
            RuntimeError: it failed.
        """
        os.sync()
        if self.prime is not None:
            scratch = self.prime.with_name("scratch")
            shutil.copytree(self.prime, scratch)
            shutil.rmtree(scratch)
            os.sync()
        launched = [sys.executable, "-I", "-S", "-c", LAUNCHER, *command]
        output = subprocess.run(
            launched, stdout=subprocess.PIPE, text=True, check=True, cwd=Path(__file__).parent.parent
        ).stdout
        code, seconds, processor, kib = output.split()
        if code != "0":
            raise RuntimeError(f"{' '.join(command)} failed with exit code {code}")
        self.seconds.append(float(seconds))
        self.processor.append(float(processor))
        self.memory = max(self.memory, int(kib) * 1024)
        print(f"{self.name}: {float(seconds):.2f} s", file=sys.stderr, flush=True)


def in_turns(
    name: str,
    source: Path,
    out: Path,
    command: list[str],
    nbytes: int,
    rounds: int,
    check: Callable[[], None] = lambda: None,
    *,
    synced: bool = False,
) -> dict[str, Any]:
    """Run a conversion and a `cp -r` of what it reads in turns.

    Args:
        name: the conversion's name, for what is printed on the way.
        source: the folder that both read; its files are in the page cache (`only_cached`).
        out: the folder that both write.
        command: the conversion.
        nbytes: the bytes of the source.
        rounds: how often.
        check: looks at what the conversion wrote; leaves the page cache as it was.
        synced: whether the conversion waits for the disk: then the copy does, too.

    Returns:
        Medians of both, and of the ratios of each round.
    """
    copying = ["cp", "-r", str(source), str(out)]
    if synced:
        copying = ["sh", "-c", f"cp -r '{source}' '{out}' && sync -f '{out}'"]
    copy, own = Row(f"{name}, cp -r", nbytes, prime=source), Row(name, nbytes, prime=source)
    for number in range(rounds):
        for row in (copy, own) if number % 2 == 0 else (own, copy):
            row.run(command if row is own else copying)
            if row is own:
                check()
            if out.exists():  # a command that only reads leaves none
                shutil.rmtree(out)
    ratios = [mine / theirs for mine, theirs in zip(own.seconds, copy.seconds, strict=True)]
    return {
        "seconds": round(statistics.median(own.seconds), 2),
        "cp_seconds": round(statistics.median(copy.seconds), 2),
        "ratio_to_cp": round(statistics.median(ratios), 2),
        "ratios": [round(ratio, 2) for ratio in ratios],
        "processor_seconds_per_gb": round(statistics.median(own.processor) / nbytes * 1e9, 2),
        "cp_processor_seconds_per_gb": round(statistics.median(copy.processor) / nbytes * 1e9, 2),
        "peak_mb": round(own.memory / 1e6),
    }


def digests(folder: Path) -> dict[str, str]:
    """Give the checksum of each file under a folder, by its path there."""
    files = _files(folder)
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda file: CarriedFile(file, file.stat().st_size).copy(lambda _: None), files)
        return {str(file.relative_to(folder)): digest for file, digest in zip(files, found, strict=True)}


def only_cached(folder: Path, *others: Path) -> None:
    """Have the files of one folder in the page cache, read from the disk, and none of others'."""
    os.sync()
    for file in (file for place in (folder, *others) for file in _files(place)):
        with open(file, "rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    digests(folder)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@contextmanager
def compiled_modules(folder: Path) -> Iterator[None]:
    """Have Python's modules compiled, as those of an installed package are: kept under a folder for the commands that are run."""
    before = {name: os.environ.get(name) for name in ("PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX")}
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["PYTHONPYCACHEPREFIX"] = str(folder / "compiled")
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})
