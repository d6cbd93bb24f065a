"""What a run's data are, in a line for each part."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from runtime.data.blended import BlendedSamples
from runtime.data.config import DEFAULT_SPLIT
from runtime.data.loader import DataSource
from runtime.data.packing import Samples
from runtime.data.prepare import PrepareProgress
from runtime.data.rows import ConversationRows, RowReport
from runtime.ops.documents import document_bounds

_SHOWN = 5
_SAMPLED = 64


def describe_data(
    data: DataSource,
    splits: Sequence[str],
    *,
    train_samples: int = 0,
    train_steps: int = 0,
    batch_sizes: Sequence[int] = (1,),
) -> str:
    """Say what data a run has, before its first step.

    Args:
        data: the opened data.
        splits: parts that the run uses.
        train_samples: samples that the whole run trains on.
        train_steps: in so many steps.
        batch_sizes: samples of a step, of the first to the last.

    Returns:
        A line for each set (documents, tokens, samples; for training the epochs and the tokens of a step), and one that
        says what was left out, where something was.
    """
    length = data.config.seq_length
    lines = []
    for split in splits:
        for name, samples in data.sets(split):
            label = f"{split} data" if name == split else f"{split} data {name}"
            line = f"{label}: {describe_samples(samples, length)}"
            if split == "train":
                tokens = " to ".join(f"{size * length:,}" for size in dict.fromkeys((batch_sizes[0], batch_sizes[-1])))
                line += f" | {samples.epochs(train_samples):.3g} epochs in {train_steps:,} steps of {tokens} tokens"
                line += _shares(data, samples, train_samples)
            lines.append(line)
    config = data.config
    shares = config.split or DEFAULT_SPLIT
    kept = sum(shares[1:])
    if config.finetuning and not config.own_splits and list(splits) == ["train"] and kept:
        lines.append(
            f"--split {','.join(f'{share:g}' for share in shares)} keeps {kept / sum(shares):.1%} of the "
            "conversations from training, and nothing is evaluated on them (--eval-iters): --split 1 trains on all"
        )
    left_out = data.left_out()
    if left_out:
        more = f"; and {len(left_out) - _SHOWN} more" if len(left_out) > _SHOWN else ""
        lines.append(f"not read: {'; '.join(left_out[:_SHOWN])}{more}")
    return "\n".join(lines)


def document_lengths(data: DataSource) -> list[int]:
    """Measure the documents that attention stays in.

    Args:
        data: the opened data, with documents that don't see each other.

    Returns:
        Tokens of each document, or of what is in a sample of it, in the first samples of the training data.
    """
    loader = data.loader(data.samples("train"))
    lengths: list[int] = []
    for batch in loader.global_batch(0, min(_SAMPLED, loader.samples.num_samples)):
        assert batch.document_ids is not None
        lengths += document_bounds(batch.document_ids)[1].tolist()
    return lengths


def describe_samples(samples: Samples, seq_length: int) -> str:
    """Say how much one pass over samples is.

    Args:
        samples: the samples.
        seq_length: tokens of each.

    Returns:
        For example "1,234 documents, 5.6 M tokens, 2,734 samples of 2,048".
    """
    if (rows := row_report(samples)) is not None:
        return _describe_rows(rows, seq_length)
    text = f"{samples.num_documents:,} documents, {count(samples.num_tokens)} tokens, {samples.num_samples:,} samples of {seq_length:,}"
    if samples.num_tokens <= seq_length:
        text += " (fewer tokens than one sample takes: they are repeated)"
    return text


def row_report(samples: Samples) -> RowReport | None:
    """Say what conversations samples are made of; None where they are no conversations."""
    if isinstance(samples, ConversationRows):
        return samples.report
    if not isinstance(samples, BlendedSamples):
        return None
    found = [report for part in samples.parts if (report := row_report(part)) is not None]
    return functools.reduce(RowReport.plus, found) if found else None


def _describe_rows(report: RowReport, seq_length: int) -> str:
    text = (
        f"{report.conversations:,} conversations, {count(report.tokens)} tokens, {count(report.trained)} of them trained "
        f"({report.trained / report.tokens:.1%}), {report.rows:,} samples of {seq_length:,}, {report.padding:.2%} padding"
    )
    if report.cut:
        lost = report.cut_tokens / (report.tokens + report.cut_tokens)
        text += f", {report.cut:,} cut to a sample ({lost:.2%} of all tokens lost)"
    if report.dropped:
        text += f", {report.dropped:,} longer than a sample left out"
    if report.untrained:
        text += f", {report.untrained:,} left out because nothing trained is within a sample"
    return text


def _shares(data: DataSource, samples: Samples, train_samples: int) -> str:
    if not isinstance(samples, BlendedSamples):
        return ""
    blend = data.blend("train")
    assert blend is not None
    parts = zip(blend.paths, samples.parts, samples.counts(train_samples), strict=True)
    return "; " + ", ".join(
        f"{path}: {number:,} samples, {part.epochs(number):.3g} epochs" for path, part, number in parts
    )


def count(number: float) -> str:
    """Write a number as people read it, such as 1.23 B."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:,.0f}"


def describe_progress(progress: PrepareProgress) -> str:
    """Say how far tokenizing is.

    Args:
        progress: as `prepare` reports it.

    Returns:
        A line with share, tokens, tokens a second and the time that is left.
    """
    if progress.waiting:
        return "waiting for another process that tokenizes the data"
    share = progress.done_bytes / max(progress.total_bytes, 1)
    line = f"tokenizing: {share:.1%} of {progress.total_bytes / 1e9:.2f} GB, {count(progress.tokens)} tokens, {count(progress.tokens_per_second)} tokens/s"
    if progress.bytes_per_second > 0:
        left = (progress.total_bytes - progress.done_bytes) / progress.bytes_per_second
        line += f", {left / 60:.0f} min left" if left >= 90 else f", {left:.0f} s left"
    return line
