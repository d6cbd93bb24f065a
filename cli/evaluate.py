"""The command `eval`: the trainer's own evaluation of any checkpoint, its results as a table or as JSON."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from cli.options import show
from cli.train import run_or_launch

_DATA = ("--data", "--data-path", "--valid-data-path")


@click.command(
    "eval",
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": True},
    epilog="Further FLAGS are the trainer's (`moeconv train --help`): --seq-length, --micro-batch-size, --bf16, "
    "--tokenizer-model, --eval-iters N for N global batches instead of all, degrees of parallelism and others.",
)
@click.option("--nproc-per-node", type=click.IntRange(1), help="Processes; by default one a GPU, else one.")
@click.option("--json", "as_json", is_flag=True, help="Print the results as one JSON object.")
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="CKPT --data [NAME=]PATH... [FLAGS]")
def evaluate(nproc_per_node: int | None, as_json: bool, words: tuple[str, ...]) -> None:
    """Measure loss, perplexity and bits per byte of CKPT: a sharded checkpoint, a Hugging Face folder, or a run.

    Each PATH is a set of its own, read whole: text, Parquet, token files or whatever else the trainer reads. Under
    torchrun the ranks that it has started do it together. The trainer's own lines go to stderr.

    Example: moeconv eval ckpt --data wiki=wiki.jsonl code=code/ --seq-length 4096 --micro-batch-size 4 --json
    """
    checkpoint, sets, rest = _split(words)
    with tempfile.TemporaryDirectory(prefix="moeconv-eval-") as folder:
        log = Path(folder) / "metrics.jsonl"
        flags = ["--load", checkpoint, "--skip-train", "--eval-iters", "-1", "--log-file", str(log)]
        flags += ["--valid-data-path", *(path for _, path in sets)] if sets else []
        flags += ["--multiple-validation-sets"] if len(sets) > 1 else []
        with _stdout_to_stderr():
            status = run_or_launch([*flags, *rest], nproc_per_node, "moeconv eval")
        if status or os.environ.get("RANK", "0") != "0":
            sys.exit(status)
        records = [json.loads(line) for line in log.read_text(encoding="utf8").splitlines()]
    results = [_result(record) for record in records if record["kind"] == "eval"]
    for result, (name, path) in zip(results, sets, strict=False):
        result |= {"name": name, "path": path}
    iteration = next((record["iteration"] for record in records if record["kind"] == "eval"), 0)
    value = {"command": "eval", "checkpoint": checkpoint, "iteration": iteration, "sets": results}
    show(value, as_json, _table(results))


def _split(words: Sequence[str]) -> tuple[str, list[tuple[str, str]], list[str]]:
    """Take checkpoint and sets out of the command line; the rest is the trainer's."""
    if not words or words[0].startswith("-"):
        raise click.UsageError("CKPT comes first: moeconv eval CKPT --data PATH ...")
    found, rest, taking = [], [], False
    for word in words[1:]:
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            taking = name in _DATA
            if not taking:
                rest.append(word)
            elif equals:
                found.append(value)
        else:
            (found if taking else rest).append(word)
    if not found and "--mock-data" not in rest:
        raise click.UsageError("--data is missing: name the text or token files to measure the loss on")
    return words[0], [_named(word) for word in found], rest


def _named(word: str) -> tuple[str, str]:
    """Split NAME=PATH; a path alone is called by its last part."""
    name, equals, path = word.partition("=")
    if equals and name and path and "/" not in name and not Path(word).exists():
        return name, path
    return Path(word).name or word, word


@dataclass(frozen=True, slots=True)
class _Column:
    title: str
    key: str
    form: str


_COLUMNS = (
    _Column("loss", "loss", "{:.6f}"),
    _Column("perplexity", "perplexity", "{:.4f}"),
    _Column("bits/byte", "bits_per_byte", "{:.4f}"),
    _Column("tokens", "tokens", "{:,}"),
    _Column("bytes", "bytes", "{:,}"),
    _Column("seconds", "seconds", "{:.1f}"),
)


def _result(record: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": record["split"],
        "loss": record["eval_lm_loss"],
        "perplexity": record["eval_perplexity"],
        "bits_per_byte": record.get("eval_bits_per_byte"),
        "tokens": record["eval_tokens"],
        "bytes": record.get("eval_bytes"),
        "seconds": round(record["eval_seconds"], 3),
    }


def _table(results: Sequence[dict[str, Any]]) -> list[str]:
    rows = [["", *(column.title for column in _COLUMNS)]]
    for result in results:
        cells = ["" if result[c.key] is None else c.form.format(result[c.key]) for c in _COLUMNS]
        rows.append([str(result["name"]), *cells])
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    unknown = any(result["bits_per_byte"] is None for result in results)
    return lines + (["bits/byte: no tokenizer tells the text of these tokens (--tokenizer-model)"] if unknown else [])


@contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Have this process and those that it starts print to stderr: stdout is for the results."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
