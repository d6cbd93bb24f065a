"""Reading the `torch_dist` format: `.metadata` says which chunk of which tensor is where in the `.distcp` files."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

from moeconv.dtypes import dtype
from moeconv.errors import MappingError, SourceError
from moeconv.families.base import Model
from moeconv.io.decode import brief, parse_json
from moeconv.io.paths import check_inside, read_inside
from moeconv.io.torch_archive import read_archive, with_numbers
from moeconv.io.unpickle import TensorRef
from moeconv.layout.degrees import Degrees
from moeconv.layout.rect import Rect
from moeconv.megatron.args import RunArgs
from moeconv.megatron.dist_metadata import METADATA, Chunk, DistTensor, Metadata
from moeconv.megatron.names import EXTRA_STATE, LAYERS, TOP, Found, base_kind, parse
from moeconv.megatron.source import Collector, MegatronSource
from moeconv.megatron.tensors import MegatronTensor, cut, megatron_tensors, place_parts
from moeconv.megatron.training import read_trainer
from moeconv.pieces import Piece

COMMON, CONFIG = "common.pt", "metadata.json"
COMMON_STATE = "common_state/shard_0_1"
# How Megatron names the optimizer's tensors (its distributed optimizer, then its others), and how they are named here.
OPTIMIZER_STATES = {"param": "master", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq", "fp32_param": "master"}
_OPTIMIZER, _OPTIMIZERS = "optimizer.state.", ("optimizer.", "chained_")
_DROPPED = {
    "rng_state": "random states of one run's ranks",
    "rerun_state_machine": "state of one run",
    "common_state": "read as the run's arguments",
    "content_metadata": "read as the run's arguments",
}


def _without_config(folder: Path) -> str:
    """Tell a `torch_dist` save that was never completed from the formats that have no such file."""
    names = [*Metadata(folder).tensors] if os.path.lexists(folder / METADATA) else []
    # Those formats keep the model's state dict under a key; torch_dist has the names of its tensors at the top.
    if names and all(name.startswith(("model.", "model0.", "optimizer.")) for name in names):
        return (
            "is a checkpoint of --ckpt-format fsdp_dtensor or torch_dcp; torch and torch_dist are read here. Load it in the program "
            "that wrote it, and save it from there as torch_dist or in Hugging Face's form"
        )
    return f"has no {CONFIG}, which Megatron writes last: its save was never completed; take an older iteration with --iteration"


class DistReader:
    """The tensors and the common state of one iteration."""

    def __init__(self, folder: Path) -> None:
        """Read `.metadata`, the configuration and the common state.

        Raises:
            SourceError: a file is missing or damaged, or the save was never completed.
        """
        self.folder = folder
        if not os.path.lexists(folder / CONFIG):
            raise SourceError(f"{folder}: {_without_config(folder)}")
        config = parse_json(read_inside(folder, CONFIG), str(folder / CONFIG))
        if config.get("sharded_backend") != "torch_dist":
            raise SourceError(f"{folder}: its backend is {brief(config.get('sharded_backend'))}; expected torch_dist")
        self.metadata = Metadata(folder)
        self.tensors, self.objects = self.metadata.tensors, self.metadata.objects
        self.common = self._common()
        self.args = RunArgs(self.common.get("args"))

    def _common(self) -> dict[str, Any]:
        if os.path.lexists(self.folder / COMMON):
            root = with_numbers(read_archive(check_inside(self.folder, COMMON)))
        elif COMMON_STATE in self.objects:
            root = self.object(COMMON_STATE)
        else:
            return {}
        while isinstance(root, list) and len(root) == 1:
            root = root[0]
        if not isinstance(root, dict):
            raise SourceError(f"{self.folder}: its common state is no dict")
        return root

    def object(self, key: str) -> Any:
        """Read a byte object as data.

        Raises:
            SourceError: it is damaged, or no data.
        """
        chunk = self.metadata.chunk(key, None)
        return with_numbers(read_archive(self.folder / chunk.file, chunk.offset, chunk.length))

    def dtype(self) -> str:
        """Give the dtype of the weights: that of the embedding.

        Raises:
            MappingError: there is no embedding.
        """
        found = self.tensors.get("embedding.word_embeddings.weight")
        if found is None:
            raise MappingError(f"{self.folder}: has no embedding.word_embeddings.weight: no GPT model of Megatron's")
        return found.dtype

    def degrees(self) -> Degrees:
        """Give the degrees of the run that wrote the checkpoint, by its arguments; the tensors don't depend on them."""
        args = self.args
        pp = args.degree("pipeline_model_parallel_size")
        vpp = args.degree("virtual_pipeline_model_parallel_size") if pp > 1 else 1
        tp, ep = args.degree("tensor_model_parallel_size"), args.degree("expert_model_parallel_size")
        return Degrees(tp=tp, pp=pp, vpp=vpp, ep=ep, etp=args.whole("expert_tensor_parallel_size", tp))


def locate(
    reader: DistReader, root: Path, iteration: str, model: Model, config: Mapping[str, Any], *, optimizer: bool
) -> MegatronSource:
    """Find the rectangles of a Hugging Face model, and of its optimizer state, in a checkpoint's chunks.

    Args:
        reader: the checkpoint.
        root: its root; the pieces name files relative to it.
        iteration: the iteration's folder in it.
        model: the model that it should hold.
        config: its config.json.
        optimizer: also find the optimizer's state.

    Returns:
        The opened checkpoint.

    Raises:
        MappingError: a tensor is unknown, missing, or of another shape than the config implies; an optimizer's state
            is stored in a form that does not map to the model's tensors.
        IntegrityError: the chunks don't cover a tensor exactly once.
    """
    places = _Places(model, reader)
    collectors = {"": Collector()}
    for key, tensor in reader.tensors.items():
        if not optimizer and key.startswith(_OPTIMIZERS):
            continue
        state, name = _split_optimizer(key)
        collector = collectors.setdefault(state or "", Collector())
        for piece in places.pieces(tensor, name, iteration):
            collector.add(piece)
    pieces = collectors.pop("").finish(model, str(root / iteration))
    for state, collector in collectors.items():
        found = collector.finish(model, f"{root / iteration} (optimizer state {state})", buffers=False)
        pieces += [
            Piece(f"optimizer.{state}.{p.tensor}", p.dtype, p.rect, p.file, p.begin, p.strides, p.view) for p in found
        ]
    trainer = read_trainer(reader.common, reader.args, str(root / iteration)) if collectors else None
    # Keys of norms tell the specs apart, others with latent attention than without.
    end = "linear_kv_up_proj.layer_norm_weight" if model.has("attention.kv_a") else "pre_mlp_layernorm.weight"
    spec = "te" if any(key.endswith(end) for key in reader.tensors) else "local"
    experts = "grouped" if reader.args.get("moe_grouped_gemm") else "sequential"
    chunks = [chunk for tensor in reader.tensors.values() for chunk in tensor.chunks]
    return MegatronSource(
        root=root,
        iteration=iteration,
        fmt="torch_dist",
        spec=spec,
        experts=experts,
        args=reader.args,
        degrees=reader.degrees(),
        model=model,
        config=config,
        pieces=pieces,
        dropped=_dropped(reader, optimizer),
        trainer=trainer,
        archives=[(f"{iteration}/{c.file}", c.offset, c.length) for c in chunks],
    )


def _split_optimizer(key: str) -> tuple[str | None, str]:
    """Tell an optimizer's tensor from a model's.

    Raises:
        MappingError: the state is of a kind or a form that has no counterpart.
    """
    if not key.startswith(_OPTIMIZERS):
        return None, key
    state, _, name = key.removeprefix(_OPTIMIZER).partition(".")
    if not key.startswith(_OPTIMIZER) or state not in OPTIMIZER_STATES or parse(name) is None:
        raise MappingError(
            f"{key}: the optimizer state is stored by data-parallel rank or of an unknown kind, not by the model's "
            "tensors. Save it with --dist-ckpt-optim-fully-reshardable, or import the weights alone with --no-optimizer"
        )
    return OPTIMIZER_STATES[state], name


def _dropped(reader: DistReader, optimizer: bool) -> list[str]:
    out, states = [], 0
    for key in reader.objects:
        stem = key.partition("/")[0]
        if stem.endswith(EXTRA_STATE):
            states += 1
        elif stem in _DROPPED or stem.startswith("optimizer"):
            out.append(f"{key} ({_DROPPED.get(stem, 'state of the optimizer that belongs to no tensor')})")
        else:
            raise MappingError(f"{reader.folder}: holds the object {key}, which is none of Megatron's GPT model")
    if states:
        out.append(f"{states} {EXTRA_STATE} objects (state of the modules' kernels, not of the model)")
    if not optimizer and any(key.startswith(_OPTIMIZERS) for key in reader.tensors):
        out.append("optimizer state (--no-optimizer)")
    return out


class _Places:
    """What each stored tensor holds of the model."""

    def __init__(self, model: Model, reader: DistReader) -> None:
        self.model, self._reader = model, reader
        self._tensors = {(base_kind(t.kind), t.layer, t.expert): t for t in megatron_tensors(model)}

    def pieces(self, stored: DistTensor, name: str, folder: str) -> Iterator[Piece]:
        """Describe a stored tensor's chunks as pieces.

        Args:
            stored: the tensor.
            name: its key without an optimizer's prefix.
            folder: the iteration's folder, for the pieces' file names.

        Yields:
            The pieces; padding of the vocabulary is in none.

        Raises:
            MappingError: the model has no such tensor, or of another shape.
            SourceError: a chunk's item is damaged.
        """
        found = parse(name)
        kind = "" if found is None else found.kind
        half = {"_w": 0, "_v": 1}.get(kind[-2:])
        kind = kind[:-2] if half is not None else kind
        sizes = self.model.sizes
        leading = []
        if found is not None and name.startswith(LAYERS):
            leading += [range(sizes["layers"])] if found.layer is None else []
            stacked = kind.startswith("expert_") and found.expert is None
            leading += [range(sizes.get("experts", 0))] if stacked else []
        first = self._find(found, kind, 0, 0)
        if found is None or first is None:
            raise MappingError(
                f"{stored.key} in {self._reader.folder}: is no tensor of a {self.model.family.name} model"
            )
        shape = first.shape if half is None else (first.shape[0] // 2, *first.shape[1:])
        self._check(stored, (*map(len, leading), *shape), first.padded, len(leading))
        for chunk in stored.chunks:
            yield from self._chunk(stored, chunk, found, kind, half, len(leading), folder)

    def _find(self, found: Found | None, kind: str, layer: int, expert: int) -> MegatronTensor | None:
        if found is None or (kind == "output" and self.model.tied):
            return None
        if kind in TOP:
            return self._tensors.get((kind, None, None))
        number = (expert if found.expert is None else found.expert) if kind.startswith("expert_") else None
        return self._tensors.get((kind, layer if found.layer is None else found.layer, number))

    def _check(self, stored: DistTensor, expected: tuple[int, ...], padded: bool, lead: int) -> None:
        got = stored.shape
        fits = len(got) == len(expected) and (
            got[0] >= expected[0] and got[1:] == expected[1:] if padded else got == expected
        )
        if not fits:
            keys = ", ".join(f"{k}={v}" for k, v in self.model.sizes.items())
            hint = (
                "; Megatron-Core before v0.15 stored optimizer state in flat slices: load and save it with a later one, "
                "or import the weights alone with --no-optimizer"
            )
            raise MappingError(
                f"{stored.key} has shape {list(got)}; the config ({keys}) implies {list(expected)}"
                + (hint if stored.key.startswith(_OPTIMIZER) else "")
            )
        if stored.key.startswith(_OPTIMIZER) and stored.dtype != "F32":
            raise MappingError(
                f"{stored.key} is {stored.dtype}: optimizer state of reduced precision is not converted; import the weights "
                "alone with --no-optimizer"
            )

    def _chunk(
        self, stored: DistTensor, chunk: Chunk, found: Found, kind: str, half: int | None, lead: int, folder: str
    ) -> Iterator[Piece]:
        path = self._reader.folder / chunk.file
        archive = read_archive(path, chunk.offset, chunk.length)
        value = archive.root
        rect = chunk.rect
        if not isinstance(value, TensorRef) or value.shape != rect.shape or value.dtype != stored.dtype:
            raise SourceError(
                f"{path}: at byte {chunk.offset} expected a {stored.dtype} tensor {list(rect.shape)} of {stored.key}"
            )
        begin, inner = archive.begin(value), Rect(rect.offsets[lead:], rect.shape[lead:])
        for index in range(prod(rect.shape[:lead])):
            where: list[int] = []
            rest = index
            for n in reversed(rect.shape[:lead]):
                rest, digit = divmod(rest, n)
                where.insert(0, digit)
            numbers = [o + w for o, w in zip(rect.offsets[:lead], where, strict=True)]
            layer = numbers.pop(0) if found.layer is None and numbers else 0
            tensor = self._find(found, kind, layer, numbers.pop(0) if numbers else 0)
            assert tensor is not None
            parts = tensor.parts if half is None else (replace(tensor.parts[half], at=(0,) * len(tensor.shape)),)
            offset = sum(w * s for w, s in zip(where, value.strides[:lead], strict=True))
            item = begin + offset * dtype(stored.dtype).itemsize
            yield from place_parts(
                cut(parts, inner), stored.dtype, f"{folder}/{chunk.file}", item, value.strides[lead:]
            )
