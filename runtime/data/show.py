"""A sample as people can look at it: its tokens, and which of them are learned."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console
from rich.text import Text

from runtime.data.batch import IGNORED_LABEL, Batch
from runtime.data.loader import DataSource
from runtime.data.summary import describe_samples

_STYLES = ("black on green", "black on bright_green")
"""Of learned tokens in turn, so that one is told from the next."""
_OTHERS = ("default", "bright_black")
_OPEN, _CLOSE = "[[", "]]"


@dataclass(frozen=True, slots=True)
class ShownDocument:
    """A document of a sample, or its padding."""

    ids: list[int]
    trained: list[bool]
    """Whether each is learned."""


def shown_documents(batch: Batch) -> list[ShownDocument]:
    """Cut a sample into its documents.

    Args:
        batch: one row.

    Returns:
        The documents in order. Of a full row the last label, which is no input, is not among them.
    """
    tokens, labels = batch.tokens[0].tolist(), batch.labels[0].tolist()
    trained = [False, *(label != IGNORED_LABEL for label in labels[:-1])]
    numbers = batch.document_ids[0].tolist() if batch.document_ids is not None else [0] * len(tokens)
    found = []
    for _, group in itertools.groupby(zip(numbers, tokens, trained, strict=True), key=lambda item: item[0]):
        members = list(group)
        found.append(ShownDocument([token for _, token, _ in members], [mark for _, _, mark in members]))
    return found


def print_sample(data: DataSource, console: Console | None = None) -> None:
    """Print the first training sample.

    Args:
        data: the data.
        console: where to; None: standard output. Off a terminal, brackets stand where the colour would be.

    Raises:
        DataError: the data can't be read.
    """
    console = console or Console(highlight=False, soft_wrap=True)
    samples = data.samples("train")
    [batch] = data.loader(samples).global_batch(0, 1)
    console.print(f"training data: {describe_samples(samples, data.config.seq_length)}", markup=False)
    console.print(
        "the first sample; learned tokens are ",
        Text("green", _STYLES[0]),
        f" (without colour: {_OPEN} {_CLOSE})",
        sep="",
        markup=False,
        highlight=False,
    )
    for number, document in enumerate(shown_documents(batch), 1):
        count = sum(document.trained)
        title = f"document {number}: {len(document.ids):,} tokens, {count:,} learned"
        if data.config.finetuning and not count and not any(document.ids):
            console.print(f"\n--- padding: {len(document.ids):,} tokens", style="bold", markup=False, highlight=False)
            continue
        console.print(f"\n--- {title}", style="bold", markup=False, highlight=False)
        console.print(Text.assemble(*_pieces(data.decode(document.ids), document.trained, colour=console.is_terminal)))


def _pieces(texts: list[str], trained: list[bool], *, colour: bool) -> Iterator[tuple[str, str]]:
    before = False
    for place, (text, mark) in enumerate(zip(texts, trained, strict=True)):
        if not colour and mark != before:
            yield (_OPEN if mark else _CLOSE), ""
        before = mark
        yield text, (_STYLES if mark else _OTHERS)[place % 2]
    if before and not colour:
        yield _CLOSE, ""
