"""The tensors of a Megatron-Core GPT model as rectangles of Hugging Face tensors: one table for all formats.

Megatron fuses what Hugging Face keeps apart. Each of its tensors, before any parallelism, is a list of `Part`s: a
rectangle of a Hugging Face tensor and where it lies. Ranks and chunks are cuts of that list, so reading and writing,
`torch` and `torch_dist`, all follow from it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from moeconv.dtypes import dtype
from moeconv.errors import LayoutError, MappingError
from moeconv.families.base import Model
from moeconv.io.torch_archive import row_major
from moeconv.layout.rect import Rect
from moeconv.pieces import Piece

Axis = Literal["tp", "etp"]
_LAYER = "model.layers.{}."
# Hugging Face names of the expert and router weights by model_type; everything else is named alike.
_MOE = {"mixtral": ("block_sparse_moe.gate.weight", "block_sparse_moe.experts.{}.", ("w1", "w3", "w2"))}
_DENSE = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class Part:
    """A rectangle of a Hugging Face tensor, and the index of its first element in the tensor that stores it."""

    tensor: str
    rect: Rect
    at: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class MegatronTensor:
    """A tensor of Megatron's model before any parallelism.

    `kind` names it (see `moeconv.megatron.names`); `shape` is without vocabulary padding. Ranks of `axis` share `dim`;
    `halves` is 2 where each rank holds its share of the first half followed by its share of the second (SwiGLU's gate
    and up); `padded` marks the vocabulary. `owner` is the part of the model that holds tensors without a layer.
    """

    kind: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    axis: Axis | None = None
    dim: int = 0
    halves: int = 1
    padded: bool = False
    layer: int | None = None
    expert: int | None = None
    owner: Literal["first", "layers", "last"] = "layers"

    def rank(self, index: int, count: int, vocab_rows: int | None = None) -> tuple[tuple[int, ...], tuple[Part, ...]]:
        """Give what one rank of the tensor's axis holds.

        Args:
            index: the rank along `axis`.
            count: the degree of `axis`.
            vocab_rows: rows of the vocabulary with padding, where `padded`.

        Returns:
            The shape of the rank's tensor, and its parts; padding rows are in no part.

        Raises:
            LayoutError: the dimension doesn't divide.
        """
        if self.axis is None:
            return self.shape, self.parts
        size = vocab_rows if self.padded and vocab_rows is not None else self.shape[self.dim]
        if size % (count * self.halves):
            raise LayoutError(f"{self.kind}: {size} elements of dimension {self.dim} don't divide over {count} ranks")
        half, share = size // self.halves, size // self.halves // count
        out: list[Part] = []
        for number in range(self.halves):
            slab = Rect.slab((*self.shape[: self.dim], size, *self.shape[self.dim + 1 :]), self.dim, 0, share)
            shift = [0] * len(self.shape)
            shift[self.dim] = number * half + index * share
            place = [0] * len(self.shape)
            place[self.dim] = number * share
            out += cut(self.parts, slab.shifted(shift), place)
        shape = list(self.shape)
        shape[self.dim] = share * self.halves
        return tuple(shape), tuple(out)


def cut(parts: Iterable[Part], window: Rect, place: Sequence[int] | None = None) -> list[Part]:
    """Cut parts to a window of the tensor that stores them.

    Args:
        parts: parts with positions in that tensor, which has as many dimensions as they have.
        window: the rectangle of it that is wanted.
        place: where the window's first element goes in the result; the origin by default.

    Returns:
        The parts inside the window, with positions in the result.
    """
    place = place or (0,) * len(window.shape)
    out = []
    for part in parts:
        inside = Rect(part.at, part.rect.shape).intersect(window)
        if inside is not None:
            local = inside.within(Rect(part.at, part.rect.shape))
            at = tuple(i - w + p for i, w, p in zip(inside.offsets, window.offsets, place, strict=True))
            out.append(Part(part.tensor, local.shifted(part.rect.offsets), at))
    return out


def place_parts(
    parts: Iterable[Part], kind: str, file: str, begin: int, strides: Sequence[int], *, reverse: bool = False
) -> Iterator[Piece]:
    """Turn parts into pieces of a file.

    Args:
        parts: parts with positions in a stored tensor.
        kind: the stored tensor's safetensors dtype.
        file: the file's name.
        begin: the position of the stored tensor's first element, in bytes.
        strides: the stored tensor's strides, in elements.
        reverse: the stored tensor holds the transpose of its parts (`at` is then in the parts' own order too).

    Yields:
        One piece for each part.
    """
    own = tuple(reversed(strides)) if reverse else tuple(strides)
    for part in parts:
        offset = sum(a * s for a, s in zip(part.at, own, strict=True))
        dense = row_major(part.rect.shape)
        shown = zip(part.rect.shape, own, dense, strict=True)
        plain = all(n == 1 or s == d for n, s, d in shown)
        yield Piece(part.tensor, kind, part.rect, file, begin + offset * dtype(kind).itemsize, None if plain else own)


def megatron_tensors(model: Model) -> list[MegatronTensor]:
    """List the tensors of Megatron's form of a model, in the order of its state dict.

    Args:
        model: the model, by its family and config.

    Returns:
        Its tensors; together their parts are every Hugging Face tensor exactly once.

    Raises:
        MappingError: Megatron-Core has no form for this family here, or the parts miss a tensor.
    """
    sizes, name = model.sizes, model.family.model_type
    if "experts" in sizes and name not in _MOE:
        raise MappingError(f"{model.family.name}: its expert names are unknown here; known are {', '.join(_MOE)}")
    hidden, vocab = sizes["hidden"], sizes["vocab"]
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    out = [_whole("embedding", embedding, (vocab, hidden), axis="tp", padded=True, owner="first")]
    for layer in range(sizes["layers"]):
        out += _layer(model, layer)
    out.append(_whole("final_norm", "model.norm.weight", (hidden,), owner="last"))
    if not model.flags.get("tied", False):
        out.append(_whole("output", head, (vocab, hidden), axis="tp", padded=True, owner="last"))
    covered: dict[str, int] = {}
    for part in (p for t in out for p in t.parts):
        covered[part.tensor] = covered.get(part.tensor, 0) + part.rect.size
    for tensor in model.tensors.values():
        if covered.pop(tensor.name, 0) != tensor.size and not model.optional(tensor):
            raise MappingError(f"{tensor.name}: Megatron-Core's form of {model.family.name} is not known here")
    assert not covered, f"no such tensors: {list(covered)}"
    return out


def _layer(model: Model, layer: int) -> Iterator[MegatronTensor]:
    sizes, prefix = model.sizes, _LAYER.format(layer)
    hidden, width = sizes["hidden"], sizes["heads"] * sizes["head_dim"]
    yield _whole("input_norm", prefix + "input_layernorm.weight", (hidden,), layer=layer)
    yield _whole("proj", prefix + "self_attn.o_proj.weight", (hidden, width), axis="tp", dim=1, layer=layer)
    yield from _qkv(model, layer)
    norm = "mlp_norm" if "experts" in sizes else "dense_mlp_norm"
    yield _whole(norm, prefix + "post_attention_layernorm.weight", (hidden,), layer=layer)
    if "experts" not in sizes:
        yield from _swiglu(prefix + "mlp.", _DENSE, "tp", model, layer, None)
        return
    router, expert_prefix, names = _MOE[model.family.model_type]
    yield _whole("router", prefix + router, (sizes["experts"], hidden), layer=layer)
    for expert in range(sizes["experts"]):
        yield from _swiglu(prefix + expert_prefix.format(expert), names, "etp", model, layer, expert)


def _whole(
    kind: str,
    name: str,
    shape: tuple[int, ...],
    *,
    axis: Axis | None = None,
    dim: int = 0,
    padded: bool = False,
    layer: int | None = None,
    owner: Literal["first", "layers", "last"] = "layers",
) -> MegatronTensor:
    part = Part(name, Rect.whole(shape), (0,) * len(shape))
    return MegatronTensor(kind, shape, (part,), axis, dim, padded=padded, layer=layer, owner=owner)


def _qkv(model: Model, layer: int) -> Iterator[MegatronTensor]:
    """The fused projection: for each query group its query heads, then its key head, then its value head.

    Source: https://github.com/NVIDIA/Megatron-LM/blob/d98e8a64/megatron/core/transformer/attention.py
    (SelfAttention.get_query_key_value_tensors).
    """
    sizes, prefix = model.sizes, _LAYER.format(layer) + "self_attn."
    groups, head = sizes["kv_heads"], sizes["head_dim"]
    queries = sizes["heads"] // groups * head
    bias = prefix + "q_proj.bias" in model.tensors
    for kind, suffix, inner in [("qkv", "weight", (sizes["hidden"],)), *([("qkv_bias", "bias", ())] if bias else [])]:
        parts, row, tail = [], 0, (0,) * len(inner)
        for group in range(groups):
            for name, rows in (("q_proj", queries), ("k_proj", head), ("v_proj", head)):
                rect = Rect((group * rows, *tail), (rows, *inner))
                parts.append(Part(f"{prefix}{name}.{suffix}", rect, (row, *tail)))
                row += rows
        yield MegatronTensor(kind, (row, *inner), tuple(parts), "tp", layer=layer)


def _swiglu(
    prefix: str, names: tuple[str, str, str], axis: Axis, model: Model, layer: int, expert: int | None
) -> Iterator[MegatronTensor]:
    """The two products of a SwiGLU: `fc1` is gate then up, each shared by the ranks on its own; `fc2` is down."""
    ffn, hidden = model.sizes["ffn"], model.sizes["hidden"]
    gate, up, down = (f"{prefix}{name}.weight" for name in names)
    whole = Rect.whole((ffn, hidden))
    fc1 = (Part(gate, whole, (0, 0)), Part(up, whole, (ffn, 0)))
    fc2 = (Part(down, Rect.whole((hidden, ffn)), (0, 0)),)
    kind = "fc" if expert is None else "expert_fc"
    yield MegatronTensor(kind + "1", (2 * ffn, hidden), fc1, axis, 0, 2, layer=layer, expert=expert)
    yield MegatronTensor(kind + "2", (hidden, ffn), fc2, axis, 1, layer=layer, expert=expert)


def padded_vocab(vocab: int, tp: int, divisor: int = 128) -> int:
    """Round a vocabulary up to a multiple of `divisor * tp`, as Megatron does.

    Source: https://github.com/NVIDIA/Megatron-LM/blob/d98e8a64/megatron/training/tokenizer/tokenizer.py
    (_vocab_size_with_padding).
    """
    multiple = divisor * tp
    return -(-vocab // multiple) * multiple
