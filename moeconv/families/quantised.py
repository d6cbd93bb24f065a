"""Quantised weights as data: which tensors a weight is stored as, and which part of each belongs to a part of the weight.

Shapes are those of a matrix [out, in]; block scales cover rectangles of it. Sources of the formats:
FP8 blocks https://huggingface.co/deepseek-ai/DeepSeek-V3/blob/main/README_WEIGHTS.md; MXFP4
https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/integrations/mxfp4.py; compressed-tensors
https://github.com/neuralmagic/compressed-tensors/tree/0.12.2/src/compressed_tensors/compressors; GPTQ and AWQ
https://github.com/ModelCloud/GPTQModel/tree/v4.2.5/gptqmodel/nn_modules/qlinear; ModelOpt
https://github.com/NVIDIA/TensorRT-Model-Optimizer/blob/0.37.0/modelopt/torch/export/quant_utils.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from moeconv.errors import MappingError

OUT, IN = 0, 1
_WEIGHT = ".weight"
_EVERYTHING = 2**62  # elements of a group that is the whole dimension


class BlockSplitError(MappingError):
    """A cut through a block of a quantised weight that shares a scale or a word."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One stored tensor of a quantised weight.

    `suffix` takes the place of `weight` in its name, `bare` follows a name without `weight`. Each of `dims` says which dimension of the
    weight a stored dimension runs along and how many of the weight's elements each of its own stands for; `extra` dimensions, of fixed
    lengths, follow. A part without `dims` is the same for the whole weight. An `optional` part need not be there.
    """

    role: str
    suffix: str
    bare: str | None = None
    dims: tuple[tuple[int, int], ...] = ()
    extra: tuple[int, ...] = ()
    optional: bool = False
    whole: tuple[int, ...] = ()
    "Dimensions along which the weight can't be cut at all."

    def rename(self, name: str) -> str | None:
        """Give the part's name for a weight's name; None where such a weight has no such part."""
        if name.endswith(_WEIGHT):
            return name[: -len(_WEIGHT)] + "." + self.suffix
        return name + self.bare if self.bare is not None else None

    def weights(self, name: str) -> list[str]:
        """Give the names of weights that a tensor of this name could be the part of."""
        found = []
        if self.suffix != _WEIGHT[1:] and name.endswith("." + self.suffix):
            found.append(name[: -len(self.suffix) - 1] + _WEIGHT)
        if self.bare and name.endswith(self.bare):
            found.append(name[: -len(self.bare)])
        return found

    def shape(self, weight: tuple[int, ...], *, transposed: bool) -> tuple[int, ...]:
        """Give the part's shape for a weight's shape; `transposed` says that the weight is [in, out]."""
        sizes = (-(-weight[self._dim(d, transposed)] // per) for d, per in self.dims)
        return (*sizes, *self.extra)

    def cut(
        self, weight: tuple[int, ...], offsets: tuple[int, ...], shape: tuple[int, ...], *, transposed: bool
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Give the rectangle of the part that belongs to a rectangle of the weight.

        Args:
            weight: the weight's whole shape, in elements.
            offsets: where the rectangle begins, in elements of the weight.
            shape: its lengths.
            transposed: whether the weight is [in, out].

        Returns:
            Offsets and lengths in the part.

        Raises:
            BlockSplitError: the rectangle ends inside a block.
        """
        for dim in self.whole:
            d = self._dim(dim, transposed)
            if shape[d] != weight[d]:
                raise BlockSplitError(f"{self.suffix} can't be cut along dimension {d} of the weight")
        begins, sizes = [], []
        for dim, per in self.dims:
            d = self._dim(dim, transposed)
            begin, end = offsets[d], offsets[d] + shape[d]
            if begin % per or (end % per and end != weight[d]):
                raise BlockSplitError(f"elements {begin} to {end} of dimension {d} are no whole blocks of {per}")
            begins.append(begin // per)
            sizes.append(-(-end // per) - begin // per)
        return (*begins, *(0 for _ in self.extra)), (*sizes, *self.extra)

    @staticmethod
    def _dim(dim: int, transposed: bool) -> int:
        return 1 - dim if transposed else dim


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """How a checkpoint's quantised weights are stored: `name` for messages, the parts, the first of them the weight's own numbers."""

    name: str
    parts: tuple[Part, ...]
    block: tuple[int, int] | None = None
    "Elements [out, in] that share a scale, where they are a rectangle."

    def weights(self, name: str) -> list[str]:
        """Give the names of weights that a tensor of this name could be a part of, told by the name alone."""
        return [weight for part in self.parts for weight in part.weights(name)]


def scheme_of(config: Mapping[str, Any]) -> Scheme | None:
    """Read from a config how weights are quantised.

    Args:
        config: config.json as parsed.

    Returns:
        The scheme; None where nothing is, or in a way that no rule describes (its tensors then are unknown names).

    Raises:
        MappingError: the parameters of the method mean nothing.
    """
    said = config.get("quantization_config")
    if said is None:
        return None
    if not isinstance(said, Mapping):
        raise MappingError(f"config.json: quantization_config is {str(said)[:80]}; expected an object")
    make = METHODS.get(_method(said))
    return make(said) if make is not None else None


def unknown_method(config: Mapping[str, Any]) -> str | None:
    """Give the name of the method that a config says its weights are quantised by, where no rule describes it.

    Args:
        config: config.json as parsed.

    Returns:
        The method's name; None where there is none, or one that is known.
    """
    said = config.get("quantization_config")
    if not isinstance(said, Mapping) or scheme_of(config) is not None:
        return None
    form = said.get("format") if _method(said) in METHODS else None  # a known method, in a form that no rule describes
    return " ".join(str(word)[:40] for word in (_method(said) or "an unnamed method", form) if word)


def _method(said: Mapping[str, Any]) -> str:
    return str(said.get("quant_method", said.get("quant_algo", ""))).lower()


def _count(said: Mapping[str, Any], key: str, silent: int | None = None) -> int:
    value = said.get(key, silent)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise MappingError(f"config.json: {key} of quantization_config is {value!r}; expected a number of at least 1")
    return value


def _blocks(part: str, suffix: str, block: Any, bare: str | None = None) -> Part:
    if (
        not isinstance(block, list | tuple)
        or len(block) != 2
        or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in block)
    ):
        raise MappingError(f"config.json: the block of quantization_config is {block!r}; expected two whole numbers")
    return Part(role=part, suffix=suffix, bare=bare, dims=((OUT, block[0]), (IN, block[1])))


_OWN = Part(role="weight", suffix="weight", bare="", dims=((OUT, 1), (IN, 1)))


def _fp8(said: Mapping[str, Any]) -> Scheme:
    block = said.get("weight_block_size")
    if block is None:  # one scale a weight
        scale = Part(role="scale", suffix="weight_scale_inv", bare="_scale_inv")
        inputs = Part(role="input scale", suffix="activation_scale", optional=True)
        return Scheme(name="FP8 with a scale a weight", parts=(_OWN, scale, inputs))
    scale = _blocks("scale", "weight_scale_inv", block, "_scale_inv")
    name = f"FP8 with {block[0]}x{block[1]} block scales"
    return Scheme(name=name, parts=(_OWN, scale), block=(block[0], block[1]))


def _mxfp4(said: Mapping[str, Any]) -> Scheme:
    numbers = Part(role="weight", suffix="weight_blocks", bare="_blocks", dims=((OUT, 1), (IN, 32)), extra=(16,))
    scale = Part(role="scale", suffix="weight_scales", bare="_scales", dims=((OUT, 1), (IN, 32)))
    return Scheme(name="MXFP4", parts=(numbers, scale), block=(1, 32))


def _compressed_tensors(said: Mapping[str, Any]) -> Scheme | None:
    groups = said.get("config_groups")
    first = next(iter(groups.values()), None) if isinstance(groups, Mapping) else None
    weights = first.get("weights") if isinstance(first, Mapping) else None
    if not isinstance(weights, Mapping):
        return None
    form = first.get("format") or said.get("format") if isinstance(first, Mapping) else None
    strategy, bits = weights.get("strategy"), _count(weights, "num_bits", 4)
    if form == "nvfp4-pack-quantized":
        return _nvfp4("weight_packed", "weight_global_scale", "input_global_scale", (1,))
    scale = _strategy_scale(weights, strategy)
    if scale is None:
        return None
    if form == "pack-quantized" and bits in (2, 4, 8):
        per = 32 // bits
        packed = Part(role="weight", suffix="weight_packed", dims=((OUT, 1), (IN, per)))
        size = Part(role="shape", suffix="weight_shape", extra=(2,))
        zeros = Part(role="zeros", suffix="weight_zero_point", dims=((OUT, per), scale.dims[-1]), optional=True)
        order = Part(role="order", suffix="weight_g_idx", dims=((IN, 1),), optional=True)
        parts = (packed, scale, size, *((zeros,) if strategy == "group" else ()), order)
        return Scheme(name=f"packed int{bits}", parts=parts)
    if form in ("float-quantized", "int-quantized", "naive-quantized"):
        inputs = Part(role="input scale", suffix="input_scale", extra=(1,), optional=True)
        return Scheme(name="FP8" if weights.get("type") == "float" else "int8", parts=(_OWN, scale, inputs))
    return None


def _strategy_scale(weights: Mapping[str, Any], strategy: Any) -> Part | None:
    if strategy == "group":
        return Part(role="scale", suffix="weight_scale", dims=((OUT, 1), (IN, _count(weights, "group_size"))))
    if strategy == "channel":
        return Part(role="scale", suffix="weight_scale", dims=((OUT, 1),), extra=(1,))
    if strategy == "tensor":
        return Part(role="scale", suffix="weight_scale", extra=(1,))
    if strategy == "block":
        return _blocks("scale", "weight_scale", weights.get("block_structure"))
    return None


def _nvfp4(packed: str, whole: str, inputs: str, scalar: tuple[int, ...]) -> Scheme:
    return Scheme(
        name="NVFP4",
        parts=(
            Part(role="weight", suffix=packed, dims=((OUT, 1), (IN, 2))),
            Part(role="scale", suffix="weight_scale", dims=((OUT, 1), (IN, 16))),
            Part(role="whole scale", suffix=whole, extra=scalar),
            Part(role="input scale", suffix=inputs, extra=scalar, optional=True),
        ),
        block=(1, 16),
    )


def _modelopt(said: Mapping[str, Any]) -> Scheme | None:
    algorithm = said.get("quant_algo")
    if algorithm == "NVFP4":
        return _nvfp4("weight", "weight_scale_2", "input_scale", ())
    if algorithm == "FP8":
        scale = Part(role="scale", suffix="weight_scale")
        return Scheme(name="FP8", parts=(_OWN, scale, Part(role="input scale", suffix="input_scale", optional=True)))
    return None


def _gptq(said: Mapping[str, Any]) -> Scheme:
    bits, group = _count(said, "bits", 4), said.get("group_size", 128)
    if bits not in (2, 4, 8):
        raise MappingError(f"config.json: {bits} bits of quantization_config; words of 32 bits hold 2, 4 or 8 each")
    per = 32 // bits
    # One group, or groups in the order of activation, where any row may belong to any: no cut of the rows keeps them whole.
    whole = (IN,) if said.get("desc_act") or group == -1 else ()
    rows = (IN, _EVERYTHING if group == -1 else _count(said, "group_size", 128))
    return Scheme(
        name=f"GPTQ int{bits} in groups of {group}" if group != -1 else f"GPTQ int{bits}",
        parts=(
            Part(role="weight", suffix="qweight", dims=((IN, per), (OUT, 1)), whole=whole),
            Part(role="zeros", suffix="qzeros", dims=(rows, (OUT, per)), whole=whole),
            Part(role="scale", suffix="scales", dims=(rows, (OUT, 1)), whole=whole),
            Part(role="order", suffix="g_idx", dims=((IN, 1),), optional=True, whole=whole),
        ),
    )


def _awq(said: Mapping[str, Any]) -> Scheme:
    bits = _count(said, "bits" if "bits" in said else "w_bit", 4)
    group = _count(said, "group_size" if "group_size" in said else "q_group_size", 128)
    if bits not in (2, 4, 8):
        raise MappingError(f"config.json: {bits} bits of quantization_config; words of 32 bits hold 2, 4 or 8 each")
    per = 32 // bits
    return Scheme(
        name=f"AWQ int{bits} in groups of {group}",
        parts=(
            Part(role="weight", suffix="qweight", dims=((IN, 1), (OUT, per))),
            Part(role="zeros", suffix="qzeros", dims=((IN, group), (OUT, per))),
            Part(role="scale", suffix="scales", dims=((IN, group), (OUT, 1))),
        ),
    )


METHODS: Mapping[str, Callable[[Mapping[str, Any]], Scheme | None]] = {
    "fp8": _fp8,
    "mxfp4": _mxfp4,
    "compressed-tensors": _compressed_tensors,
    "gptq": _gptq,
    "awq": _awq,
    "modelopt": _modelopt,
}
"""The methods that are known, by the name that config.json calls them."""
