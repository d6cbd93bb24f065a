"""An upcycling, planned: a checkpoint that is read and written like any other, though its tensors are made on the way."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from moeconv.checkpoint import Checkpoint
from moeconv.describe import describe
from moeconv.dtypes import numpy_dtype
from moeconv.errors import MappingError, RecipeError
from moeconv.families.base import Family, Model
from moeconv.io.carried import Content
from moeconv.io.hf_folder import CONFIG
from moeconv.io.torch_bin import is_computed
from moeconv.layout.rect import Rect
from moeconv.pieces import Piece, TensorInfo
from moeconv.quant import require_plain
from moeconv.sweep import Sweep, open_strips
from moeconv.upcycling.build import Builder, Made
from moeconv.upcycling.carriers import SOURCES, choose, left_out
from moeconv.upcycling.draws import Floats
from moeconv.upcycling.recipe import Recipe
from moeconv.upcycling.shapes import FORMULAS, advice, dense_shape, lossless, why_inexact
from moeconv.upcycling.similarity import similarity
from moeconv.upcycling.steps import Steps

REPORT = "upcycle.json"


@dataclass(frozen=True)
class Planned(Checkpoint):
    """A mixture that is not written yet.

    `sources` are the checkpoints that it is made of. `inexact` says why it differs from the source, empty where it computes the same;
    `lossless` whether scaling rounds nothing. `kinds` counts bytes by how they are made. `notes` are for the user.
    """

    sources: tuple[Checkpoint, ...] = ()
    recipe: Recipe = field(default_factory=Recipe)
    inexact: tuple[str, ...] = ()
    lossless: bool = True
    kinds: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def files(self) -> list[str]:
        """Every file that bytes come from, by absolute path."""
        return sorted(str((s.root / name).absolute()) for s in self.sources for name in s.files)

    @cached_property
    def carried_files(self) -> dict[str, Content]:
        """The source's small files, the carrier's config.json, and the report."""
        held = {name: content for name, content in self.sources[0].carried_files.items() if name != REPORT}
        held[CONFIG] = (json.dumps(self.config, indent=2) + "\n").encode()
        held[REPORT] = (json.dumps(self.report, indent=2) + "\n").encode()
        return held

    @cached_property
    def report(self) -> dict[str, Any]:
        """What is made, as JSON values: method, sizes, parameters, bytes by how they are made, similarity of experts by layer, exactness."""
        counts, source, sizes = describe(self), self.sources[0], self.model.sizes
        dense = {"folder": source.root.name, "family": source.family.name, "parameters": describe(source)["parameters"]}
        return {
            "method": self.recipe.method,
            "formula": FORMULAS[self.recipe.method],
            "exact": not self.inexact,
            "inexact_because": list(self.inexact),
            "lossless_scaling": self.lossless,
            "source": dense,
            "carrier": self.family.model_type,
            "experts": sizes["experts"],
            "top_k": sizes["top_k"],
            "expert_width": self.model.width("expert"),
            "parameters": counts["parameters"],
            "active_parameters": counts["active_parameters"],
            "bytes_by_kind": dict(self.kinds),
            "expert_similarity": {str(layer): value for layer, value in similarity(self).items()},
            "recipe": {key: value for key, value in asdict(self.recipe).items() if value not in (None, (), [])},
            "notes": list(self.notes),
        }

    def read(self, name: str, rect: Rect | None = None) -> np.ndarray[Any, Any]:
        """Make a part of a tensor; see `Checkpoint.read`.

        Raises:
            SourceError: a file can't be read.
        """
        info, op = self.tensors[name], self.ops.get(name)
        wanted = rect or Rect.whole(info.shape)
        out = np.empty((wanted.shape[0], *info.shape[1:]), numpy_dtype(info.dtype))
        sweep = Sweep(info)
        with open_strips(self.root, self.pieces[name], info.shape) as strips:
            for first in range(wanted.offsets[0], wanted.ends[0], sweep.band):
                last = min(first + sweep.band, wanted.ends[0])
                rows = sweep.read(strips, first, last)
                rows = op(rows, first) if op is not None else rows
                at = slice(first - wanted.offsets[0], last - wanted.offsets[0])
                out[at] = rows.view(out.dtype).reshape(out[at].shape)
        return out[(slice(None), *wanted.slices()[1:])]


def plan_upcycle(
    source: Checkpoint, recipe: Recipe, others: Sequence[Checkpoint] = (), hidden: Mapping[int, Floats] | None = None
) -> Planned:
    """Plan a mixture out of a dense checkpoint. Nothing is written; headers alone have been read.

    Args:
        source: a dense model's Hugging Face folder.
        recipe: what to make.
        others: the checkpoints that the recipe's `branches` name.
        hidden: router rows by layer [copies, hidden size], where the recipe takes them from texts.

    Returns:
        The mixture as a checkpoint.

    Raises:
        RecipeError: it can't be done as asked.
        MappingError: a tensor of the source would be lost.
    """
    check_source(source, "a dense checkpoint")
    require_plain(source.model, source.root, "upcycling")
    if source.family.model_type not in SOURCES:
        hint = "; enlarge a mixture with --method expand" if "experts" in source.model.sizes else ""
        raise RecipeError(f"{source.root}: is {source.family.name}; dense sources are {', '.join(SOURCES)}{hint}")
    _check_alike(source, others)
    shape = dense_shape(recipe, source.model)
    carrier, config = choose(recipe.carrier, source.model, shape)
    lost = left_out(source.model)
    model = Model.from_config(carrier, config)
    builder = Builder(source, others, recipe, shape, model, hidden or {})
    made = {name: m for name, tensor in model.tensors.items() if (m := builder.make(tensor)) is not None}
    computed = [name for name in source.tensors if is_computed(name)]
    unused = set(source.tensors) - {name for m in made.values() for name in m.uses} - set(computed)
    if unused:
        raise MappingError(f"{source.root}: {sorted(unused)[0]} would be lost: {carrier.name} has no place for it")
    factors = builder.factors()
    inexact = why_inexact(recipe, shape, factors)
    notes = advice(recipe, shape, not inexact)
    if computed:
        notes.append(f"{len(computed)} rotary_emb.inv_freq buffers are left out: readers compute them from config.json")
    if lost:
        notes.append(f"config.json: {', '.join(lost)}: {carrier.name} has no such field; left out")
    return assemble(
        (source, *others),
        recipe,
        config,
        model,
        made,
        inexact=tuple(inexact),
        lossless=lossless(factors),
        notes=tuple(notes),
    )


def assemble(
    sources: tuple[Checkpoint, ...],
    recipe: Recipe,
    config: dict[str, Any],
    model: Model,
    made: Mapping[str, Made],
    *,
    inexact: tuple[str, ...],
    lossless: bool,
    notes: tuple[str, ...],
) -> Planned:
    """Join what was found out about a mixture to a checkpoint.

    Args:
        sources: the checkpoints that it is made of.
        recipe: what was asked for.
        config: the carrier's config.json.
        model: the carrier's model.
        made: how each tensor is made.
        inexact: why it differs from the source.
        lossless: whether scaling rounds nothing.
        notes: for the user.

    Returns:
        The checkpoint.
    """
    tensors = {name: TensorInfo(name, m.dtype, model.tensors[name].shape) for name, m in made.items()}
    pieces: dict[str, list[Piece]] = {name: list(m.pieces) for name, m in made.items()}
    kinds: dict[str, int] = {}
    for name, m in made.items():
        kinds[m.kind] = kinds.get(m.kind, 0) + tensors[name].nbytes
    return Planned(
        root=sources[0].root,
        kind="planned",
        config=config,
        model=model,
        tensors=tensors,
        pieces=pieces,
        checksums={},
        carried=(),
        ops={name: Steps(m.dtype, m.steps) for name, m in made.items() if m.steps},
        sources=sources,
        recipe=recipe,
        inexact=inexact,
        lossless=lossless,
        kinds=kinds,
        notes=notes,
    )


def check_source(source: Checkpoint, what: str) -> None:
    """Refuse a source whose tensors are not whole in the files of a Hugging Face folder.

    Raises:
        RecipeError: it is such.
    """
    if source.folder is None:
        raise RecipeError(
            f"{source.root}: is {source.title}; expected {what} as a Hugging Face folder (`moeconv export-hf` makes one)"
        )


def _check_alike(source: Checkpoint, others: Sequence[Checkpoint]) -> None:
    for other in others:
        check_source(other, "each branch")
        if other.family is not source.family or other.tensors != source.tensors:
            names = set(other.tensors.items()) ^ set(source.tensors.items())
            where: Family = other.family
            raise RecipeError(
                f"{other.root}: is {where.name} and differs in {min(n for n, _ in names) if names else 'its family'} from {source.root}; "
                "mix needs checkpoints of one shape and dtype"
            )
