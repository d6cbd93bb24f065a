"""Which bytes, and which steps on them, make each tensor of the mixture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from moeconv.checkpoint import Checkpoint
from moeconv.families.base import GlobalTensor, Model
from moeconv.layout.rect import Rect
from moeconv.pieces import Piece
from moeconv.upcycling.carriers import Shape
from moeconv.upcycling.draws import Floats, Integers
from moeconv.upcycling.neurons import (
    Once,
    chosen_neurons,
    deal_by_clusters,
    deal_randomly,
    mean_row,
    neuron_sums,
    part,
)
from moeconv.upcycling.recipe import Recipe
from moeconv.upcycling.routers import drawn, scaled
from moeconv.upcycling.steps import AddNoise, Average, Gather, Given, Redraw, Scale, Step

NEURON_DIM = {"gate": 0, "up": 0, "down": 1}
_NOISE_STD = 1e-3


@dataclass(frozen=True, slots=True)
class Made:
    """How a tensor is made: of these pieces, by these steps, of the source's tensors `uses` (per checkpoint, the source first)."""

    dtype: str
    pieces: tuple[Piece, ...] = ()
    steps: tuple[Step, ...] = ()
    uses: tuple[str, ...] = ()
    kind: str = "copied"


@dataclass
class Builder:
    """Makes the tensors of a mixture out of a dense model's; `hidden` holds router rows by layer where a router takes them."""

    source: Checkpoint
    others: Sequence[Checkpoint]
    recipe: Recipe
    shape: Shape
    target: Model
    hidden: Mapping[int, Floats] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._sums: dict[tuple[int, str], Once[np.ndarray[Any, np.dtype[np.float64]]]] = {}
        self._deals: dict[int, Once[Integers]] = {}
        for layer in sorted(self.shape.layers):
            for matrix in NEURON_DIM:
                name = self._mlp(layer, matrix)
                self._sums[layer, matrix] = Once(partial(neuron_sums, self.source, name, NEURON_DIM[matrix]))
            self._deals[layer] = Once(partial(self._deal, layer))

    def make(self, tensor: GlobalTensor) -> Made | None:
        """Say how a tensor is made; None where the source does not store it (a tied output head)."""
        role = tensor.rule.role
        part_of, _, matrix = role.partition(".")
        if part_of == "expert":
            return self._expert(tensor, matrix)
        if role == "router":
            return self._router(tensor)
        if role in ("router.bias", "shared.router"):
            kind = "F32" if role == "router.bias" else self._dtype(tensor)
            return Made(kind, (), (Given(lambda: np.zeros(tensor.shape, np.float32)),), kind="zero")
        if part_of == "shared":
            factor = 2.0 if self.target.has("shared.router") and matrix == "down" else 1.0
            return self._cut(tensor, matrix, 0, factor)
        own = self.source.model.find(role, tensor.layer)
        return self._keep(tensor, own.name) if own is not None else None

    def _mlp(self, layer: int | None, matrix: str) -> str:
        return self.source.model.tensor(f"mlp.{matrix}", layer).name

    def _dtype(self, tensor: GlobalTensor) -> str:
        return self.source.tensors[self._mlp(tensor.layer, "gate")].dtype

    def _keep(self, tensor: GlobalTensor, name: str) -> Made | None:
        if name not in self.source.tensors:
            return None
        info = self.source.tensors[name]
        piece = part(self.source, name, Rect.whole(info.shape), tensor.name)
        if self.others and self.recipe.average:
            return Made(info.dtype, (piece,), (Average(tuple(self.others), name),), (name,), "averaged")
        return Made(info.dtype, (piece,), (), (name,))

    def _cut(
        self, tensor: GlobalTensor, matrix: str, first: int, factor: float, source: Checkpoint | None = None
    ) -> Made:
        """Take the neurons from `first` on, as many as the tensor has, and scale them."""
        source, dim = source or self.source, NEURON_DIM[matrix]
        name = self._mlp(tensor.layer, matrix)
        count = tensor.shape[dim]
        rect = Rect.slab(source.tensors[name].shape, dim, first, first + count)
        pieces = (part(source, name, rect, tensor.name),) if count else ()
        steps = (Scale(factor),) if factor != 1 and count else ()
        return Made(source.tensors[name].dtype, pieces, steps, (name,), "scaled" if steps else "copied")

    def _expert(self, tensor: GlobalTensor, matrix: str) -> Made:
        recipe, shape = self.recipe, self.shape
        assert tensor.expert is not None
        assert tensor.layer is not None
        if recipe.method == "split":
            name, expert = self._mlp(tensor.layer, matrix), tensor.expert
            deal = self._deals[tensor.layer]
            steps: tuple[Step, ...] = (Gather(self.source, name, NEURON_DIM[matrix], lambda: deal()[expert]),)
            factor = self.factors()[matrix]
            steps += (Scale(factor),) if factor != 1 else ()
            return Made(self._dtype(tensor), (), steps, (name,), "dealt out")
        if recipe.method == "mix":
            made, first = self._cut(tensor, matrix, 0, 1.0, self._origin(tensor.expert)), 0
        else:
            first = (shape.shared + tensor.expert % shape.granularity) * shape.width
            made = self._cut(tensor, matrix, first, self.factors()[matrix])
        step = self._change(tensor, matrix, first)
        if step is None:
            return made
        return replace(made, steps=(step, *made.steps), kind="redrawn" if recipe.method == "drop" else "noised")

    def _change(self, tensor: GlobalTensor, matrix: str, first: int) -> Step | None:
        recipe = self.recipe
        if recipe.method == "noise" or recipe.noise_std:
            std = recipe.noise_std if recipe.noise_std is not None else _NOISE_STD
            return AddNoise(recipe.seed, tensor.name + " noise", std) if std else None
        if recipe.method != "drop":
            return None
        index = self.dropped(tensor, matrix)
        assert tensor.layer is not None
        hidden = tensor.shape[1 - NEURON_DIM[matrix]]
        sums = self._sums[tensor.layer, matrix]

        def moments() -> tuple[float, float]:
            total, squares = (float(row[first + index].sum()) for row in sums())
            count = len(index) * hidden
            mean = total / count
            return mean, max(squares / count - mean * mean, 0.0) ** 0.5

        return Redraw(recipe.seed, tensor.name + " redrawn", NEURON_DIM[matrix], index, moments)

    def dropped(self, tensor: GlobalTensor, matrix: str) -> Integers:
        """Give the neurons of an expert that drop draws anew: one set for its three matrices, unless each is to draw its own."""
        what = f"layer {tensor.layer} expert {tensor.expert}" + (f" {matrix}" if self.recipe.drop_per_matrix else "")
        return chosen_neurons(self.recipe.seed, what + " dropped", self.shape.width, self.recipe.drop_ratio)

    def _origin(self, expert: int) -> Checkpoint:
        """Give the checkpoint that an expert of mix comes from."""
        assigned = self.recipe.assignment or range(1 + len(self.others))
        return [self.source, *self.others][assigned[expert % len(assigned)]]

    def factors(self) -> dict[str, float]:
        """Give the factor on each matrix: together they make up for routing weights that sum to less than each expert's share."""
        recipe, shape = self.recipe, self.shape
        total = float(shape.experts if recipe.method == "split" else shape.granularity)
        if not shape.renormalize:
            total *= shape.experts / shape.top_k
        takers = {"down": ("down",), "up_down": ("up", "down"), "all": ("gate", "up", "down"), "none": ()}
        shared = takers[recipe.scale_placement]
        return {matrix: total ** (1 / len(shared)) if matrix in shared else 1.0 for matrix in NEURON_DIM}

    def _deal(self, layer: int) -> Integers:
        name, seed = self._mlp(layer, "gate"), self.recipe.seed
        if self.recipe.partition == "clusters":
            return deal_by_clusters(self.source, name, self.shape.experts, seed)
        return deal_randomly(seed, f"layer {layer} dealt", self.source.tensors[name].shape[0], self.shape.experts)

    def _router(self, tensor: GlobalTensor) -> Made:
        rows = Once(partial(self._rows, tensor))
        return Made(
            self._dtype(tensor), (), (Given(rows),), kind="drawn" if self.recipe.router != "hidden" else "from texts"
        )

    def _rows(self, tensor: GlobalTensor) -> Floats:
        recipe, shape = self.recipe, self.shape
        assert tensor.layer is not None
        experts, hidden = tensor.shape
        std = recipe.router_std if recipe.router_std is not None else 0.02
        if recipe.router == "centroid":
            return scaled(np.stack([self._centroid(tensor.layer, expert) for expert in range(experts)]), std)
        if recipe.router == "hidden":
            rows = self.hidden[tensor.layer]
        else:
            copies = experts // shape.granularity
            rows = drawn(recipe.seed, tensor.name, copies, hidden, std, zero_mean=recipe.router == "zeros-mean")
        # The experts of a copy share its row: the top G are the G parts of one copy.
        return np.repeat(rows, shape.granularity, axis=0)

    def _centroid(self, layer: int, expert: int) -> Floats:
        """Give the mean gate row of an expert's neurons, those left out that are drawn anew."""
        name = self._mlp(layer, "gate")
        if self.recipe.method == "split":
            index = self._deals[layer]()[expert]
            return mean_row(self.source, name, index)
        source = self.source
        first = (self.shape.shared + expert % self.shape.granularity) * self.shape.width
        kept = np.arange(self.shape.width)
        if self.recipe.method == "mix":
            source = self._origin(expert)
        else:
            probe = self.target.tensor("expert.gate", layer, expert)
            kept = np.setdiff1d(kept, self.dropped(probe, "gate"))
        return mean_row(source, name, first + kept)
