"""The command for training data: tokenize text."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from cli.options import amount, show
from moeconv.errors import WriteError
from moeconv.io.staging import check_free
from runtime.data.documents import Bad, read_unit
from runtime.data.errors import DataError
from runtime.data.kinds import DataFile, Kind
from runtime.data.listing import Listing, list_files
from runtime.data.pool import num_cores
from runtime.data.prepare import PrepareOptions, PrepareProgress, Report, prepare, quiet
from runtime.data.summary import count
from runtime.data.tokenizer import EncoderSpec, encoder_spec, load_tokenizer
from runtime.data.units import plan_units


@click.command("prepare-data")
@click.argument("data", nargs=-1, required=True, metavar="DATA...")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--tokenizer-model",
    "--tokenizer",
    type=click.Path(path_type=Path),
    required=True,
    help="Folder with a tokenizer (a checkpoint), tokenizer.json, or sentencepiece's tokenizer.model.",
)
@click.option("--text-key", default="text", show_default=True, help="Field or column that holds a document's text.")
@click.option(
    "--append-eod/--no-append-eod",
    default=True,
    show_default=True,
    help="Put the tokenizer's end-of-sequence token behind each document.",
)
@click.option(
    "--skip-bad-lines",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    metavar="N",
    help="Leave out up to N lines or rows without a text.",
)
@click.option("--workers", type=click.IntRange(1), help="Processes; by default one a core.")
@click.option("--resume", is_flag=True, help="Go on with a run that was stopped.")
@click.option(
    "--dry-run", is_flag=True, help="Say what would be read, and try the first document of each file; write nothing."
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
def prepare_data(data: tuple[str, ...], out: Path, tokenizer_model: Path, resume: bool, **options: Any) -> None:
    """Tokenize DATA into OUT.bin and OUT.idx, the token files that the trainer and Megatron read.

    DATA are files or folders of JSON Lines, JSON arrays, plain text (all of them as .gz or .zst too), Parquet or Arrow, or
    hf://OWNER/NAME[/CONFIG][:SPLIT]. A stopped run keeps what it has and goes on with --resume.

    Example: moeconv prepare-data corpus/ more.jsonl.zst corpus-tokens --tokenizer ckpt
    """
    target = out.with_name(out.name.removesuffix(".bin") + ".bin")
    _check_out(target, resume or options["dry_run"])
    listings = [list_files(path) for path in data]
    files = [file for listing in listings for file in listing.files]
    for file in files:
        if file.kind is Kind.TOKENS:
            raise DataError(f"{file.path}: holds token ids already; give it to the trainer as it is")
    spec = _spec(tokenizer_model, options["append_eod"])
    if options["dry_run"]:
        _dry_run(files, listings, spec, target, options)
        return
    settings = PrepareOptions(
        text_key=options["text_key"], skip_bad_lines=options["skip_bad_lines"], workers=options["workers"] or 0
    )
    begin = time.perf_counter()
    with _progress_bar() as report:
        result = prepare(files, target, spec, settings, report)
    seconds = time.perf_counter() - begin
    rate = result.tokens / max(seconds, 1e-9)
    left_out = [what for listing in listings for what in listing.left_out]
    value = {
        "command": "prepare-data",
        "out": str(target),
        "documents": result.documents,
        "tokens": result.tokens,
        "bad_lines": result.bad,
        "empty_documents": result.empty,
        "left_out": left_out,
        "eod": result.eod,
        "seconds": round(seconds, 3),
    }
    lines = [f"left out: {what}" for what in left_out]
    lines += [f"bad line: {message}" for message in result.messages]
    lines += [
        f"left out: {number:,} {what}"
        for number, what in ((result.bad, "bad lines"), (result.empty, "documents without text"))
        if number
    ]
    lines += _no_mark(spec)
    lines.append(
        f"{target}: {result.documents:,} documents, {count(result.tokens)} tokens in {seconds:.1f} s ({count(rate)} tokens/s)"
    )
    show(value, options["as_json"], lines)


def _check_out(target: Path, resume: bool) -> None:
    for path in (target, target.with_suffix(".idx")):
        check_free(path)
    left = target.with_suffix(".parts")
    if left.exists() and not resume:
        raise WriteError(f"{left}: a run that did not finish left this; go on with --resume, or remove it")


def _spec(tokenizer_model: Path, append_eod: bool) -> EncoderSpec:
    return encoder_spec(load_tokenizer(tokenizer_model), tokenizer_model, append_eod=append_eod)


def _no_mark(spec: EncoderSpec) -> list[str]:
    return (
        []
        if spec.eod is not None
        else ["note: documents are not separated: no end-of-document token is put behind them"]
    )


def _dry_run(
    files: list[DataFile], listings: list[Listing], spec: EncoderSpec, target: Path, options: dict[str, Any]
) -> None:
    """Say what would be read; the first document of each file shows whether its form and --text-key are right."""
    for file in files:
        unit = next(plan_units([file]), None)
        first = next(read_unit(unit, options["text_key"]), None) if unit is not None else None
        if isinstance(first, Bad) and not options["skip_bad_lines"]:
            raise DataError(f"{first.where()}: {first.what}")
    total = sum(file.path.stat().st_size for file in files)
    kinds = [file.kind.value + (f", {file.compression}" if file.compression else "") for file in files]
    left_out = [what for listing in listings for what in listing.left_out]
    value = {
        "command": "prepare-data",
        "out": str(target),
        "dry_run": True,
        "files": {str(file.path): kind for file, kind in zip(files, kinds, strict=True)},
        "bytes": total,
        "left_out": left_out,
        "vocabulary": spec.vocab_size,
        "eod": spec.eod,
        "workers": options["workers"] or num_cores(),
    }
    lines = [
        f"{file.path}: {kind}, {amount(file.path.stat().st_size)}" for file, kind in zip(files, kinds, strict=True)
    ]
    lines += [f"left out: {what}" for what in left_out]
    lines += _no_mark(spec)
    lines.append(
        f"{target}: would hold the tokens of {len(files)} files, {amount(total)}; vocabulary of {spec.vocab_size:,}, "
        f"end of document {spec.eod}, {value['workers']} processes"
    )
    show(value, options["as_json"], lines)


@contextmanager
def _progress_bar() -> Iterator[Report]:
    """Show bytes, tokens and tokens a second on stderr; nothing where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield quiet
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("tokenize"),
        BarColumn(),
        DownloadColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("tokenize", total=None, rate="")

        def report(progress: PrepareProgress) -> None:
            rate = f"{count(progress.tokens)} tokens, {count(progress.tokens_per_second)}/s"
            bar.update(task, total=progress.total_bytes, completed=progress.done_bytes, rate=rate)

        yield report
