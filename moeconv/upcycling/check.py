"""What a planned mixture computes, compared with its source before anything is written: logits, and the loss on a text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moeconv import extras
from moeconv.checkpoint import Checkpoint
from moeconv.errors import MoeconvError
from moeconv.upcycling.planned import Planned

# Allowed difference of logits, relative to the largest: of fp32 sums in another order, and where scaling rounds.
TOLERANCE, ROUNDED_TOLERANCE = 1e-5, 5e-2


class FunctionError(MoeconvError):
    """A mixture that should compute what its source computes does not."""


@dataclass(frozen=True, slots=True)
class Checked:
    """What a check found: the largest difference of logits over the largest logit, and losses in nats a token; None where not asked for or left out."""

    logits_error: float | None = None
    source_loss: float | None = None
    loss: float | None = None
    check: str = "left out"
    "`done`, or `left out` with the reason."


def check(source: Checkpoint, planned: Planned, *, logits: bool | None = None, text: Path | None = None) -> Checked:
    """Compare what the source and the planned mixture compute, in fp32, layer by layer through transformers.

    Args:
        source: the model that the mixture is made of.
        planned: the mixture.
        logits: whether to compare logits; None: where a layer fits into memory, or a text is given.
        text: a text to compare the loss on.

    Returns:
        What was found.

    Raises:
        FunctionError: the logits differ by more than the method allows.
        RecipeError: the text can't be read, or is too short.
    """
    if logits is False and text is None:
        return Checked()
    with extras.needed("comparing logits and losses", "leave the check out with --no-check (check=False)"):
        from moeconv import forward

    needed, free = forward.layer_bytes(planned), free_memory()
    if logits is None and text is None and needed > free:
        return Checked(check=f"left out: a layer in fp32 takes {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free")
    losses: tuple[float | None, float | None] = (None, None)
    if text is not None:
        from moeconv.upcycling.texts import sequences

        tokens = sequences(source.root, text)
        losses = forward.loss(source, tokens), forward.loss(planned, tokens)
    if logits is False:
        return Checked(None, *losses)
    error = forward.logits_difference(planned, source)
    tolerance = TOLERANCE if planned.lossless else ROUNDED_TOLERANCE
    if not planned.inexact and not error <= tolerance:
        raise FunctionError(
            f"logits differ from {source.root}'s by {error:.1e} of the largest, and {tolerance:.0e} is expected of this method; "
            "nothing was written"
        )
    return Checked(error, *losses, check="done")


def free_memory() -> int:
    """Give the bytes of memory that are free; a large number where the system doesn't say."""
    for line in Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else ():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 2**63
