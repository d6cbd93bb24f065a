"""Laying out a `torch_dist` checkpoint: chunks of stacked global tensors in `.distcp` files, and their `.metadata`.

Source: https://github.com/pytorch/pytorch/blob/v2.10.0/torch/distributed/checkpoint/metadata.py and filesystem.py (the
records of `.metadata`, and items as small torch.save archives);
https://github.com/NVIDIA/Megatron-LM/blob/d98e8a64/megatron/core/dist_checkpointing/strategies/torch.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from moeconv.dtypes import dtype
from moeconv.io.pickling import Call, Instance, dump_pickle
from moeconv.io.torch_archive import ArchiveLayout, lay_out_archive, tensor_value, whole_tensor
from moeconv.io.unpickle import Symbol
from moeconv.layout.degrees import stage_of_layers
from moeconv.layout.rect import Rect
from moeconv.megatron.dist import COMMON, CONFIG
from moeconv.megatron.dist_metadata import METADATA
from moeconv.megatron.export import Target, common_state
from moeconv.megatron.files import add_archive, last_row, padded_pieces, parts_dtype
from moeconv.megatron.names import dist_extra_states, dist_key
from moeconv.megatron.ranks import ranks_of_stage
from moeconv.megatron.run_args import TORCH_NAMES
from moeconv.megatron.tensors import MegatronTensor, Part, cut, megatron_tensors, mixed
from moeconv.plan import TargetFile

_DCP = "torch.distributed.checkpoint.metadata"


_Cover = tuple[list[Part], Part | None]  # what a chunk holds, and the row that fills its padding


@dataclass(frozen=True, slots=True)
class _Item:
    """An entry of `.metadata`: a key, the chunk's rectangle (None: a byte object), and where its archive is."""

    key: str
    rect: Rect | None
    file: str
    offset: int
    length: int


class _Writer:
    """Collects items into files, one file a rank that would have written them."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.files: dict[int, TargetFile] = {}
        self.items: list[_Item] = []
        self.tensors: dict[str, tuple[str, tuple[int, ...], list[Rect]]] = {}

    def _add(self, rank: int, key: str, rect: Rect | None, name: str, pickle: bytes, sizes: list[int]) -> ArchiveLayout:
        file = self.files.setdefault(rank, TargetFile(f"{self.folder}/__{rank}_0.distcp"))
        layout = lay_out_archive(name, pickle, ((str(i), size) for i, size in enumerate(sizes)), file.size)
        self.items.append(_Item(key, rect, file.name.rpartition("/")[2], file.size, layout.size))
        add_archive(file, layout)
        return layout

    def chunk(
        self, rank: int, key: str, kind: str, shape: tuple[int, ...], numbers: list[int], inner: Rect, cover: _Cover
    ) -> None:
        """Add a chunk of a stacked tensor: the rectangle `inner` of the layer and expert with these numbers."""
        rect = Rect((*numbers, *inner.offsets), (*(1 for _ in numbers), *inner.shape))
        value = whole_tensor("0", kind, rect.shape)
        size = rect.size * dtype(kind).itemsize
        layout = self._add(rank, key, rect, "archive", dump_pickle(tensor_value(value)), [size])
        file = self.files[rank]
        file.pieces += padded_pieces(key, inner.shape, *cover, kind, file.name, layout.records[0].begin)
        self.tensors.setdefault(key, (kind, shape, []))[2].append(rect)

    def object(self, rank: int, key: str, empty_tensor: bool) -> None:
        """Add a byte object: a list of one None, or of one empty byte tensor."""
        value = tensor_value(whole_tensor("0", "U8", (0,))) if empty_tensor else None
        self._add(rank, key, None, "archive", dump_pickle([value]), [0] if empty_tensor else [])


def torch_dist_files(target: Target) -> tuple[list[TargetFile], dict[str, bytes]]:
    """Lay out a checkpoint of the `torch_dist` format.

    Its tensors don't depend on the degrees; the chunks do, so that ranks of the same degrees read whole chunks.

    Args:
        target: what to export.

    Returns:
        The files with tensors, and small files with their contents, `metadata.json` last; names are relative to the root.

    Raises:
        LayoutError: the degrees don't divide the model.
    """
    writer, degrees, sizes = _Writer(target.folder), target.degrees, target.model.sizes
    stages, ranks = stage_of_layers(sizes["layers"], degrees), ranks_of_stage(degrees)
    local = sizes.get("experts", 0) // degrees.ep
    tensors = megatron_tensors(target.model, target.spec)
    for tensor in tensors:
        stage = stages[tensor.layer] if tensor.layer is not None else (0 if tensor.owner == "first" else degrees.pp - 1)
        expert = None if tensor.expert is None else tensor.expert // local
        for index in range(getattr(degrees, tensor.axis) if tensor.axis else 1):
            owner = next(
                i
                for i, r in enumerate(ranks)
                if (tensor.axis is None or getattr(r, tensor.axis) == index) and expert in (None, r.ep)
            )
            _chunks(target, writer, tensor, index, owner + stage * len(ranks))
    kinds = [{tensor.kind for tensor in tensors if tensor.layer == layer} for layer in range(sizes["layers"])]
    extra = dist_extra_states(kinds, target.spec, sizes.get("experts", 0), by_layer=mixed(target.model))
    for key, layer, number in extra:
        owner = next(i for i, r in enumerate(ranks) if not local or ".experts." not in key or r.ep == number // local)
        writer.object(owner + stages[layer] * len(ranks), key, target.spec == "te")
    config = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    config |= {"common_backend": "torch", "common_backend_version": 1}
    small = {METADATA: _metadata(writer), COMMON: common_state(target), CONFIG: json.dumps(config).encode()}
    files = [writer.files[rank] for rank in sorted(writer.files)]
    return files, {f"{target.folder}/{name}": data for name, data in small.items()}


def _chunks(target: Target, writer: _Writer, tensor: MegatronTensor, index: int, rank: int) -> None:
    """Add one rank's chunks of a tensor: one, or one for each half of a SwiGLU's first product."""
    sizes, degrees = target.model.sizes, target.degrees
    leading, numbers = [], []
    by_layer = mixed(target.model)
    if tensor.layer is not None and not by_layer:
        leading, numbers = [sizes["layers"]], [tensor.layer]
    if tensor.expert is not None:
        leading, numbers = [*leading, sizes["experts"]], [*numbers, tensor.expert]
    shape = list(tensor.shape)
    if tensor.padded:
        shape[0] = target.vocab_rows
    count = getattr(degrees, tensor.axis) if tensor.axis else 1
    half = shape[tensor.dim] // tensor.halves
    share = half // count
    key = dist_key(tensor, target.spec, by_layer=by_layer)
    buffer = any(target.model.tensors[part.tensor].rule.buffer for part in tensor.parts)
    for prefix, sources in [("", tensor.parts)] if buffer else _states(target, tensor.parts):
        kind = parts_dtype(prefix + key, sources, target.dtypes)
        last = last_row(sources, tensor.shape) if tensor.padded else None
        for number in range(tensor.halves):
            begin = number * half + index * share
            window = Rect.slab(shape, tensor.dim, begin, begin + share) if tensor.axis else Rect.whole(shape)
            writer.chunk(rank, prefix + key, kind, (*leading, *shape), numbers, window, (cut(sources, window), last))


def _states(target: Target, parts: Sequence[Part]) -> Iterator[tuple[str, Sequence[Part]]]:
    """Give the prefix of a tensor's key and what it holds: for the weight itself, then for each state of the optimizer."""
    yield "", parts
    for theirs, ours in (("param", "master"), ("exp_avg", "exp_avg"), ("exp_avg_sq", "exp_avg_sq")):
        if target.trainer is not None:
            # A run in fp32 has no masters besides its weights.
            names = [(p, f"optimizer.{ours}.{p.tensor}") for p in parts]
            held = [replace(p, tensor=name) if name in target.dtypes else p for p, name in names]
            yield f"optimizer.state.{theirs}.", held


def _metadata(writer: _Writer) -> bytes:
    """Make `.metadata`: each tensor's chunks, and where each item is."""
    entries: dict[str, Any] = {}
    for item in writer.items:
        if item.rect is None:
            entries[item.key] = Instance(Symbol(_DCP, "BytesStorageMetadata"), {})
        elif item.key not in entries:
            kind, shape, rects = writer.tensors[item.key]
            chunks = [
                _record("ChunkStorageMetadata", {"offsets": _size(r.offsets), "sizes": _size(r.shape)}) for r in rects
            ]
            fields = {"properties": _properties(kind), "size": _size(shape), "chunks": chunks}
            entries[item.key] = _record("TensorStorageMetadata", fields)
    storage = _Pairs((_index(item), _info(item)) for item in writer.items)
    meta = _record("StorageMeta", {"checkpoint_id": None, "save_id": None, "load_id": None, "modules": []})
    fields = {"state_dict_metadata": entries, "planner_data": None, "storage_data": storage, "storage_meta": meta}
    return dump_pickle(_record("Metadata", {**fields, "version": "1.0.0"}))


class _Pairs(dict[Any, Any]):
    """A dict by its pairs, whose keys need not be hashable here: they only are once they are loaded."""

    def __init__(self, pairs: Iterable[tuple[Any, Any]]) -> None:
        super().__init__()
        self._pairs = list(pairs)

    def items(self) -> Any:
        return self._pairs

    def __bool__(self) -> bool:
        return bool(self._pairs)


def _record(name: str, fields: Mapping[str, Any]) -> Instance:
    return Instance(Symbol(_DCP, name), dict(fields))


def _size(numbers: tuple[int, ...]) -> Call:
    return Call(Symbol("torch", "Size"), (numbers,))


def _properties(kind: str) -> Instance:
    layout = Call(Symbol("torch.serialization", "_get_layout"), ("torch.strided",))
    memory = Call(Symbol(_DCP, "_MEM_FORMAT_ENCODING"), (0,))
    state = (Symbol("torch", TORCH_NAMES[kind]), layout, False, memory, False)
    return Instance(Symbol(_DCP, "TensorProperties"), state)


def _index(item: _Item) -> Instance:
    offset = None if item.rect is None else _size(item.rect.offsets)
    return _record("MetadataIndex", {"fqn": item.key, "offset": offset, "index": None})


def _info(item: _Item) -> Instance:
    fields = {"relative_path": item.file, "offset": item.offset, "length": item.length}
    return Instance(Symbol("torch.distributed.checkpoint.filesystem", "_StorageInfo"), fields)
