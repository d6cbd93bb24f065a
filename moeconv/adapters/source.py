"""An adapter on disk, a run's save or a PEFT folder: what it does to each weight of a model, and nothing that it would leave out."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from moeconv.adapters.delta import Array, Delta
from moeconv.adapters.peft_config import CONFIG_FILE, WEIGHTS_FILE, PeftConfig, read_config
from moeconv.adapters.stacks import Stack, by_module, matrix_sizes
from moeconv.checkpoint import Checkpoint, open_checkpoint
from moeconv.errors import MappingError, SourceError
from moeconv.families.adapted import AdaptedModel, adapter_names, scale_of
from moeconv.families.base import GlobalTensor, Model
from moeconv.io.carried import CHAT_TEMPLATE, Content
from moeconv.io.manifest import MANIFEST
from moeconv.io.paths import check_folder, check_inside, read_inside
from moeconv.io.safetensors import read_header
from moeconv.layout.rect import Rect
from moeconv.pieces import NameMap, Piece, TensorInfo
from moeconv.reading import read_rect

_PREFIX = "base_model.model."
_MATRIX = re.compile(r"(?P<module>.+)\.lora_(?P<which>[AB])\.weight")
_SUFFIX = ".weight"
_CACHED = 8  # tensors: of a stack's, each expert needs a part


@dataclass
class Adapter:
    """What an adapter does: `deltas` are added to weights, `whole` weights take the place of the model's."""

    root: Path
    title: str
    deltas: dict[str, Delta] = field(default_factory=dict)
    whole: dict[str, Callable[[], Array]] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)
    save: Checkpoint | None = None
    """The opened save, where it is a run's."""

    @property
    def chat_template(self) -> Content | None:
        """The template that it was trained with, which whoever talks to the model needs; None where it brings none."""
        if self.save is not None:
            return self.save.carried_files.get(CHAT_TEMPLATE)
        return read_inside(self.root, CHAT_TEMPLATE) if (self.root / CHAT_TEMPLATE).is_file() else None


def open_adapter(path: Path, model: Model) -> Adapter:
    """Open an adapter.

    Args:
        path: a PEFT folder, a run's save of adapters, or its save folder (then the latest one).
        model: that it belongs to.

    Returns:
        What it does to the model; headers alone have been read.

    Raises:
        SourceError: it is no adapter, or no plain LoRA.
        MappingError: a matrix of it belongs to no weight of the model: nothing of an adapter is left out.
    """
    root = path / "latest" if (path / "latest" / MANIFEST).is_file() else path
    check_folder(root)
    if (root / MANIFEST).is_file():
        return _open_save(root.resolve(), model)
    if (root / CONFIG_FILE).is_file():
        return _Peft(root, model).adapter
    raise SourceError(f"{root}: is no adapter: it has neither {CONFIG_FILE} (PEFT) nor {MANIFEST} (a run's save)")


def _open_save(root: Path, model: Model) -> Adapter:
    save = open_checkpoint(root, adapters=True)
    if save.adapter is None or not isinstance(save.model, AdaptedModel):
        raise SourceError(f"{root}: is a whole model and no adapter")
    record, out = save.adapter, Adapter(root, "a run's save of adapters", save=save)
    out.files = [root / MANIFEST, *(root / name for name in save.files)]
    scale = scale_of(record.rank, record.alpha, rslora=record.rslora)
    read = lru_cache(_CACHED)(save.read)
    for weight in sorted(save.model.adapted):
        tensor, (a, b) = model.plain.get(weight), adapter_names(weight)
        shapes = save.tensors[a].shape[1], save.tensors[b].shape[0]
        if tensor is None or matrix_sizes(tensor) != shapes:
            raise MappingError(
                f"{root}: holds an adapter of {weight}, [{shapes[1]}, {shapes[0]}], which the model lacks or has in another shape; give "
                f"the model that it was trained on ({record.base_path})"
            )
        out.deltas[weight] = Delta(weight, partial(read, a), partial(read, b), scale, tensor.rule.transposed)
    for name in sorted(save.model.whole):
        out.whole[name] = partial(read, name)
    return out


class _Peft:
    """Reads a PEFT folder."""

    def __init__(self, root: Path, model: Model) -> None:
        self.root, self._model, self._names = root, model, NameMap(model)
        if not (root / WEIGHTS_FILE).is_file():
            hint = (
                "; it has the older .bin form: load and save it again with peft"
                if list(root.glob("adapter_model.bin"))
                else ""
            )
            raise SourceError(f"{root}: has no {WEIGHTS_FILE}{hint}")
        self._config: PeftConfig = read_config(root)
        path = check_inside(root, WEIGHTS_FILE)
        self._entries = {entry.name: entry for entry in read_header(path).entries}
        self._read = lru_cache(_CACHED)(self._load)
        self._stacks = by_module(model)
        self.adapter = Adapter(root, "a PEFT adapter", files=[path, check_inside(root, CONFIG_FILE)])
        pairs: dict[str, set[str]] = {}
        for name in self._entries:
            found = _MATRIX.fullmatch(name)
            if found is not None:
                pairs.setdefault(found["module"], set()).add(found["which"])
            else:
                self._take_whole(name)
        for module, which in pairs.items():
            if which != {"A", "B"}:
                raise MappingError(f"{path}: {module} has lora_{which.pop()} alone; the file is incomplete")
            self._take_pair(module)
        if not self.adapter.deltas and not self.adapter.whole:
            raise SourceError(f"{path}: holds no adapter")

    def _load(self, name: str) -> Array:
        entry = self._entries[name]
        info = TensorInfo(name, entry.dtype, entry.shape)
        piece = Piece(name, entry.dtype, Rect.whole(entry.shape), WEIGHTS_FILE, entry.begin)
        return read_rect(self.root, info, [piece], None)

    def _unapplied(self, name: str, why: str) -> MappingError:
        return MappingError(f"{self.root / WEIGHTS_FILE}: {name} {why}: it would be left out, so nothing was written")

    def _take_whole(self, name: str) -> None:
        """A weight that was trained whole (`modules_to_save`, biases)."""
        plain = name.removeprefix(_PREFIX).replace(".modules_to_save.", ".").replace(".base_layer.", ".")
        found = self._names.weights(plain)
        if ".lora_" in name or len(found) != 1:
            raise self._unapplied(name, "is no LoRA matrix and no weight of the model")
        tensor = self._model.plain[found[0]]
        if self._entries[name].shape != tensor.shape:
            raise self._unapplied(
                name, f"has shape {list(self._entries[name].shape)}, the model's has {list(tensor.shape)}"
            )
        self.adapter.whole[tensor.name] = lambda: self._read(name)

    def _take_pair(self, module: str) -> None:
        name = module.removeprefix(_PREFIX)
        found = self._names.alias(name + _SUFFIX)
        if found is None or not found[0].stack:
            weights = self._names.weights(name + _SUFFIX) or self._names.weights(name)
            if weights and (found is None or not found[0].dim):
                target = name + _SUFFIX if self._config.targets(name + _SUFFIX) else name
                self._add(module, target, [[self._model.plain[weight] for weight in weights]])
                return
        bare, depth = name.replace(".base_layer", ""), name.count(".base_layer")
        targeted = [stack for stack in self._stacks.get(bare, []) if self._config.targets(stack.name)]
        if depth >= len(targeted):
            raise self._unapplied(module, "belongs to no weight of the model")
        stack: Stack = targeted[len(targeted) - 1 - depth]  # each wraps the one before
        self._add(module, stack.name, [list(group) for group in stack.groups])

    def _add(self, module: str, target: str, groups: list[list[GlobalTensor]]) -> None:
        """Add an adapter of the weights of each expert (one, where there are none), which follow each other along their outputs."""
        key_a, key_b = (f"{module}.lora_{which}{_SUFFIX}" for which in "AB")
        count, first = len(groups), groups[0]
        inputs, outputs = matrix_sizes(first[0])[0], sum(matrix_sizes(tensor)[1] for tensor in first)
        shape_a, shape_b = self._entries[key_a].shape, self._entries[key_b].shape
        fits = len(shape_a) == len(shape_b) == 2 and shape_a[1] == inputs and shape_b[0] == outputs
        if not fits or shape_a[0] != shape_b[1] or shape_a[0] % count or not shape_a[0]:
            raise self._unapplied(
                module,
                f"has shapes {list(shape_a)} and {list(shape_b)}, and {target} takes [{count} * r, {inputs}] and [{outputs}, {count} * r]",
            )
        scale = self._config.scale(target, shape_a[0] // count)
        for expert, group in enumerate(groups):
            row = 0
            for tensor in group:
                rows = slice(row, row := row + matrix_sizes(tensor)[1])
                self._add_one(tensor, module, (expert, count), rows, scale)

    def _add_one(self, tensor: GlobalTensor, module: str, place: tuple[int, int], rows: slice, scale: float) -> None:
        if tensor.name in self.adapter.deltas:
            raise self._unapplied(module, f"adapts {tensor.name}, and so does {self.adapter.deltas[tensor.name].key}")
        expert, count = place
        key_a, key_b = (f"{module}.lora_{which}{_SUFFIX}" for which in "AB")

        def a() -> Array:
            # A has the experts' ranks below each other, B an expert in every so manieth column.
            found = self._read(key_a)
            return np.asarray(found.reshape(count, -1, found.shape[1])[expert])

        def b() -> Array:
            found = self._read(key_b)
            return np.ascontiguousarray(found.reshape(found.shape[0], -1, count)[rows, :, expert])

        self.adapter.deltas[tensor.name] = Delta(module, a, b, scale, tensor.rule.transposed)
