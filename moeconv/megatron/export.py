"""Laying out the files of a Megatron checkpoint: names, pickles and positions, before a byte is copied."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from moeconv.dtypes import dtype
from moeconv.families.base import Model
from moeconv.io.pickling import Call, Instance, dump_pickle
from moeconv.io.torch_archive import lay_out_archive, small_archive, tensor_value, whole_tensor
from moeconv.io.unpickle import Symbol, TensorRef
from moeconv.layout.degrees import Degrees, chunk_layers
from moeconv.megatron.files import add_archive, last_row, padded_pieces, parts_dtype
from moeconv.megatron.legacy import FILE
from moeconv.megatron.names import EXTRA_STATE, Experts, Spec, rank_extra_states, rank_name
from moeconv.megatron.ranks import Rank, legacy_ranks, rank_folder
from moeconv.megatron.run_args import make_args
from moeconv.megatron.tensors import MegatronTensor, Part, megatron_tensors, padded_vocab
from moeconv.megatron.training import SHARDING, optimizer_common, optimizer_storages, training_args
from moeconv.plan import TargetFile


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """What to export: the model and its dtypes, and how Megatron is to hold it.

    `trainer` is the content of trainer.json where the optimizer's state goes along. Without, Megatron starts from the
    weights at iteration 0.
    """

    model: Model
    dtypes: Mapping[str, str]
    "The safetensors dtype of each tensor, by hub name."
    degrees: Degrees
    spec: Spec = "te"
    experts: Experts = "grouped"
    trainer: Mapping[str, Any] | None = None

    @property
    def iteration(self) -> str:
        """What the tracker file names."""
        return "release" if self.trainer is None else str(self.trainer["iteration"])

    @property
    def folder(self) -> str:
        """The folder of the iteration."""
        return "release" if self.trainer is None else f"iter_{self.trainer['iteration']:07d}"

    def args(self, fmt: str) -> Instance:
        """Make the checkpoint's `args`."""
        kind = next(iter(self.dtypes.values()))
        args = make_args(self.model, self.degrees, self.spec, self.experts, kind, fmt)
        if self.trainer is not None:
            args.state.update(training_args(self.trainer))
        return args

    @property
    def vocab_rows(self) -> int:
        """Rows of the embedding with Megatron's padding."""
        return padded_vocab(self.model.sizes["vocab"], self.degrees.tp)


@dataclass(frozen=True, slots=True)
class _Held:
    """A tensor of a rank: name, shape with padding, parts, dtype, and the row that fills padding."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    dtype: str
    last: Part | None


def torch_files(target: Target) -> list[TargetFile]:
    """Lay out a checkpoint of the `torch` format, one file a rank.

    Args:
        target: what to export.

    Returns:
        The files, named relative to the checkpoint's root.

    Raises:
        LayoutError: the degrees don't divide the model, or the format has no name for a rank's file.
    """
    tensors = megatron_tensors(target.model, target.spec)
    by_layer: dict[int | None, list[MegatronTensor]] = {}
    for tensor in tensors:
        by_layer.setdefault(tensor.layer, []).append(tensor)
    args = target.args("torch")
    layers = chunk_layers(target.model.sizes["layers"], target.degrees)
    return [_rank_file(target, by_layer, layers, rank, args) for rank in legacy_ranks(target.degrees)]


def _rank_file(
    target: Target, by_layer: dict[int | None, list[MegatronTensor]], layers: list[range], rank: Rank, args: Instance
) -> TargetFile:
    file = TargetFile(f"{target.folder}/{rank_folder(rank, target.degrees)}/{FILE}")
    root: dict[str, Any] = {"args": args, "checkpoint_version": 3.0, "iteration": 0}
    storages: list[_Held] = []
    for chunk in range(target.degrees.vpp):
        entries: dict[str, Any] = {}
        for held in _chunk_tensors(target, by_layer, layers, rank, chunk):
            entries[held.name] = tensor_value(whole_tensor(str(len(storages)), held.dtype, held.shape))
            storages.append(held)
        stage = layers[chunk * target.degrees.pp + rank.pp]
        for name, empty in _extra_states(target, by_layer, rank, chunk, stage):
            entries[name] = None
            if empty:
                entries[name] = tensor_value(whole_tensor(str(len(storages)), "U8", (0,)))
                storages.append(_Held(name, (0,), (), "U8", None))
        key = f"model{chunk}" if target.degrees.vpp > 1 else "model"
        root[key] = Call(Symbol("collections", "OrderedDict"), (list(entries.items()),))
    root["num_floating_point_operations_so_far"] = 0
    refs = [whole_tensor(str(i), held.dtype, held.shape) for i, held in enumerate(storages)]
    layout = lay_out_archive("model_optim_rng", dump_pickle(root), ((r.storage.key, _nbytes(r)) for r in refs))
    add_archive(file, layout)
    for held, record in zip(storages, layout.records, strict=True):
        file.pieces += padded_pieces(held.name, held.shape, held.parts, held.last, held.dtype, file.name, record.begin)
    return file


def _chunk_tensors(
    target: Target, by_layer: dict[int | None, list[MegatronTensor]], layers: list[range], rank: Rank, chunk: int
) -> Iterable[_Held]:
    degrees, local = target.degrees, target.model.sizes.get("experts", 0) // target.degrees.ep
    first = chunk == 0 and rank.pp == 0
    last = chunk == degrees.vpp - 1 and rank.pp == degrees.pp - 1
    stage = layers[chunk * degrees.pp + rank.pp]
    chosen = [t for t in by_layer[None] if t.owner == "first" and first]
    for layer in stage:
        chosen += [t for t in by_layer[layer] if t.expert is None or t.expert // local == rank.ep]
    chosen += [t for t in by_layer[None] if t.owner == "last" and last]
    for tensor in chosen:
        number = None if tensor.layer is None else tensor.layer - stage.start
        expert = None if tensor.expert is None else tensor.expert - rank.ep * local
        yield _held(target, tensor, rank_name(tensor, target.spec, target.experts, number, expert), rank)
    if last and not first and target.model.tied:
        # With a pipeline the last stage holds its own copy of a tied embedding, under the output layer's name.
        tied = next(t for t in by_layer[None] if t.kind == "embedding")
        yield _held(target, tied, "output_layer.weight", rank)


def _held(target: Target, tensor: MegatronTensor, name: str, rank: Rank) -> _Held:
    count = getattr(target.degrees, tensor.axis) if tensor.axis else 1
    index = getattr(rank, tensor.axis) if tensor.axis else 0
    shape, parts = tensor.rank(index, count, target.vocab_rows)
    last = last_row(tensor.parts, tensor.shape) if tensor.padded else None
    return _Held(name, shape, parts, parts_dtype(name, tensor.parts, target.dtypes), last)


def _extra_states(
    target: Target, by_layer: dict[int | None, list[MegatronTensor]], rank: Rank, chunk: int, stage: range
) -> Iterable[tuple[str, bool]]:
    """List a chunk's `_extra_state` names, and whether each is an empty tensor (else None)."""
    degrees, te = target.degrees, target.spec == "te"
    local = target.model.sizes.get("experts", 0) // degrees.ep
    for number, layer in enumerate(stage):
        kinds = {tensor.kind for tensor in by_layer[layer]}
        for name in rank_extra_states(kinds, target.spec, target.experts, number, local):
            yield name, te
    if chunk == degrees.vpp - 1 and rank.pp == degrees.pp - 1:
        if te:
            yield f"decoder.final_layernorm.{EXTRA_STATE}", True
        yield f"output_layer.{EXTRA_STATE}", False


def _nbytes(ref: TensorRef) -> int:
    return ref.storage.numel * dtype(ref.dtype).itemsize


def common_state(target: Target) -> bytes:
    """Make `common.pt`: the run's arguments and state, and the flags by which a loader rebuilds the keys of its tensors."""
    content: dict[str, Any] = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
    trainer = target.trainer
    root = {"args": target.args("torch_dist"), "checkpoint_version": 3.0, "num_floating_point_operations_so_far": 0}
    root["iteration"] = 0 if trainer is None else trainer["iteration"]
    storages = {} if trainer is None else optimizer_storages(trainer)
    if trainer is not None:
        content |= {"distrib_optim_sharding_type": SHARDING, "distrib_optim_fully_reshardable_mem_efficient": False}
        root |= optimizer_common(trainer, target.degrees.ep > 1)
    return small_archive("common", root | {"content_metadata": content}, storages)
