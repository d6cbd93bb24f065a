"""Merging: a model whose adapted weights are W + scale * B A, added in fp32 and rounded once, tensor by tensor; proved before it is finished."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from moeconv import extras
from moeconv.adapters.delta import AddDelta, Array, Replace, Then
from moeconv.adapters.identity import check_base, fingerprint
from moeconv.adapters.source import Adapter
from moeconv.checkpoint import TRAINER, Checkpoint, make_manifest
from moeconv.convert import Options, plan_hf, plan_sharded, write_plan
from moeconv.dtypes import numpy_dtype
from moeconv.errors import MappingError, MoeconvError
from moeconv.execute import Progress
from moeconv.io.carried import CHAT_TEMPLATE, Content
from moeconv.io.hf_folder import INDEX
from moeconv.io.manifest import MANIFEST, FileRecord
from moeconv.io.staging import Staging
from moeconv.layout.rect import Rect
from moeconv.pieces import NameMap, Piece
from moeconv.placement import split_optimizer_name
from moeconv.plan import Plan, RowOp, make_plan, safetensors_target
from moeconv.quant.view import PlainView, plain_view

# Allowed difference of logits, relative to the largest: of sums in another order, and where that decides how 16 bits are rounded.
EXACT_BOUND, ROUNDED_BOUND = 1e-4, 1e-3
_BAND = 1 << 19  # elements that are compared at a time


class ProofError(MoeconvError):
    """What was written is not what the model computes with the adapter."""


@dataclass(frozen=True)
class Merged(Checkpoint):
    """A model with an adapter merged, as if it were on disk."""

    adapter_of: Adapter = field(default_factory=lambda: Adapter(Path(), ""))
    stale: tuple[str, ...] = ()
    """What the base holds that is no longer right, and goes not along."""
    base: Checkpoint | None = None
    """The model as it is read: of a quantised one, plain numbers."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What becomes of quantised weights, in words."""
        return self.base.notes if isinstance(self.base, PlainView) else ()

    @property
    def files(self) -> list[str]:
        """The files that are read, the adapter's included: its paths are absolute."""
        assert self.base is not None
        return sorted({*self.base.files, *(str(path.absolute()) for path in self.adapter_of.files)})

    @property
    def carried_files(self) -> dict[str, Content]:
        """As of the base, without the position of the run that it is of, and with the adapter's chat template."""
        assert self.base is not None
        found = {name: content for name, content in self.base.carried_files.items() if name != TRAINER}
        template = self.adapter_of.chat_template
        return found if template is None else found | {CHAT_TEMPLATE: template}


def merge(base: Checkpoint, adapter: Adapter) -> Merged:
    """Plan a merge.

    Args:
        base: the model, sharded or a Hugging Face folder; the result of a quantised one is in bf16.
        adapter: opened for its model.

    Returns:
        The merged model; reading happens when it is written.

    Raises:
        MappingError: a delta belongs to a weight that the base doesn't store, or no cast of its quantised weights is known.
        IntegrityError: the adapter is a run's save, and of another model.
    """
    if base.model.quantised:
        base = plain_view(base)
    if adapter.save is not None:
        check_base(base.root, fingerprint(base), adapter.save)
    for name in (*adapter.deltas, *adapter.whole):
        if name not in base.tensors:
            raise MappingError(
                f"{adapter.root}: changes {name}, which {base.root} doesn't store: it would be left out, so nothing was written"
            )
    both = sorted(adapter.deltas.keys() & adapter.whole.keys())
    if both:
        raise MappingError(f"{adapter.root}: adds to {both[0]} and replaces it, too; which of the two is meant?")
    ops: dict[str, RowOp] = {
        name: AddDelta(name, base.tensors[name].dtype, delta) for name, delta in adapter.deltas.items()
    }
    ops |= {name: Replace(base.tensors[name].dtype, values) for name, values in adapter.whole.items()}
    ops |= {name: Then(base.ops[name], op) for name, op in ops.items() if name in base.ops}
    kept = [name for name in base.tensors if split_optimizer_name(name)[0] is None]
    stale = ["the optimizer's state and masters"] if len(kept) < len(base.tensors) else []
    stale += [f"{TRAINER}, the position of a run"] if TRAINER in base.carried else []
    values = {f.name: getattr(base, f.name) for f in fields(Checkpoint)}
    values |= {
        "tensors": {name: base.tensors[name] for name in kept},
        "pieces": {name: base.pieces[name] for name in kept},
        "ops": {**base.ops, **ops},
    }
    return Merged(**values, adapter_of=adapter, stale=tuple(stale), base=base)


def plan_merge(merged: Merged, *, hf: bool = False) -> tuple[Plan, bytes | None]:
    """Lay out the files: those of the base, or with `hf` a Hugging Face folder.

    Returns:
        The plan, and the bytes of a Hugging Face folder's index, if it has one.
    """
    folder = merged.folder
    if folder is not None and all(header.raw for header in folder.headers.values()):
        names = NameMap(merged.model)
        files = []
        for name, header in folder.headers.items():
            pieces = (p for e in header.entries for p in names.pieces(e.name, e.dtype, e.shape, name, e.begin))
            files.append(safetensors_target(name, header, pieces))
        return make_plan(merged.tensors, merged.pieces, files, ops=merged.ops), folder.index
    if merged.kind == "hf" or hf:
        return plan_hf(replace(merged, folder=None), None)
    return plan_sharded(merged, merged.degrees), None


@dataclass(frozen=True, slots=True)
class Proof:
    """What was found of the written files: weights compared with their sums, and logits with those of base and adapter; None where left out."""

    weights: int
    zero: int
    """Adapters that add nothing."""
    rounding: float
    """What rounding changed of the weights over what the adapter did, root mean squares."""
    logits_error: float | None = None
    bound: float | None = None
    note: str = ""


def write_merge(
    merged: Merged, out: Path, options: Options, *, hf: bool = False, logits: bool | None = None
) -> tuple[Plan, Proof]:
    """Write a merged model, and prove it before it gets its name.

    Args:
        merged: the plan.
        out: the folder to make.
        options: how to run.
        hf: write a sharded base as a Hugging Face folder.
        logits: whether to compare logits; None: where a layer fits into memory.

    Returns:
        The plan that was carried out, and what was proved.

    Raises:
        MoeconvError: anything is wrong; then `out` does not exist.
    """
    if logits is not False:
        _forward()  # before anything is written
    plan, index = plan_merge(merged, hf=hf)
    beside = dict(merged.carried_files)
    if index is not None:
        beside[INDEX] = index
    found: list[Proof] = []

    def close(staging: Staging, records: dict[str, FileRecord], carried: dict[str, tuple[int, str]]) -> None:
        written = _written(merged, plan, staging.folder)
        found.append(prove(merged, written, options, logits=logits))
        if merged.kind == "sharded" and not hf:
            staging.write(MANIFEST, make_manifest(merged, merged.degrees, list(records.values()), carried).encode())

    write_plan(merged, out, plan, beside, options, close)
    return plan, found[0]


def _written(merged: Merged, plan: Plan, folder: Path) -> Checkpoint:
    """Give the files of a plan as a checkpoint, before they are one."""
    pieces: dict[str, list[Piece]] = {name: [] for name in merged.tensors}
    for file in plan.files:
        for piece in file.pieces:
            pieces[piece.tensor].append(piece)
    values = {f.name: getattr(merged, f.name) for f in fields(Checkpoint)}
    values |= {"root": folder, "pieces": pieces, "ops": {}, "checksums": {}}
    return Checkpoint(**values)


def prove(merged: Merged, written: Checkpoint, options: Options, *, logits: bool | None = None) -> Proof:
    """Compare written weights with the sums that they must be, and what they compute with what base and adapter compute.

    Args:
        merged: the plan; its base is read again.
        written: what was written.
        options: how many threads, and who is told of bytes read.
        logits: as for `write_merge`.

    Returns:
        What was compared.

    Raises:
        ProofError: a weight or the logits differ by more than rounding.
    """
    adapter = merged.adapter_of
    names = [*adapter.deltas, *adapter.whole]
    told = options.progress(sum(merged.tensors[name].nbytes for name in names)) if options.progress else None
    with ThreadPoolExecutor(options.workers) as pool:
        found = list(pool.map(lambda name: _check_weight(merged, written, name, told), names))
    added, lost = (sum(column) for column in zip(*found, strict=True))
    zero = sum(not own for own, _ in found[: len(adapter.deltas)])
    proof = Proof(len(names), zero, (lost / added) ** 0.5 if added else 0.0)
    if logits is False:
        return replace(proof, note="logits: left out")
    from moeconv.upcycling.check import free_memory

    forward = _forward()
    needed, free = forward.layer_bytes(merged), free_memory()
    if logits is None and needed > free:
        why = f"a layer in fp32 takes {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
        return replace(proof, note=f"logits: left out: {why}")
    error = forward.logits_difference(written, _Effective.of(merged))
    rounds = any(merged.tensors[name].dtype not in ("F32", "F64") for name in names)
    bound = ROUNDED_BOUND if rounds else EXACT_BOUND
    if not error <= bound:
        raise ProofError(
            f"{written.root}: the merged model's logits differ by {error:.1e} of the largest from those of the base with the adapter, "
            f"its sums rounded as the weights are; expected are at most {bound:.0e}. Nothing was finished"
        )
    return replace(proof, logits_error=error, bound=bound)


def _forward() -> ModuleType:
    with extras.needed("comparing logits", "leave it out with --no-logits (check=False)"):
        from moeconv import forward
    return forward


@dataclass(frozen=True)
class _Effective(Checkpoint):
    """The base with an adapter, its sums rounded as the weights are, made anew from both."""

    merged: Merged | None = None

    @classmethod
    def of(cls, merged: Merged) -> _Effective:
        values = {f.name: getattr(merged, f.name) for f in fields(Checkpoint)}
        return cls(**(values | {"ops": {}}), merged=merged)

    def read(self, name: str, rect: Rect | None = None) -> Array:
        """As `Checkpoint.read`."""
        assert self.merged is not None
        wanted = rect or Rect.whole(self.tensors[name].shape)
        base, added = _sum_of(self.merged, name, wanted)
        return (base if added is None else base + added).astype(numpy_dtype(self.tensors[name].dtype))


def _sum_of(merged: Merged, name: str, rect: Rect) -> tuple[Array, Array | None]:
    """A part of the base's weight, and what the adapter adds, None for nothing: in fp32, for fp32 weights in fp64."""
    adapter, dtype = merged.adapter_of, merged.tensors[name].dtype
    kind = np.float64 if dtype in ("F32", "F64") else np.float32
    if name in adapter.whole:
        return adapter.whole[name]()[rect.slices()].astype(kind), None
    assert merged.base is not None
    base = merged.base.read(name, rect)
    if name not in adapter.deltas:
        return base, None
    rows, columns = rect.slices()
    return base.astype(kind), adapter.deltas[name].rows(rows.start, rows.stop, kind)[:, columns]


def _check_weight(merged: Merged, written: Checkpoint, name: str, told: Progress | None) -> tuple[float, float]:
    """Compare a written weight with the sum that it must be; give the sums of squares of what was added, and of what rounding changed."""
    info = written.tensors[name]
    kind, shape = numpy_dtype(info.dtype), info.shape
    band, total, lost = max(1, _BAND // max(prod(shape[1:]), 1)), 0.0, 0.0
    for first in range(0, shape[0], band):
        rect = Rect.slab(shape, 0, first, min(first + band, shape[0]))
        base, added = _sum_of(merged, name, rect)
        want = base if added is None else base + added
        off = np.abs(written.read(name, rect).astype(want.dtype) - want)
        # Half a step of the type, and what sums in another order can differ by.
        slack = np.abs(want) * (_epsilon(kind) / 2 + 2.0**-20) + np.abs(want).max(initial=0.0) * 2.0**-22
        wrong = ~(off <= slack + _smallest(kind))
        if wrong.any():
            at = tuple(int(i) for i in np.argwhere(wrong)[0])
            raise ProofError(
                f"{written.root}: {name}{[first + at[0], *at[1:]]} is {off[at]:.2g} off the base with the adapter, which is {want[at]:.6g} there. "
                "Nothing was finished"
            )
        if added is not None:
            total, lost = total + float(np.vdot(added, added)), lost + float(np.vdot(off, off))
    if told is not None:
        told(info.nbytes)
    return total, lost


def _epsilon(kind: Any) -> float:
    import ml_dtypes

    return float((ml_dtypes if kind.name == "bfloat16" else np).finfo(kind).eps)


def _smallest(kind: Any) -> float:
    import ml_dtypes

    return float((ml_dtypes if kind.name == "bfloat16" else np).finfo(kind).smallest_subnormal)
