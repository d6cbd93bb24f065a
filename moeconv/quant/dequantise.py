"""Quantised weights as plain numbers, some rows at a time: for each scheme what its maker's own reader computes.

Sources: MXFP4 and FP8 as transformers reads them (see `numbers`); NVFP4 and packed integers
https://github.com/vllm-project/compressed-tensors/tree/0.12.2/src/compressed_tensors (quantization/lifecycle/forward.py);
NVFP4 of ModelOpt https://github.com/NVIDIA/TensorRT-Model-Optimizer/blob/0.37.0/modelopt/torch/quantization/qtensor/nvfp4_tensor.py;
GPTQ https://github.com/ModelCloud/GPTQModel/blob/v4.2.5/gptqmodel/nn_modules/qlinear/__init__.py;
AWQ https://github.com/casper-hansen/AutoAWQ/blob/v0.2.9/awq/utils/packing_utils.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from moeconv.checkpoint import Checkpoint
from moeconv.errors import MappingError
from moeconv.families.base import GlobalTensor
from moeconv.families.quantised import IN
from moeconv.layout.rect import Rect
from moeconv.quant.numbers import (
    AWQ_ORDER,
    Array,
    fp4_to_float,
    fp8_to_float,
    mxfp4_to_bf16,
    scale_values,
    times_scales,
    unpack_words,
)

# Gives rows `first` to `last` of a weight as it is stored, in any float type.
Rows = Callable[[int, int], Array]
Parts = dict[str, GlobalTensor]
Dequantiser = Callable[[Checkpoint, GlobalTensor, Parts], Rows]


def dequantiser(source: Checkpoint) -> Dequantiser:
    """Choose what reads a checkpoint's quantised weights.

    Args:
        source: the checkpoint, whose config names a scheme.

    Returns:
        A function of the checkpoint, a weight and its parts by role, which gives the weight's rows.

    Raises:
        MappingError: no cast of the scheme is known.
    """
    scheme, said = source.model.scheme, source.model.config["quantization_config"]
    assert scheme is not None
    kind = next((name for name in _KINDS if scheme.name.startswith(name)), None)
    roles = {part.role for part in scheme.parts}
    if kind is None or not {"weight", "scale"} <= roles:
        known = "MXFP4, NVFP4, FP8 with scales, and packed integers of compressed-tensors, GPTQ and AWQ"
        raise MappingError(f"{source.root}: no cast of {scheme.name} to plain numbers is known; {known} can be cast")
    for key, right in _FORMS.get(kind, {}).items():
        if said.get(key) is not None and str(said[key]).lower() not in right:
            raise MappingError(
                f"{source.root}: config.json: {key} of quantization_config is {str(said[key])[:40]!r}, which packs numbers in another "
                f"order; {' and '.join(right)} can be cast. Convert the original repository, whose weights are plain"
            )
    return _KINDS[kind]


def read_rows(source: Checkpoint, tensor: GlobalTensor, first: int, last: int) -> Array:
    """Read rows of a stored tensor."""
    return source.read(tensor.name, Rect.slab(tensor.shape, 0, first, last))


def _mxfp4(source: Checkpoint, weight: GlobalTensor, parts: Parts) -> Rows:
    blocks, scales = parts["weight"], parts["scale"]
    held: list[Array] = []

    def rows(first: int, last: int) -> Array:
        if not weight.rule.transposed:
            return mxfp4_to_bf16(read_rows(source, blocks, first, last), read_rows(source, scales, first, last))
        # Rows of a transposed weight are columns of the blocks, whole groups of 32: all are read once, for the first.
        if not held:
            held[:] = [source.read(t.name) for t in (blocks, scales)]
        begin, end = first // 32, -(-last // 32)
        out = mxfp4_to_bf16(held[0][:, begin:end], held[1][:, begin:end]).T[first - begin * 32 : last - begin * 32]
        if last == weight.shape[0]:
            held.clear()
        return out

    return rows


def _fp8(source: Checkpoint, weight: GlobalTensor, parts: Parts) -> Rows:
    numbers, scales = parts["weight"], parts["scale"]
    per = [count for _, count in _dims(scales)]  # of each dimension along which there are several scales

    def rows(first: int, last: int) -> Array:
        values = fp8_to_float(read_rows(source, numbers, first, last))
        if len(per) < 2:  # one for the weight, or one a row
            scale = scale_values(source.read(scales.name))
            values *= scale.reshape(-1, 1)[first:last] if per else scale.reshape(())
            return values
        of_blocks = scale_values(read_rows(source, scales, first // per[0], -(-last // per[0])))
        return times_scales(values, of_blocks, (per[0], per[1]), first)

    return rows


def _nvfp4(source: Checkpoint, weight: GlobalTensor, parts: Parts) -> Rows:
    whole = parts["whole scale"]

    def rows(first: int, last: int) -> Array:
        packed = read_rows(source, parts["weight"], first, last)
        scales = scale_values(read_rows(source, parts["scale"], first, last))
        factor = source.read(whole.name).astype(np.float32).reshape(())
        # compressed-tensors divides by what ModelOpt multiplies with.
        scales = scales / factor if whole.name.endswith("weight_global_scale") else scales * factor
        values = fp4_to_float(packed)
        values *= np.repeat(scales, 16, axis=1)
        return values

    return rows


def _packed(source: Checkpoint, weight: GlobalTensor, parts: Parts) -> Rows:
    numbers, scales, zeros, order = (parts.get(role) for role in ("weight", "scale", "zeros", "order"))
    assert numbers is not None
    assert scales is not None
    per, scale_dims = _dims(numbers)[1][1], _dims(scales)
    bits, group = 32 // per, next((count for dim, count in scale_dims if dim == IN), None)
    half, columns = 1 << (bits - 1), weight.shape[1]
    chosen = source.read(order.name) if order is not None and order.name in source.tensors else None
    of_column = chosen if chosen is not None else np.arange(columns) // group if group is not None else None

    def rows(first: int, last: int) -> Array:
        values = unpack_words(read_rows(source, numbers, first, last), bits, 1)[:, :columns].astype(np.float32) - half
        scale = read_rows(source, scales, first, last) if scale_dims else source.read(scales.name)
        scale = scale if scale.ndim == 2 else scale.reshape(1, 1)
        if zeros is not None and zeros.name in source.tensors:
            begin, end = first // per, -(-last // per)
            zero = unpack_words(read_rows(source, zeros, begin, end), bits, 0)[first - begin * per : last - begin * per]
            zero = zero.astype(np.float32) - half
            values -= zero[:, of_column] if of_column is not None else zero
        return _scaled(values, scale[:, of_column] if of_column is not None else scale)

    return rows


def _dims(tensor: GlobalTensor) -> tuple[tuple[int, int], ...]:
    """Give a part's dimensions; see `Part`."""
    assert tensor.part is not None
    return tensor.part.dims


def _scaled(values: Array, scales: Array) -> Array:
    """Multiply whole numbers with their scales as a reader in the scales' own type does: exact, then rounded once to that type."""
    return (values * scales.astype(np.float32)).astype(scales.dtype)


def _columns(
    source: Checkpoint, weight: GlobalTensor, parts: Parts, take: Callable[[Mapping[str, Array], int, int], Array]
) -> Rows:
    """Give rows of a weight that is stored as [in, out]: its tensors are read once, for the first rows, and let go after the last."""
    held: dict[str, Array] = {}

    def rows(first: int, last: int) -> Array:
        if not held:
            held.update({role: source.read(t.name) for role, t in parts.items() if t.name in source.tensors})
        out = take(held, first, last).T
        if last == weight.shape[0]:
            held.clear()
        return out

    return rows


def _gptq(source: Checkpoint, weight: GlobalTensor, parts: Parts) -> Rows:
    said: Mapping[str, Any] = source.model.config["quantization_config"]
    per, group, count = _dims(parts["weight"])[0][1], _dims(parts["scale"])[0][1], weight.shape[1]
    bits, less = 32 // per, 0 if str(said.get("checkpoint_format")).lower() == "gptq_v2" else 1

    def take(held: Mapping[str, Array], first: int, last: int) -> Array:
        of_row = held["order"] if "order" in held else np.arange(count) // group
        values = unpack_words(held["weight"][:, first:last], bits, 0)[:count].astype(np.float32)
        begin, end = first // per, -(-last // per)
        zeros = unpack_words(held["zeros"][:, begin:end], bits, 1)[:, first - begin * per : last - begin * per]
        zeros = (zeros + less) & ((1 << bits) - 1)  # stored less one
        return _scaled(values - zeros[of_row].astype(np.float32), held["scale"][:, first:last][of_row])

    return _columns(source, weight, parts, take)


def _awq(source: Checkpoint, weight: GlobalTensor, parts: Parts) -> Rows:
    per, group = _dims(parts["weight"])[1][1], _dims(parts["scale"])[0][1]
    bits, of_row = 32 // per, np.arange(weight.shape[1]) // group
    if bits != 4:
        raise MappingError(
            f"{source.root}: AWQ of {bits} bits packs numbers in an order that is not known; 4 bits can be cast"
        )

    def take(held: Mapping[str, Array], first: int, last: int) -> Array:
        begin, end = first // per, -(-last // per)
        inside = slice(first - begin * per, last - begin * per)
        values, zeros = (
            unpack_words(held[r][:, begin:end], bits, 1, AWQ_ORDER)[:, inside] for r in ("weight", "zeros")
        )
        return _scaled(
            values.astype(np.float32) - zeros[of_row].astype(np.float32), held["scale"][:, first:last][of_row]
        )

    return _columns(source, weight, parts, take)


_KINDS: Mapping[str, Dequantiser] = {
    "MXFP4": _mxfp4,
    "NVFP4": _nvfp4,
    "FP8": _fp8,
    "packed int": _packed,
    "GPTQ": _gptq,
    "AWQ": _awq,
}
# What a config may say of how numbers are packed, by scheme.
_FORMS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "GPTQ": {"checkpoint_format": ("gptq", "gptq_v2")},
    "AWQ": {"version": ("gemm",)},
}
