"""Reading the `torch` format: one `model_optim_rng.pt` a rank, with local layer and expert numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeconv.dtypes import dtype
from moeconv.errors import MappingError, SourceError
from moeconv.families.base import Model
from moeconv.io.decode import MAX_NAME_CHARS, brief
from moeconv.io.paths import check_folder, check_inside
from moeconv.io.torch_archive import TorchArchive, read_archive, row_major
from moeconv.io.unpickle import TensorRef
from moeconv.layout.degrees import Degrees, chunk_layers
from moeconv.megatron.args import RunArgs
from moeconv.megatron.names import EXTRA_STATE, Found, Spec, base_kind, parse
from moeconv.megatron.ranks import Rank, legacy_ranks, parse_folders, rank_folder
from moeconv.megatron.source import Collector, MegatronSource
from moeconv.megatron.tensors import MegatronTensor, megatron_tensors, place_parts

FILE = "model_optim_rng.pt"
_MAX_FOLDER = 64
_NOT_WEIGHTS = {
    "optimizer": "optimizer state of the torch format is kept per rank; continue training from a torch_dist checkpoint",
    "opt_param_scheduler": "belongs to the optimizer state",
    "rng_state": "random states of one run's ranks",
    "rerun_state_machine": "state of one run",
}
_KNOWN = {
    "args",
    "checkpoint_version",
    "iteration",
    "num_floating_point_operations_so_far",
    "tokens",
    "content_metadata",
}


@dataclass(frozen=True, slots=True)
class _RankFile:
    folder: str
    archive: TorchArchive
    chunks: list[dict[str, Any]]


class LegacyReader:
    """The rank files of one iteration, with the degrees that they were written under."""

    def __init__(self, folder: Path) -> None:
        """Read the pickles of all rank files; no weights are read.

        Raises:
            SourceError: a file is missing or damaged.
            MappingError: a file holds no GPT model.
        """
        self.folder = folder
        check_folder(folder)
        names = dict(parse_folders([p.name for p in folder.iterdir() if p.is_dir() and len(p.name) < _MAX_FOLDER]))
        if not names:
            raise SourceError(f"{folder}: holds no mp_rank_* folder")
        self._files = {numbers: self._read(name) for name, numbers in names.items()}
        first = next(iter(self._files.values()))
        self.args = RunArgs(first.archive.root.get("args"))
        self.chunks = len(first.chunks)
        self.degrees = self._degrees()
        self.dropped = [f"{key} ({why})" for key, why in _NOT_WEIGHTS.items() if key in first.archive.root]

    def _read(self, name: str) -> _RankFile:
        archive = read_archive(check_inside(self.folder, f"{name}/{FILE}"))
        root = archive.root
        if not isinstance(root, dict) or not all(isinstance(key, str) for key in root):
            raise MappingError(f"{archive.path}: holds no checkpoint of Megatron's")
        chunks = [root["model"]] if "model" in root else []
        while not chunks or (chunks and f"model{len(chunks)}" in root and "model" not in root):
            if f"model{len(chunks)}" not in root:
                raise MappingError(f"{archive.path}: holds no model; its keys are {', '.join(map(str, root))[:200]}")
            chunks.append(root[f"model{len(chunks)}"])
        unknown = [k for k in root if k not in _KNOWN and k not in _NOT_WEIGHTS and not k.startswith("model")]
        if unknown or not all(isinstance(chunk, dict) for chunk in chunks):
            raise MappingError(
                f"{archive.path}: has unknown entries {brief(unknown)}; expected a GPT model's checkpoint"
            )
        for key in (key for chunk in chunks for key in chunk):
            if not isinstance(key, str) or len(key) > MAX_NAME_CHARS:
                raise MappingError(f"{archive.path}: {brief(key)} is no tensor's name")
        return _RankFile(name, archive, chunks)

    def _degrees(self) -> Degrees:
        numbers = list(self._files)
        length = {len(n) for n in numbers}
        if len(length) != 1:
            raise SourceError(f"{self.folder}: mixes folders of several layouts: {', '.join(self._names())}")
        tp = 1 + max(n[0] for n in numbers)
        pipeline = length == {3} or (length == {2} and self._second_is_stage())
        pp = 1 + max(n[1] for n in numbers) if pipeline else 1
        ep = 1 + max(n[-1] for n in numbers) if length == {3} or (length == {2} and not pipeline) else 1
        etp = self.args.degree("expert_tensor_parallel_size") if self.args.get("expert_tensor_parallel_size") else tp
        if max(tp, pp, ep) > len(numbers) or etp > tp:  # before anything is made for each rank
            raise SourceError(
                f"{self.folder}: tp {tp}, pp {pp}, ep {ep} and etp {etp} don't go with {len(numbers)} folders of ranks; "
                "copy the whole folder"
            )
        counts = self._layer_counts(pp, pipeline)
        even = len(set(counts)) == 1
        degrees = Degrees(tp=tp, pp=pp, vpp=self.chunks, ep=ep, etp=etp, pp_layers=None if even else tuple(counts))
        expected = {rank_folder(rank, degrees) for rank in legacy_ranks(degrees)}
        if expected != set(self._names()):
            missing, extra = sorted(expected - set(self._names())), sorted(set(self._names()) - expected)
            raise SourceError(
                f"{self.folder}: for {degrees} it lacks {', '.join(missing[:6]) or 'nothing'} and has "
                f"{', '.join(extra[:6]) or 'nothing'} besides; copy the whole folder"
            )
        return degrees

    def _names(self) -> list[str]:
        return [file.folder for file in self._files.values()]

    def _second_is_stage(self) -> bool:
        """Tell mp_rank_TT_PPP from mp_rank_TT_EEE: without a pipeline every file holds the embedding."""
        if self.args.get("pipeline_model_parallel_size") is not None:
            return self.args.degree("pipeline_model_parallel_size") > 1
        return not all("embedding.word_embeddings.weight" in file.chunks[0] for file in self._files.values())

    def _layer_counts(self, pp: int, pipeline: bool) -> list[int]:
        counts = []
        for chunk in range(self.chunks):
            for stage in range(pp):
                file = next((f for n, f in self._files.items() if not pipeline or n[1] == stage), None)
                if file is None:
                    raise SourceError(f"{self.folder}: has no folder of stage {stage}; copy the whole folder")
                if len(file.chunks) != self.chunks:
                    raise MappingError(
                        f"{file.archive.path}: has {len(file.chunks)} model chunks; others {self.chunks}"
                    )
                layers = {found.layer for found in map(parse, file.chunks[chunk]) if found and found.layer is not None}
                if layers != set(range(len(layers))) or not layers:
                    raise MappingError(f"{file.archive.path}: holds layers {brief(sorted(layers))}; expected 0 and on")
                counts.append(len(layers))
        return counts

    @property
    def num_layers(self) -> int:
        """Layers of the whole model, counted in the files."""
        counts = self.degrees.pp_layers
        if counts is not None:
            return sum(counts)
        return self._layer_counts(1, False)[0] * self.degrees.pp * self.degrees.vpp

    def tensors(self) -> Iterator[tuple[Rank, int, str, TensorRef, TorchArchive]]:
        """List every tensor: the rank, its model chunk, the name, the reference and the archive.

        Raises:
            MappingError: an entry is neither a tensor nor a module's extra state.
        """
        for rank in legacy_ranks(self.degrees):
            numbers = (
                rank.tp,
                *((rank.pp,) if self.degrees.pp > 1 else ()),
                *((rank.ep,) if self.degrees.ep > 1 else ()),
            )
            file = self._files[numbers]
            for chunk, entries in enumerate(file.chunks):
                for name, value in entries.items():
                    if name.endswith(EXTRA_STATE):
                        continue
                    if not isinstance(value, TensorRef):
                        raise MappingError(f"{file.archive.path}: {name} is no tensor")
                    yield rank, chunk, name, value, file.archive

    def dtype(self) -> str:
        """Give the dtype of the weights: that of the first one.

        Raises:
            MappingError: there is none.
        """
        for _, _, _, value, _ in self.tensors():
            return value.dtype
        raise MappingError(f"{self.folder}: its files hold no tensor")


def locate(reader: LegacyReader, root: Path, iteration: str, model: Model, config: Mapping[str, Any]) -> MegatronSource:
    """Find the rectangles of a Hugging Face model in the rank files.

    Args:
        reader: the rank files.
        root: the checkpoint's root; the pieces name files relative to it.
        iteration: the iteration's folder in it.
        model: the model that the files should hold.
        config: its config.json.

    Returns:
        The opened checkpoint.

    Raises:
        MappingError: a tensor is unknown, missing, or of another shape than the config implies.
        IntegrityError: the files don't cover a tensor exactly once.
    """
    degrees, layers = reader.degrees, chunk_layers(model.sizes["layers"], reader.degrees)
    fused = any(name.endswith(".layer_norm_weight") for _, _, name, _, _ in reader.tensors())
    spec: Spec = "te" if fused else "local"
    places = _Expected(model, degrees, spec)
    collector, experts = Collector(), set()
    seen: dict[tuple[Rank, int], set[tuple[str, int | None, int | None]]] = {}
    for rank, chunk, name, value, archive in reader.tensors():
        file = archive.path.relative_to(root).as_posix()
        found = parse(name)
        if found is None:
            raise MappingError(f"{name} in {file} is no tensor of a Megatron GPT model of {model.family.name}")
        experts |= {"sequential"} if ".local_experts." in name else {"grouped"} if ".experts." in name else set()
        stage = layers[chunk * degrees.pp + rank.pp]
        held = seen.setdefault((rank, chunk), set())
        for tensor in places.find(found, name, file, rank, chunk, stage):
            held.add((tensor.kind, tensor.layer, tensor.expert))
        for piece in places.pieces(found, name, file, rank, stage, value, archive):
            collector.add(piece)
    for (rank, chunk), held in seen.items():
        places.check_held(held, rank, chunk, layers[chunk * degrees.pp + rank.pp], rank_folder(rank, degrees))
    pieces = collector.finish(model, str(root / iteration))
    files = {archive.path.relative_to(root).as_posix() for *_, archive in reader.tensors()}
    archives: list[tuple[str, int, int | None]] = [(file, 0, None) for file in sorted(files)]
    kind = experts.pop() if len(experts) == 1 else "sequential"
    return MegatronSource(
        root,
        iteration,
        "torch",
        spec,
        kind,
        reader.args,
        degrees,
        model,
        config,
        pieces,
        collector.replicas,
        reader.dropped,
        archives,
    )


class _Expected:
    """What each rank must hold, and in which shape."""

    def __init__(self, model: Model, degrees: Degrees, spec: Spec) -> None:
        self.model, self.degrees = model, degrees
        tensors = megatron_tensors(model, spec)
        self._tensors = {(base_kind(t.kind), t.layer, t.expert): t for t in tensors}
        self._by_layer: dict[int | None, list[MegatronTensor]] = {}
        for tensor in tensors:
            self._by_layer.setdefault(tensor.layer, []).append(tensor)
        self.local_experts = model.sizes.get("experts", 0) // degrees.ep
        self.vocab_rows: int | None = None

    def find(self, found: Found, name: str, file: str, rank: Rank, chunk: int, layers: range) -> list[MegatronTensor]:
        """Find the model's tensors that a stored tensor holds: one, or those of all local experts."""
        layer = None if found.layer is None else layers.start + found.layer
        first = rank.ep * self.local_experts
        if found.kind.startswith("old_fc"):
            kind, numbers = "expert_" + found.kind[4:], range(first, first + self.local_experts)
            out = [self._tensors.get((kind, layer, e)) for e in numbers]
        else:
            expert = None if found.expert is None else first + found.expert
            kind = found.kind
            if kind == "output" and self.model.flags.get("tied", False):
                kind = "embedding"  # the last stage's own copy of a tied embedding
            out = [self._tensors.get((kind, layer, expert))]
            if found.expert is not None and found.expert >= self.local_experts:
                out = []
        tensors = [t for t in out if t is not None]
        if not tensors or len(tensors) != len(out):
            keys = ", ".join(f"{k}={v}" for k, v in self.model.sizes.items())
            raise MappingError(f"{name} in {file}: the model ({keys}; {self.degrees}) has no such tensor there")
        return tensors

    def pieces(
        self, found: Found, name: str, file: str, rank: Rank, layers: range, value: TensorRef, archive: TorchArchive
    ) -> Iterator[Any]:
        """Describe a stored tensor as pieces, after checking its shape."""
        tensors = self.find(found, name, file, rank, 0, layers)
        begin, tensor = archive.begin(value), tensors[0]
        if found.kind.startswith("old_fc"):
            yield from self._old_pieces(tensors, name, file, rank, value, begin)
            return
        count = getattr(self.degrees, tensor.axis) if tensor.axis else 1
        index = getattr(rank, tensor.axis) if tensor.axis else 0
        rows = value.shape[0] * count if tensor.padded and value.shape else None
        if rows is not None:
            self.vocab_rows = self.vocab_rows or rows
            if rows < tensor.shape[0] or rows != self.vocab_rows:
                raise MappingError(f"{name} in {file}: {rows} rows in all ranks; the vocabulary has {tensor.shape[0]}")
        shape, parts = tensor.rank(index, count, rows)
        self._check(name, file, value.shape, shape)
        yield from place_parts(parts, value.dtype, file, begin, value.strides)

    def _old_pieces(
        self, tensors: list[MegatronTensor], name: str, file: str, rank: Rank, value: TensorRef, begin: int
    ) -> Iterator[Any]:
        """The old GroupedMLP: all experts' transposed matrices in one tensor, one after another in memory.

        Source: https://github.com/NVIDIA/Megatron-LM/blob/core_v0.16.1/megatron/core/transformer/moe/experts.py
        (GroupedMLP.forward views weight1 as [experts, hidden, 2 * ffn] and weight2 as [experts, ffn, hidden]).
        """
        ranked = [t.rank(rank.etp, self.degrees.etp) for t in tensors]
        rows, columns = ranked[0][0]
        count, hidden = len(ranked), self.model.sizes["hidden"]
        shape = (hidden, count * rows) if tensors[0].halves == 2 else (count * columns, hidden)
        self._check(name, file, value.shape, shape)
        if value.strides != row_major(shape):
            raise MappingError(f"{name} in {file}: expected a contiguous tensor, got strides {list(value.strides)}")
        step = rows * columns * dtype(value.dtype).itemsize
        for number, (_, parts) in enumerate(ranked):
            yield from place_parts(parts, value.dtype, file, begin + number * step, (1, rows))

    def _check(self, name: str, file: str, got: tuple[int, ...], expected: tuple[int, ...]) -> None:
        if got != expected:
            keys = ", ".join(f"{k}={v}" for k, v in self.model.sizes.items())
            raise MappingError(
                f"{name} in {file} has shape {list(got)}; {keys} and {self.degrees} imply {list(expected)}"
            )

    def check_held(self, held: set[Any], rank: Rank, chunk: int, layers: range, folder: str) -> None:
        """Check that a rank's chunk holds every tensor that it must.

        Raises:
            MappingError: names the missing ones.
        """
        first, last = chunk == 0 and rank.pp == 0, chunk == self.degrees.vpp - 1 and rank.pp == self.degrees.pp - 1
        expected = {t for t in self._by_layer.get(None, []) if (first if t.owner == "first" else last)}
        for layer in layers:
            expected |= set(self._by_layer[layer])
        experts = range(rank.ep * self.local_experts, (rank.ep + 1) * self.local_experts)
        missing = [
            t.parts[0].tensor
            for t in expected
            if (t.kind, t.layer, t.expert) not in held and (t.expert is None or t.expert in experts)
        ]
        if missing:
            raise MappingError(f"{folder}: lacks {len(missing)} tensors of its part, such as that of {min(missing)}")
