"""The tensors of a Megatron-Core GPT model as rectangles of Hugging Face tensors: one table for all formats.

Megatron fuses what Hugging Face keeps apart. Each of its tensors, before any parallelism, is a list of `Part`s: a
rectangle of a Hugging Face tensor and where it lies. Ranks and chunks are cuts of that list, so reading and writing,
`torch` and `torch_dist`, all follow from it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from moeconv.dtypes import dtype
from moeconv.errors import LayoutError, MappingError
from moeconv.families.base import CARRIED, Axis, Model
from moeconv.io.torch_archive import row_major
from moeconv.layout.rect import Rect
from moeconv.pieces import Piece

# Megatron's kinds of tensors that hold one tensor of the model, by its role.
_ENDS = (("embedding", "embedding"), ("final_norm", "final_norm"), ("output", "head"))
_ATTENTION = (
    ("input_norm", "attention_norm"),
    ("proj", "attention.o"),
    ("q_layernorm", "attention.q_norm"),
    ("k_layernorm", "attention.k_norm"),
    ("sinks", "attention.sinks"),
)
_LATENT = (
    ("latent_input_norm", "attention_norm"),
    ("proj", "attention.o"),
    ("q_whole", "attention.q"),
    ("q_down", "attention.q_a"),
    ("latent_q_layernorm", "attention.q_a_norm"),
    ("q_up", "attention.q_b"),
    ("kv_down", "attention.kv_a"),
    ("latent_kv_layernorm", "attention.kv_a_norm"),
    ("kv_up", "attention.kv_b"),
)
_DOWN = ("q_down", "kv_down")  # which the local spec shares by tensor-parallel ranks, and Transformer Engine's doesn't
_ROUTER = (("router", "router"), ("router_bias", "router.bias"), ("shared_gate", "shared.router"))
_BIASES = (("proj_bias", "attention.o.bias"), ("router_linear_bias", "router.linear.bias"))


@dataclass(frozen=True, slots=True)
class Part:
    """A rectangle of a Hugging Face tensor, and the index of its first element in the tensor that stores it.

    Dimension d of the storing tensor runs along dimension `axes[d]` of the rectangle; None: along the same one. With a `view` the rectangle is
    one of the tensor in that shape (see `Piece.view`).
    """

    tensor: str
    rect: Rect
    at: tuple[int, ...]
    axes: tuple[int, ...] | None = None
    view: tuple[int, ...] | None = None

    @property
    def place(self) -> Rect:
        """The rectangle of the storing tensor that it fills."""
        shape = self.rect.shape
        return Rect(self.at, shape if self.axes is None else tuple(shape[axis] for axis in self.axes))

    def cut(self, inside: Rect, at: tuple[int, ...]) -> Part:
        """Give the part that fills a rectangle `inside` of its place, with its first element at `at`."""
        local = inside.within(self.place)
        offsets, shape = list(self.rect.offsets), list(self.rect.shape)
        for dim, axis in enumerate(self.axes or range(len(shape))):
            offsets[axis] += local.offsets[dim]
            shape[axis] = local.shape[dim]
        return replace(self, rect=Rect(tuple(offsets), tuple(shape)), at=at)

    def strides(self, stored: Sequence[int]) -> tuple[int, ...]:
        """Give the rectangle's strides where the storing tensor has these; those of dimensions of size 1 mean nothing."""
        own = [1] * len(self.rect.shape)
        for dim, axis in enumerate(self.axes or range(len(own))):
            own[axis] = stored[dim]
        return tuple(own)


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
        inside = part.place.intersect(window)
        if inside is not None:
            at = tuple(i - w + p for i, w, p in zip(inside.offsets, window.offsets, place, strict=True))
            out.append(part.cut(inside, at))
    return out


def place_parts(parts: Iterable[Part], kind: str, file: str, begin: int, strides: Sequence[int]) -> Iterator[Piece]:
    """Turn parts into pieces of a file.

    Args:
        parts: parts with positions in a stored tensor.
        kind: the stored tensor's safetensors dtype.
        file: the file's name.
        begin: the position of the stored tensor's first element, in bytes.
        strides: the stored tensor's strides, in elements.

    Yields:
        One piece for each part.
    """
    for part in parts:
        own = part.strides(strides)
        offset = sum(a * s for a, s in zip(part.at, strides, strict=True))
        dense = row_major(part.rect.shape)
        shown = zip(part.rect.shape, own, dense, strict=True)
        plain = all(n == 1 or s == d for n, s, d in shown)
        where = begin + offset * dtype(kind).itemsize
        yield Piece(part.tensor, kind, part.rect, file, where, None if plain else own, part.view)


def megatron_tensors(model: Model, spec: Literal["te", "local"] = "te") -> list[MegatronTensor]:
    """List the tensors of Megatron's form of a model, in the order of its state dict.

    Args:
        model: the model, by its family and config.
        spec: the layer spec; the local one shares among tensor-parallel ranks what leads to latent vectors.

    Returns:
        Its tensors; together their parts are every Hugging Face tensor exactly once.

    Raises:
        MappingError: Megatron-Core has no form for this family here, or the parts miss a tensor.
    """
    ends = {kind: _whole(model, kind, role, None) for kind, role in _ENDS}
    out = [*ends["embedding"]]
    for layer in range(model.sizes["layers"]):
        out += _layer(model, layer, spec)
    out += ends["final_norm"]
    out += [] if model.tied else ends["output"]
    covered: dict[str, int] = {}
    for part in (p for t in out for p in t.parts):
        covered[part.tensor] = covered.get(part.tensor, 0) + part.rect.size
    for tensor in model.tensors.values():
        if tensor.rule.role == CARRIED:
            continue
        if covered.pop(tensor.name, 0) != tensor.size and not model.optional(tensor):
            raise MappingError(
                f"{tensor.name}: Megatron-Core's form of {model.family.name} has no place for it ({tensor.rule.role})"
            )
    assert not covered, f"no such tensors: {list(covered)}"
    return out


def mixed(model: Model) -> bool:
    """Say whether a mixture has layers without experts; Megatron-Core then stores each layer under a key of its own."""
    return "experts" in model.sizes and len(model.moe_layers) < model.sizes["layers"]


def biased(model: Model) -> bool:
    """Say whether each linear layer has a bias, but for the output head: Megatron has one in all, or in queries, keys and values alone."""
    parts = [part for part in ("mlp", "expert", "shared") if model.has(f"{part}.down")]
    roles = [f"{part}.{name}" for part in parts for name in ("gate", "up", "gate_up", "down")]
    needed = ["attention.q", "attention.k", "attention.v", "attention.o", *filter(model.has, roles)]
    needed += ["router.linear"] if model.has("router") else []
    return all(model.has(f"{role}.bias") for role in needed)


def _layer(model: Model, layer: int, spec: str) -> Iterator[MegatronTensor]:
    latent, moe = model.has("attention.kv_a"), layer in model.moe_layers
    for kind, role in _LATENT if latent else _ATTENTION:
        for tensor in _whole(model, kind, role, layer):
            yield replace(tensor, axis="tp") if kind in _DOWN and spec == "local" else tensor
    if not latent:
        yield from _qkv(model, "qkv", "", layer)
        yield from _qkv(model, "qkv_bias", ".bias", layer)
    for kind, role in _BIASES if biased(model) else ():
        yield from _whole(model, kind, role, layer)
    norm = "mlp_norm" if moe else "dense_mlp_norm"
    yield from _whole(model, f"latent_{norm}" if latent else norm, "mlp_norm", layer)
    yield from _gated(model, "", "mlp", layer, None)
    for kind, role in _ROUTER:
        if kind != "shared_gate" or model.width("shared"):
            yield from _whole(model, kind, role, layer)
    yield from _gated(model, "shared_", "shared", layer, None)
    for expert in range(model.sizes["experts"] if moe else 0):
        yield from _gated(model, "expert_", "expert", layer, expert)


def _whole(model: Model, kind: str, role: str, layer: int | None) -> Iterator[MegatronTensor]:
    """A tensor that is one of the model's, shared by ranks as its rule says; none where the layer has no such."""
    tensor = model.find(role, layer)
    if tensor is None:
        return
    part = Part(tensor.name, Rect.whole(tensor.shape), (0,) * len(tensor.shape))
    split, where = tensor.rule.split, tensor.rule.where
    axis, dim, padded = (None, 0, False) if split is None else (split.axis, split.dim, split.rounded)
    yield MegatronTensor(kind, tensor.shape, (part,), axis, dim, padded=padded, layer=layer, owner=where)


def _qkv(model: Model, kind: str, suffix: str, layer: int) -> Iterator[MegatronTensor]:
    """The fused projection: for each query group its query heads, then its key head, then its value head.

    Source: https://github.com/NVIDIA/Megatron-LM/blob/d98e8a64/megatron/core/transformer/attention.py
    (SelfAttention.get_query_key_value_tensors).
    """
    tensors = [model.find(f"attention.{name}{suffix}", layer) for name in "qkv"]
    groups, parts, row = model.sizes["kv_heads"], [], 0
    held = [tensor for tensor in tensors if tensor is not None]
    if len(held) < len(tensors):  # a part of them is refused by the caller's count
        return
    inner = held[0].shape[1:]
    tail = (0,) * len(inner)
    for group in range(groups):
        for tensor in held:
            rows = tensor.shape[0] // groups
            parts.append(Part(tensor.name, Rect((group * rows, *tail), (rows, *inner)), (row, *tail)))
            row += rows
    yield MegatronTensor(kind, (row, *inner), tuple(parts), "tp", layer=layer)


def _gated(model: Model, prefix: str, part: str, layer: int, expert: int | None) -> Iterator[MegatronTensor]:
    """The two products of a gated feed-forward part, and their biases.

    `fc1` is gate then up, each shared by the ranks on its own; `fc2` is down.
    """
    down = model.find(f"{part}.down", layer, expert)
    if down is None or not down.size:
        return
    axis = down.rule.split.axis if down.rule.split is not None else None
    hidden, width = model.sizes["hidden"], model.width(part)
    fc1 = _first(model, part, "", layer, expert)
    fc2 = (Part(down.name, Rect.whole(down.shape), (0, 0), (1, 0) if down.rule.transposed else None),)
    yield MegatronTensor(prefix + "fc1", (2 * width, hidden), fc1, axis, 0, 2, layer=layer, expert=expert)
    yield MegatronTensor(prefix + "fc2", (hidden, width), fc2, axis, 1, layer=layer, expert=expert)
    if not biased(model):
        return
    bias = model.tensor(f"{part}.down.bias", layer, expert)
    parts = (Part(bias.name, Rect.whole(bias.shape), (0,)),)
    fc1 = _first(model, part, ".bias", layer, expert)
    yield MegatronTensor(prefix + "fc1_bias", (2 * width,), fc1, axis, 0, 2, layer=layer, expert=expert)
    yield MegatronTensor(prefix + "fc2_bias", (hidden,), parts, layer=layer, expert=expert)


def _first(model: Model, part: str, suffix: str, layer: int, expert: int | None) -> tuple[Part, ...]:
    """What the first product, or its bias, is made of: the gate's rows, then up's; where one matrix holds the two in turns, every second one."""
    width = model.width(part)
    both = model.find(f"{part}.gate_up{suffix}", layer, expert)
    out = []
    for half in range(2):
        found = both or model.tensor(f"{part}.{('gate', 'up')[half]}{suffix}", layer, expert)
        axes = (1, 0) if found.rule.transposed else tuple(range(len(found.shape)))
        at = (half * width, *(0 for _ in found.shape[1:]))
        if both is None:
            out.append(Part(found.name, Rect.whole(found.shape), at, axes))
            continue
        view = (*found.shape[:-1], width, 2)
        rect = Rect((*(0 for _ in found.shape), half), (*view[:-1], 1))
        out.append(Part(found.name, rect, at, axes, view))
    return tuple(out)


def padded_vocab(vocab: int, tp: int, divisor: int = 128) -> int:
    """Round a vocabulary up to a multiple of `divisor * tp`, as Megatron does.

    Source: https://github.com/NVIDIA/Megatron-LM/blob/d98e8a64/megatron/training/tokenizer/tokenizer.py
    (_vocab_size_with_padding).
    """
    multiple = divisor * tp
    return -(-vocab // multiple) * multiple
