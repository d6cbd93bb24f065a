"""A run's save of adapters as a PEFT folder: experts stacked, as transformers 5 keeps them, or each by its name on the hub."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from moeconv.adapters.delta import Array
from moeconv.adapters.peft_config import CONFIG_FILE, WEIGHTS_FILE
from moeconv.adapters.stacks import Stack, matrix_sizes, stacks
from moeconv.checkpoint import Checkpoint, model_of
from moeconv.convert import Options
from moeconv.dtypes import dtype
from moeconv.errors import MappingError, SourceError, WriteError
from moeconv.families.adapted import AdaptedModel, adapter_names
from moeconv.families.base import GlobalTensor, Model
from moeconv.io.hf_folder import CONFIG
from moeconv.io.safetensors import Header, encode_header
from moeconv.io.staging import Staging, check_space

Form = Literal["stacked", "experts"]
_PREFIX, _SUFFIX = "base_model.model.", ".weight"


@dataclass(frozen=True, slots=True)
class Matrix:
    """A tensor of the file."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    make: Callable[[], Array]


@dataclass
class PeftFolder:
    """What a PEFT folder will hold."""

    matrices: list[Matrix] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of the file of weights."""
        return self.header().file_size

    def header(self) -> Header:
        """Give the header of the file of weights."""
        return encode_header([(m.key, m.dtype, m.shape) for m in self.matrices], {"format": "pt"})


def plan_peft(save: Checkpoint, form: Form | None = None, base_name: str | None = None) -> PeftFolder:
    """Lay a save of adapters out as PEFT has it.

    Args:
        save: a run's save of adapters, opened.
        form: how routed experts' are written; None: stacked where the family has stacks.
        base_name: what the config calls the model; None: the path that the run loaded.

    Returns:
        The folder's contents; matrices are read when they are written.

    Raises:
        SourceError: it is no save of adapters.
        MappingError: PEFT has no form for something that was trained.
    """
    if save.adapter is None or not isinstance(save.model, AdaptedModel):
        raise SourceError(f"{save.root}: is {save.title} and no save of adapters")
    record, model = save.adapter, model_of(save.config, str(save.root / CONFIG))
    out, left = PeftFolder(), dict.fromkeys(sorted(save.model.adapted, key=list(model.plain).index))
    found = [stack for stack in stacks(model) if any(t.name in left for group in stack.groups for t in group)]
    if form == "stacked" and not found and any(model.plain[name].expert is not None for name in left):
        raise MappingError(f"--form stacked: {model.family.name} has no stacks of experts; leave it out")
    chosen = found if form != "experts" else []
    parts = _Patterns(record.rank, record.alpha, rslora=record.rslora)
    for module, held in _grouped(chosen).items():
        for place, stack in enumerate(held):
            out.matrices += _stacked(save, stack, module + ".base_layer" * (len(held) - 1 - place), record.rank)
            parts.add(stack, _kinds(save.model, stack))
            for group in stack.groups:
                for tensor in group:
                    left.pop(tensor.name, None)
    for name in left:
        module = name.removesuffix(_SUFFIX)
        for which, matrix in zip("AB", adapter_names(name), strict=True):
            info = save.tensors[matrix]
            out.matrices.append(
                _matrix(f"{module}.lora_{which}{_SUFFIX}", info.dtype, info.shape, _reads(save, matrix))
            )
    modules = _whole(save, model, out)
    out.matrices.sort(key=lambda matrix: (-dtype(matrix.dtype).itemsize, matrix.key))
    target_modules, target_parameters = _targets(model, list(left), chosen)
    out.config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name or record.base_path,
        "inference_mode": True,
        "r": record.rank,
        "lora_alpha": _plain(record.alpha),
        "use_rslora": record.rslora,
        "lora_dropout": 0.0 if target_parameters else record.dropout,  # peft has none for parameters
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "target_modules": target_modules,
        "target_parameters": target_parameters or None,
        "rank_pattern": parts.ranks,
        "alpha_pattern": parts.alphas,
        "modules_to_save": modules or None,
    }
    return out


def write_peft(folder: PeftFolder, out: Path, options: Options) -> None:
    """Write a PEFT folder, all or nothing.

    Args:
        folder: what `plan_peft` laid out.
        out: the folder to make.
        options: how to run; a killed run is started again.

    Raises:
        MoeconvError: anything is wrong; then `out` does not exist.
    """
    out = Path(os.path.abspath(out))
    config = (json.dumps(folder.config, indent=2) + "\n").encode()
    staging = Staging(out, {"config": config.decode()}, resume=options.resume, sync=options.sync)
    try:
        header = folder.header()
        check_space(staging.folder, header.file_size + len(config))
        told = options.progress(header.file_size) if options.progress else lambda _: None
        with open(staging.open(WEIGHTS_FILE, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), "wb") as file:
            file.write(header.raw)
            for matrix in folder.matrices:
                values = np.ascontiguousarray(matrix.make())
                assert values.shape == matrix.shape, matrix.key
                file.write(values.view(np.uint8).reshape(-1).data)
                told(values.nbytes)
        staging.finish(WEIGHTS_FILE, None)
        staging.write(CONFIG_FILE, config)
        staging.commit()
    except OSError as error:
        raise WriteError(f"{staging.folder}: can't be written: {error.strerror or error}") from None
    finally:
        staging.close()


def _matrix(key: str, dtype: str, shape: tuple[int, ...], make: Callable[[], Array]) -> Matrix:
    return Matrix(_PREFIX + key, dtype, shape, make)


def _reads(save: Checkpoint, name: str) -> Callable[[], Array]:
    return lambda: save.read(name)


def _grouped(chosen: Iterable[Stack]) -> dict[str, list[Stack]]:
    out: dict[str, list[Stack]] = {}
    for stack in chosen:
        out.setdefault(stack.module, []).append(stack)
    return out


def _kinds(model: AdaptedModel, stack: Stack) -> list[int]:
    """The places, in a group of a stack, of the weights that have adapters; the same for all experts."""
    return [place for place, tensor in enumerate(stack.groups[0]) if tensor.name in model.adapted]


def _stacked(save: Checkpoint, stack: Stack, module: str, rank: int) -> Iterator[Matrix]:
    """A and B of a stack: all experts' A below each other, B with an expert in every so manieth column."""
    assert isinstance(save.model, AdaptedModel)
    places, experts, first = _kinds(save.model, stack), len(stack.groups), stack.groups[0]
    ranks, inputs = rank * len(places), matrix_sizes(first[0])[0]
    outputs = [matrix_sizes(tensor)[1] for tensor in first]
    kind = save.tensors[adapter_names(first[places[0]].name)[0]].dtype

    def a() -> Array:
        return np.concatenate(
            [save.read(adapter_names(group[place].name)[0]) for group in stack.groups for place in places]
        )

    def b() -> Array:
        out = None
        for expert, group in enumerate(stack.groups):
            for number, place in enumerate(places):
                values = save.read(adapter_names(group[place].name)[1])
                out = np.zeros((sum(outputs), ranks, experts), values.dtype) if out is None else out
                row = sum(outputs[:place])
                out[row : row + outputs[place], number * rank : (number + 1) * rank, expert] = values
        assert out is not None
        return out.reshape(sum(outputs), ranks * experts)

    yield _matrix(f"{module}.lora_A{_SUFFIX}", kind, (experts * ranks, inputs), a)
    yield _matrix(f"{module}.lora_B{_SUFFIX}", kind, (sum(outputs), ranks * experts), b)


class _Patterns:
    """Ranks and alphas of stacks whose adapters are several beside each other: what is added keeps its scale."""

    def __init__(self, rank: int, alpha: float, *, rslora: bool) -> None:
        self.ranks: dict[str, int] = {}
        self.alphas: dict[str, float] = {}
        self._rank, self._alpha, self._rslora = rank, alpha, rslora

    def add(self, stack: Stack, places: list[int]) -> None:
        """Note a stack's; names of one kind differ in their layer alone, and all layers' kinds are alike or named one by one."""
        count = len(places)
        if count > 1:
            self.ranks[re.escape(stack.name)] = self._rank * count
            self.alphas[re.escape(stack.name)] = _plain(self._alpha * (math.sqrt(count) if self._rslora else count))


def _plain(value: float) -> float:
    """A number as JSON has it best: 16 and not 16.0."""
    return int(value) if float(value).is_integer() else value


def _short(chosen: list[str], every: list[str], words: int) -> list[str]:
    """Name what is chosen by the last words of the names, where these fit nothing else; else by whole names."""
    ends = list(dict.fromkeys(".".join(name.split(".")[-words:]) for name in chosen))
    hit = {name for name in every if any(name == end or name.endswith(f".{end}") for end in ends)}
    return ends if hit == set(chosen) else chosen


def _targets(model: Model, names: list[str], chosen: list[Stack]) -> tuple[list[str], list[str]]:
    """Say which modules and which parameters have adapters.

    peft takes modules that are called as the parts of experts were before transformers 5 for these: others of that name,
    such as shared experts', are named as parameters, which gives their adapters the same form.
    """
    every = list(stacks(model))
    parts = {_leaf(tensor.name) for stack in every for group in stack.groups for tensor in group}
    clash = [name for name in names if model.plain[name].expert is None and _leaf(name) in parts]
    plain = [name.removesuffix(_SUFFIX) for name in names if name not in clash]
    matrices = [(name, tensor) for name, tensor in model.plain.items() if len(tensor.shape) == 2]
    modules = [name.removesuffix(_SUFFIX) for name, tensor in matrices if tensor.expert is None or not chosen]
    parameters = _short([stack.name for stack in chosen], [stack.name for stack in every], 2)
    return _short(plain, modules, 1), parameters + clash


def _leaf(name: str) -> str:
    return name.removesuffix(_SUFFIX).rpartition(".")[2]


def _whole(save: Checkpoint, model: Model, out: PeftFolder) -> list[str]:
    """Add what was trained whole, and give its modules, of which PEFT saves all or nothing."""
    assert isinstance(save.model, AdaptedModel)
    modules: dict[str, list[GlobalTensor]] = {}
    for name in sorted(save.model.whole):
        modules.setdefault(name.rpartition(".")[0], []).append(model.plain[name])
    renamed = {a.parts[0]: a.name for a in model.family.aliases if not a.stack and len(a.parts) == 1}
    names = []
    for module, tensors in modules.items():
        held = {name for name in model.plain if name.rpartition(".")[0] == module}
        if any(t.expert is not None for t in tensors) or held != {t.name for t in tensors}:
            raise MappingError(
                f"{save.root}: {tensors[0].name} was trained whole, and PEFT saves whole modules alone; make a model of it with `moeconv merge`"
            )
        for tensor in tensors:
            template = renamed.get(tensor.rule.name, tensor.rule.name)
            key = template.replace("{layer}", str(tensor.layer))
            info = save.tensors[tensor.name]
            out.matrices.append(_matrix(key, info.dtype, info.shape, _reads(save, tensor.name)))
            names.append(key.rpartition(".")[0])
    return list(dict.fromkeys(names))
