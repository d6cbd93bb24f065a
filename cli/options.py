"""What commands share: options for degrees and runs, sizes such as 5GB, and the progress bar."""

from __future__ import annotations

import json
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import click

from cli.main import ExitCode
from moeconv.convert import Options
from moeconv.execute import Progress
from moeconv.layout.degrees import Degrees

_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


class ByteSize(click.ParamType[int]):
    """A number of bytes with an optional unit, such as 5GB or 512MiB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Read the text of a size.

        Args:
            value: the text, or bytes as a number.
            param: the option, for the message.
            ctx: the command, for the message.

        Returns:
            The number of bytes.
        """
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]{1,18})?)\s*([A-Za-z]*)", value)
        if found is None or found[2].upper() not in _UNITS:
            self.fail(f"{value[:40]!r} is no size; give for example 5GB or 512MiB", param, ctx)
        size = int(float(found[1]) * _UNITS[found[2].upper()])
        if size < 1:
            self.fail(f"{value[:40]!r} is less than a byte", param, ctx)
        return size


class LayerCounts(click.ParamType[tuple[int, ...]]):
    """Numbers of layers, separated by commas."""

    name = "counts"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """Read the text of a list.

        Args:
            value: the text, such as 9,8,8,7.
            param: the option, for the message.
            ctx: the command, for the message.

        Returns:
            The numbers.
        """
        if isinstance(value, tuple):
            return value
        if not re.fullmatch(r"[0-9]{1,9}(,[0-9]{1,9})*", value):
            self.fail(f"{value[:40]!r} is no list of layer counts; give for example 9,8,8,7", param, ctx)
        return tuple(map(int, value.split(",")))


def degree_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the degrees of parallelism to a command."""
    degree = click.IntRange(1)
    for option in (
        click.option("--pp-layers", type=LayerCounts(), help="Layers of each stage, where they don't divide: 9,8,8,7."),
        click.option("--etp", type=degree, help="Tensor parallel degree inside an expert; by default that of --tp."),
        click.option("--ep", type=degree, default=1, help="Expert parallel degree."),
        click.option("--vpp", type=degree, default=1, help="Virtual pipeline stages a rank."),
        click.option("--pp", type=degree, default=1, help="Pipeline parallel degree."),
        click.option("--tp", type=degree, default=1, help="Tensor parallel degree."),
    ):
        command = option(command)
    return command


def degrees(options: dict[str, Any]) -> Degrees:
    """Make the degrees from a command's options."""
    return Degrees(
        tp=options["tp"],
        pp=options["pp"],
        vpp=options["vpp"],
        ep=options["ep"],
        etp=options["etp"] or 0,
        pp_layers=options["pp_layers"],
    )


def run_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add what every conversion has: workers, resume, waiting for the disk, dry run, JSON."""
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object."),
        click.option("--dry-run", is_flag=True, help="Check and plan everything; write nothing."),
        click.option("--sync/--no-sync", default=True, help="Wait until the bytes are on the disk; cp does not."),
        click.option("--resume", is_flag=True, help="Go on with a run that was killed."),
        click.option("--workers", type=click.IntRange(1), help="Threads; by default one a core, at most 8."),
    ):
        command = option(command)
    return command


def conversion(options: dict[str, Any], progress: Callable[[int], Progress]) -> Options:
    """Make the library's options from a command's."""
    return Options(workers=options["workers"], resume=options["resume"], sync=options["sync"], progress=progress)


def show(value: dict[str, Any], as_json: bool, lines: list[str]) -> None:
    """Print a result: as JSON for a script, else as lines for a person.

    What can't be printed any more (a full disk behind stdout) does not undo what was done: the exit code says which it is.
    """
    text = json.dumps(value, indent=1) if as_json else "\n".join(lines)
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        click.echo(text.encode(encoding, "backslashreplace").decode(encoding))
    except BrokenPipeError:
        raise
    except OSError as error:
        with suppress(OSError):
            click.echo(f"error: the result can't be printed: {error.strerror}; everything was done", err=True)
        with suppress(OSError):
            sys.stdout.close()  # else the interpreter tries once more at its end
        raise SystemExit(ExitCode.UNPRINTED) from None


def few(lines: list[str], most: int = 8) -> list[str]:
    """Give the first lines of many, and a line that says how many there are more."""
    return lines if len(lines) <= most else [*lines[:most], f"and {len(lines) - most} more (--json has all)"]


def amount(number: float) -> str:
    """Write a number of bytes as people read it, such as 5.2 GB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if number < 1000 or unit == "TB":
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    raise AssertionError


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int], Callable[[int], None]]]:
    """Show bytes and rate on stderr while work goes on; nothing where stderr is no terminal.

    Args:
        title: what is being done.

    Yields:
        A function that takes the total of bytes and gives the function to call with each number of bytes done.
    """
    if sys.stderr is None or not sys.stderr.isatty():
        yield lambda total: lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn(title), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    lock = threading.Lock()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:

        def begin(total: int) -> Callable[[int], None]:
            task = bar.add_task(title, total=total)

            def advance(done: int) -> None:
                with lock:
                    bar.update(task, advance=done)

            return advance

        yield begin
