"""A checkpoint whose weights are cast on the way: quantised ones to plain numbers, plain ones to FP8 blocks. Nothing is written here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from math import prod
from typing import Any

import numpy as np

from moeconv.checkpoint import Checkpoint
from moeconv.dtypes import Bytes, numpy_dtype
from moeconv.errors import MappingError
from moeconv.families.base import GlobalTensor, Model
from moeconv.io.carried import Content
from moeconv.io.hf_folder import CONFIG
from moeconv.layout.rect import Rect
from moeconv.pieces import TensorInfo
from moeconv.plan import RowOp
from moeconv.quant import FP8, PLAIN
from moeconv.quant.dequantise import Rows, dequantiser, read_rows
from moeconv.quant.numbers import Array, fp8_blocks

_BLOCK = (128, 128)
# Roles of matrices that stay plain in FP8 checkpoints: they are small, or precision counts.
_PLAIN_ROLES = ("embedding", "head", "router", "shared.router")


@dataclass(frozen=True)
class CastCheckpoint(Checkpoint):
    """A Hugging Face folder with weights of another type, as if it were on disk; `notes` say what is exact and what is rounded."""

    notes: tuple[str, ...] = ()
    reads: tuple[str, ...] = field(default=(), repr=False)

    @property
    def files(self) -> list[str]:
        """The files that hold tensors, those that are read for a cast included."""
        return sorted({*super().files, *self.reads})

    @cached_property
    def carried_files(self) -> dict[str, Content]:
        """As of the source, with the config that names the new types."""
        config = (json.dumps(self.config, indent=2, ensure_ascii=False) + "\n").encode()
        return super().carried_files | {CONFIG: config}

    def read(self, name: str, rect: Rect | None = None) -> Array:
        """Make a part of a tensor; see `Checkpoint.read`."""
        op, info = self.ops.get(name), self.tensors[name]
        if op is None:
            return super().read(name, rect)
        wanted, kind = rect or Rect.whole(info.shape), numpy_dtype(info.dtype)
        count = wanted.shape[0]
        band = np.empty((count, prod(info.shape[1:]) * kind.itemsize), np.uint8)
        rows: Array = op(band, wanted.offsets[0]).view(kind).reshape(count, *info.shape[1:])
        return rows[(slice(None), *wanted.slices()[1:])]


def cast(source: Checkpoint, dtype: str) -> CastCheckpoint:
    """Plan a checkpoint with its weights cast.

    Args:
        source: a Hugging Face folder.
        dtype: `bfloat16`, `float16` or `float32` for a quantised checkpoint, `fp8` for a plain one.

    Returns:
        The cast checkpoint; reading its source happens when it is written.

    Raises:
        MappingError: there is nothing to cast, or no such cast.
    """
    model = source.model
    if dtype == FP8:
        return _to_fp8(source)
    if not model.quantised or model.scheme is None:
        kinds = ", ".join(sorted({info.dtype for info in source.tensors.values()}))
        raise MappingError(f"{source.root}: --dtype {dtype}: holds no quantised weights but {kinds}; leave --dtype out")
    how = dequantiser(source)
    carried = _carried_weights(source)
    ops: dict[str, RowOp] = {}
    made: dict[str, TensorInfo] = {}
    for name, weight in {**{name: model.plain[name] for name in sorted(model.quantised)}, **carried}.items():
        parts = {t.part.role: t for t in model.parts(weight) if t.part is not None}
        ops[name] = Rounded(how(source, weight, parts), numpy_dtype(PLAIN[dtype]))
        made[name] = TensorInfo(name, PLAIN[dtype], weight.shape)
    gone = {part.name for weight in carried.values() for part in model.parts(weight)}
    left = {name: shape for name, shape in model.carried.items() if name not in gone}
    config = _plain_config(source.config, model.family.text, dtype)
    plain = replace(model, config=model.family.language_config(config))
    plain = plain.stored_as((), left | {name: weight.shape for name, weight in carried.items()})
    exact = _exact(source, dtype)
    note = f"{len(made)} weights of {model.scheme.name} become {dtype}: " + (
        "exactly" if exact else "rounded as their maker's own reader rounds them"
    )
    return as_cast(source, plain, config, made, ops, note)


def _carried_weights(source: Checkpoint) -> dict[str, GlobalTensor]:
    """Find weights among the tensors that go along unread, where all of their parts are there as the scheme says: those of further layers."""
    model, found = source.model, dict[str, GlobalTensor]()
    numbers = next(part for part in model.scheme.parts if part.role == "weight") if model.scheme is not None else None
    for name, stored in model.carried.items() if numbers is not None else ():
        assert numbers is not None
        if len(stored) != len(numbers.dims) + len(numbers.extra):
            continue
        shape = [0, 0]
        for (dim, per), size in zip(numbers.dims, stored, strict=False):
            shape[dim] = size * per
        for weight in (name, *numbers.weights(name)):
            tensor = model.carried_tensor(weight, (shape[0], shape[1]))
            parts = [part for part in model.parts(tensor) if part.part is not None and not part.part.optional]
            whole = numbers.rename(weight) == name and len(parts) > 1
            if whole and all(model.carried.get(part.name) == part.shape for part in parts):
                found[weight] = tensor
    return found


def _exact(source: Checkpoint, dtype: str) -> bool:
    """Say whether a cast loses nothing: numbers of few bits times powers of two."""
    scales = [t for t in source.model.tensors.values() if t.part is not None and t.part.role == "scale"]
    powers = all(source.tensors[t.name].dtype in ("F8_E8M0", "U8") for t in scales if t.name in source.tensors)
    return powers and dtype != "float16"


def _plain_config(config: Mapping[str, Any], text: str | None, dtype: str) -> dict[str, Any]:
    """Write the config of plain weights: in one of a model with other parts, what it says of the language model under `text` too."""
    out = {key: value for key, value in config.items() if key != "quantization_config"}
    keys = [key for key in ("dtype", "torch_dtype") if key in out] or ["dtype"]
    if text is not None and isinstance(inner := out.get(text), Mapping):
        held = {key: value for key, value in inner.items() if key != "quantization_config"}
        out[text] = held | {key: dtype for key in ("dtype", "torch_dtype") if key in held}
    return out | dict.fromkeys(keys, dtype)


def as_cast(
    source: Checkpoint,
    model: Model,
    config: Mapping[str, Any],
    made: dict[str, TensorInfo],
    ops: dict[str, RowOp],
    note: str,
) -> CastCheckpoint:
    """Give a checkpoint's weights, some of them made on the way.

    Args:
        source: what is on disk; states of an optimizer are left out.
        model: of the result.
        config: its config.json.
        made: what is made, by name.
        ops: what makes it.
        note: in words.

    Returns:
        The checkpoint.
    """
    kept = {name: info for name, info in source.tensors.items() if name in model.tensors and name not in made}
    tensors = {name: info for name in model.tensors if (info := made.get(name) or kept.get(name)) is not None}
    values = {f.name: getattr(source, f.name) for f in fields(Checkpoint)}
    values |= {
        "model": model,
        "config": dict(config),
        "tensors": tensors,
        "pieces": {name: source.pieces[name] if name in kept else [] for name in tensors},
        "folder": None,  # its files' headers are of other types, so an export cuts files of its own
        "ops": ops,
    }
    return CastCheckpoint(**values, notes=(note,), reads=tuple(source.files))


@dataclass(frozen=True, eq=False, slots=True)
class Rounded:
    """Fills a band with what a function gives, rounded to a type."""

    rows: Rows
    dtype: np.dtype[Any]

    def __call__(self, band: Bytes, first: int) -> Bytes:
        values = np.ascontiguousarray(self.rows(first, first + len(band)).astype(self.dtype, copy=False))
        return values.view(np.uint8).reshape(len(band), -1)


def _to_fp8(source: Checkpoint) -> CastCheckpoint:
    model = source.model
    if model.quantised:
        said = model.scheme.name if model.scheme is not None else "quantised"
        raise MappingError(f"{source.root}: --dtype {FP8}: its weights are {said} already; leave --dtype out")
    chosen = [t for t in model.plain.values() if _to_quantise(t) and t.name in source.tensors]
    if not chosen or any(source.tensors[t.name].dtype not in PLAIN.values() for t in chosen):
        raise MappingError(f"{source.root}: --dtype {FP8}: casts weights of {', '.join(PLAIN)}, which this lacks")
    left = [t.name for t in model.plain.values() if len(t.shape) == 2 and not _to_quantise(t)]
    left += [name for name, shape in model.carried.items() if len(shape) == 2]
    config = dict(source.config) | {
        "quantization_config": {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": list(_BLOCK),
            "modules_to_not_convert": [name.removesuffix(".weight") for name in left],
        }
    }
    quantised = replace(model, config=model.family.language_config(config)).stored_as(
        (t.name for t in chosen), model.carried
    )
    ops: dict[str, RowOp] = {}
    made: dict[str, TensorInfo] = {}
    for weight in chosen:
        for tensor in quantised.parts(weight):
            scale = tensor.part is not None and tensor.part.role == "scale"
            kind = "F32" if scale else "F8_E4M3"
            rows = _scales(source, weight) if scale else _numbers(source, weight)
            ops[tensor.name] = Rounded(rows, numpy_dtype(kind))
            made[tensor.name] = TensorInfo(tensor.name, kind, tensor.shape)
    note = f"{len(chosen)} weights become FP8 with {_BLOCK[0]}x{_BLOCK[1]} block scales: rounded to 4 significant bits"
    return as_cast(source, quantised, config, made, ops, note)


def _to_quantise(tensor: GlobalTensor) -> bool:
    rule = tensor.rule
    return (
        len(tensor.shape) == 2
        and tensor.layer is not None
        and rule.role not in _PLAIN_ROLES
        and not (rule.transposed or rule.buffer or rule.role.startswith("linear."))
    )


def _numbers(source: Checkpoint, weight: GlobalTensor) -> Rows:
    def rows(first: int, last: int) -> Array:
        begin, end = first // _BLOCK[0] * _BLOCK[0], min(-(-last // _BLOCK[0]) * _BLOCK[0], weight.shape[0])
        values = read_rows(source, weight, begin, end).astype(np.float32)
        return fp8_blocks(values, _BLOCK, exponents=False)[0][first - begin : last - begin]

    return rows


def _scales(source: Checkpoint, weight: GlobalTensor) -> Rows:
    def rows(first: int, last: int) -> Array:
        # A row of blocks at a time: the whole weight need not be in memory.
        ends = [min((row + 1) * _BLOCK[0], weight.shape[0]) for row in range(first, last)]
        bands = (
            read_rows(source, weight, row * _BLOCK[0], end).astype(np.float32)
            for row, end in zip(range(first, last), ends, strict=True)
        )
        return np.concatenate([fp8_blocks(band, _BLOCK, exponents=False)[1] for band in bands])

    return rows
