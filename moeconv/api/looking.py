"""Looking and checking: the commands `inspect`, `verify` and `diff`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moeconv import checking, extras
from moeconv.checking import Difference, TensorDifference
from moeconv.checkpoint import Checkpoint
from moeconv.convert import Options
from moeconv.describe import describe, rank_tensors
from moeconv.execute import Progress
from moeconv.formats import open_any
from moeconv.hub import local_folder
from moeconv.hub_preview import preview
from moeconv.megatron.checkpoint import MegatronCheckpoint

_LOGITS_TOLERANCE = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """What was checked and, with another checkpoint beside it, what was compared."""

    tensors: int
    nbytes: int
    "Bytes of tensors that were read and checked."
    checked: str
    "What that was, in words."
    same: bool | None = None
    "Whether both checkpoints hold the same tensors, byte for byte; None where there was only one."
    difference: Difference | None = None
    "The first difference."
    alone: str | None = None
    "The one of two checkpoints that alone has optimizer state, which was not compared."
    logits_difference: float | None = None
    "Largest difference of logits over the largest logit, in fp32; None where not asked for."

    @property
    def passed(self) -> bool:
        """Whether nothing differs, logits up to sums in another order."""
        gap = self.logits_difference
        return self.same is not False and (gap is None or gap <= _LOGITS_TOLERANCE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Differences:
    """What differs between two checkpoints."""

    config: Sequence[Difference]
    "Fields of config.json."
    tensors: Sequence[Difference]
    "Tensors that only one has, or that differ in type, shape or bytes."
    measured: Sequence[TensorDifference]
    "How far those of one type and shape are apart, computed in fp64."
    alone: str | None = None
    "The one that alone has optimizer state, which was not compared."

    @property
    def same(self) -> bool:
        """Whether nothing differs."""
        return not (self.config or self.tensors)


def inspect(
    source: str | Path,
    *,
    revision: str | None = None,
    rank: Mapping[str, int] | None = None,
    pattern: str | None = None,
) -> dict[str, Any]:
    """Describe a checkpoint; of a hub repository, config and headers alone are downloaded.

    Args:
        source: a folder of any kind, or a hub repository's id.
        revision: a branch, tag or commit of the repository.
        rank: list the rectangles of this rank of the checkpoint's own layout, too: coordinates by axis, 0 where left out.
        pattern: list the rectangles of tensors whose name matches this shell-style pattern, of `rank` or the first one.

    Returns:
        JSON values: family, sizes, dtypes, parameters (total and active for one token), bytes, layout; and `rank`.

    Raises:
        MoeconvError: it is no checkpoint, contradicts itself, or has no such rank.

    >>> import moeconv
    >>> found = moeconv.inspect("ckpt")
    >>> found["family"], found["parameters"], found["active_parameters"], found["degrees"]["ep"]
    ('Mixtral', 29088, 19872, 2)
    >>> moeconv.inspect("ckpt", rank={"tp": 1}, pattern="*q_proj*")["rank"]["tensors"][0]["rect"]
    '[16:32, 0:32]'
    """
    with preview(str(source), revision) as seen:
        checkpoint = open_any(seen.folder)
        value = describe(checkpoint) | {"path": str(source)}
        if rank is not None or pattern is not None:
            held = rank_tensors(checkpoint, dict(rank or {}), pattern or "*")
            value["rank"] = {"coordinates": dict(rank or {}), "tensors": [asdict(t) for t in held]}
    return value


def verify(
    source: str | Path | Checkpoint,
    *,
    against: str | Path | Checkpoint | None = None,
    logits: bool = False,
    options: Options | None = None,
) -> Verified:
    """Check headers, exact coverage and every checksum, and compare with another checkpoint, whatever the layouts.

    Args:
        source: a folder of any kind, or a hub repository's id; or an opened checkpoint.
        against: another, to be compared byte for byte.
        logits: compare transformers' logits in fp32 too, layer by layer.
        options: threads, progress.

    Returns:
        What was found; `passed` says whether all is well.

    Raises:
        IntegrityError: bytes differ from their checksum, or a file is damaged.
        SourceError: a file can't be read.

    >>> import moeconv
    >>> found = moeconv.verify("ckpt", against="mixtral")
    >>> found.passed, found.same, found.nbytes
    (True, True, 58176)
    """
    run = options or Options()
    checkpoint = _open(source)
    total = sum(info.nbytes for info in checkpoint.tensors.values())
    nbytes = checking.verify(checkpoint, workers=run.workers, progress=_progress(run, total))
    checked = "headers and coverage (a Hugging Face folder has no checksums)"
    if checkpoint.kind == "sharded":
        checked = "checksums and coverage"
    elif isinstance(checkpoint, MegatronCheckpoint):
        checkpoint.check()
        checked = "archives' checksums, replicas and coverage"
    if against is None:
        return Verified(tensors=len(checkpoint.tensors), nbytes=nbytes, checked=checked)
    other = _open(against)
    found = next(checking.compare(checkpoint, other, _progress(run, nbytes)), None)
    gap = None
    if logits:
        with extras.needed("comparing logits"):
            from moeconv.forward import logits_difference
        gap = logits_difference(checkpoint, other)
    return Verified(
        tensors=len(checkpoint.tensors),
        nbytes=nbytes,
        checked=checked,
        same=found is None,
        difference=found,
        alone=_alone(checkpoint, other),
        logits_difference=gap,
    )


def diff(a: str | Path | Checkpoint, b: str | Path | Checkpoint, *, options: Options | None = None) -> Differences:
    """Find what differs between two checkpoints, whatever their layouts: tensors, types, shapes, config, and how far values are apart.

    Args:
        a: a folder of any kind, or a hub repository's id; or an opened checkpoint.
        b: the other.
        options: progress.

    Returns:
        The differences; `same` says that there are none.

    Raises:
        MoeconvError: one of the two can't be read.

    >>> import moeconv
    >>> moeconv.diff("mixtral", "ckpt").same
    True
    >>> found = moeconv.diff("mixtral", "trained")
    >>> found.tensors[0].name, found.measured[0].count
    ('model.norm.weight', 1)
    """
    left, right = _open(a), _open(b)
    total = sum(info.nbytes for info in left.tensors.values())
    found = list(checking.compare(left, right, _progress(options or Options(), total)))
    both = [d.name for d in found if left.tensors.get(d.name) == right.tensors.get(d.name)]
    return Differences(
        config=checking.config_differences(left.config, right.config),
        tensors=found,
        measured=[checking.measure(left, right, name) for name in both],
        alone=_alone(left, right),
    )


def _open(source: str | Path | Checkpoint) -> Checkpoint:
    return source if isinstance(source, Checkpoint) else open_any(local_folder(str(source)))


def _progress(options: Options, total: int) -> Progress | None:
    return options.progress(total) if options.progress else None


def _alone(a: Checkpoint, b: Checkpoint) -> str | None:
    found = checking.lone_state(a, b)
    return None if found is None else str(found.root)
