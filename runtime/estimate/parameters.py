"""A rank's parameters as the trainer makes them, as shapes alone: what each stage holds, in the order of its buckets.

The modules of `runtime.model` say the same with tensors; a test holds the two equal for every family. Shapes are those of
the rank's rectangles (`moeconv.placement.rank_rects`), with the padding that exists in memory only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod

from moeconv.families.adapted import LORA_A, LORA_B, AdaptedModel
from moeconv.families.base import GlobalTensor, Model
from moeconv.layout.degrees import Degrees, chunk_layers
from moeconv.placement import rank_rects
from runtime.parallel.packing import ROW_MULTIPLE
from runtime.parallel.tensor_settings import DEFAULT, TensorSettings, common
from runtime.quantised.sizes import quantises


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of one rank."""

    part: str
    """What it belongs to: embedding, attention, norms, router, experts, shared, mlp or head."""
    shape: tuple[int, ...]
    """On this rank, padding included."""
    expert: bool = False
    """Whether its replicas lie along the expert-data-parallel axis."""
    replicated: tuple[str, ...] = ()
    """Axes along which ranks hold copies, beside data parallelism."""
    partial: tuple[str, ...] = ()
    """Those of them along which gradients are summands."""
    settings: TensorSettings | None = DEFAULT
    """How its tensors are trained; None where they are trained differently."""
    frozen: bool = False
    """All of its tensors are: it has no gradient."""
    matrices: int = 1
    """Tensors that it is made of."""
    base: bool = False
    """Whether it is a frozen matrix beside adapters, which can be held quantised."""

    @property
    def size(self) -> int:
        """Elements."""
        return prod(self.shape)

    @property
    def alike(self) -> tuple[object, ...]:
        """What parameters of one bucket have in common."""
        return self.expert, self.replicated, self.partial, self.frozen, self.settings


@dataclass(frozen=True, slots=True)
class Sums:
    """Elements of a pipeline rank."""

    by_expert: Mapping[bool, int]
    """That are trained, of experts (True), and of everything else."""
    frozen: Mapping[bool, int]
    """That are not."""
    partial: Mapping[tuple[str, bool], int]
    """Axis and whether of experts -> those whose gradients are summands along it."""


@dataclass(frozen=True)
class RankParameters:
    """The parameters of a model under a layout; all ranks of a stage hold equally large ones."""

    model: Model
    degrees: Degrees
    sequence_parallel: bool
    groups: Mapping[str, TensorSettings] | None = None
    """How each tensor is trained, by name; None where all are as usual. Of experts those of the first rank count."""
    _layers: dict[object, tuple[Parameter, ...]] = field(default_factory=dict, repr=False, compare=False)
    _ends: dict[tuple[bool, bool], list[Parameter]] = field(default_factory=dict, repr=False, compare=False)
    _sums: dict[int, Sums] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def chunks(self) -> list[range]:
        """The layers of each virtual stage, in the order of the model."""
        return chunk_layers(self.model.sizes["layers"], self.degrees)

    def stage(self, pp: int) -> list[Parameter]:
        """List the parameters of a pipeline rank, those of its virtual stages one after another.

        Args:
            pp: the pipeline rank.

        Returns:
            The parameters in the order of the model, tied ones once.
        """
        mine = self.chunks[pp :: self.degrees.pp]
        return [parameter for layers in mine for parameter in self.chunk(layers)]

    def chunk(self, layers: range) -> Iterator[Parameter]:
        """List the parameters of consecutive layers, with the ends of the model where they belong to them."""
        yield from self._begin(layers)
        for layer in layers:
            yield from self.layer(layer)
        yield from self._end(layers)

    def _begin(self, layers: range) -> Iterator[Parameter]:
        if layers.start == 0:
            yield self._vocabulary("embedding", "embedding")

    def _end(self, layers: range) -> Iterator[Parameter]:
        if layers.stop == self.model.sizes["layers"]:
            yield from self._norm("final_norm", None, "head")
            if not (self.model.tied and layers.start == 0):
                yield self._vocabulary("head", "head")
            if self.model.has("head.bias"):
                yield self._vocabulary("head.bias", "head")

    def kinds(self, layers: range) -> dict[int, int]:
        """Give a layer of each kind among some layers, and how many are of its kind."""
        first: dict[object, int] = {}
        counts: dict[int, int] = {}
        for layer in layers:
            one = first.setdefault(self.kind(layer), layer)
            counts[one] = counts.get(one, 0) + 1
        return counts

    def sums(self, pp: int) -> Sums:
        """Count the elements of a pipeline rank, layers of one kind at once."""
        if pp not in self._sums:
            counts, frozen = ({False: 0, True: 0} for _ in range(2))
            partial: dict[tuple[str, bool], int] = {}
            for layers in self.chunks[pp :: self.degrees.pp]:
                listed = [(p, n) for layer, n in self.kinds(layers).items() for p in self.layer(layer)]
                listed += [(p, 1) for p in self.ends(layers)]
                for parameter, times in listed:
                    kind = frozen if parameter.frozen else counts
                    kind[parameter.expert] += times * parameter.size
                    for axis in parameter.partial if not parameter.frozen else ():
                        key = (axis, parameter.expert)
                        partial[key] = partial.get(key, 0) + times * parameter.size
            self._sums[pp] = Sums(counts, frozen, partial)
        return self._sums[pp]

    def ends(self, layers: range) -> list[Parameter]:
        """List the parameters of the ends of the model that come with some layers."""
        key = (layers.start == 0, layers.stop == self.model.sizes["layers"])
        if key not in self._ends:
            self._ends[key] = [*self._begin(layers), *self._end(layers)]
        return self._ends[key]

    def kind(self, layer: int) -> object:
        """What layers of one kind have in common; where tensors are trained differently, each is its own."""
        return self.model.kinds(layer) if self.groups is None else layer

    def layer(self, layer: int) -> tuple[Parameter, ...]:
        """List the parameters of a layer; layers of one kind have the same."""
        kind = self.kind(layer)
        if kind not in self._layers:
            self._layers[kind] = tuple(self._layer(layer))
        return self._layers[kind]

    def _layer(self, layer: int) -> Iterator[Parameter]:
        yield from self._norm("attention_norm", layer, "norms")
        yield from self._latent(layer) if self.model.has("attention.kv_b") else self._attention(layer)
        yield from self._norm("mlp_norm", layer, "norms")
        if layer in self.model.moe_layers and self.model.has("router"):
            yield from self._mixture(layer)
        else:
            yield from self._gated("mlp", layer)

    def _attention(self, layer: int) -> Iterator[Parameter]:
        yield from self._take("attention", layer, "attention.q")
        yield from self._take("attention", layer, "attention.k", "attention.v")
        yield from self._take("attention", layer, "attention.q.bias")
        yield from self._take("attention", layer, "attention.k.bias", "attention.v.bias")
        yield from self._take("attention", layer, "attention.o")
        yield from self._take("attention", layer, "attention.o.bias", partial=self._sp)
        yield from self._take("attention", layer, "attention.sinks")
        for roles in (("attention.q",), ("attention.k", "attention.v"), ("attention.o",)):
            yield from self._adapters(layer, *roles)
        for role in ("attention.q_norm", "attention.k_norm"):
            yield from self._take("norms", layer, role, partial=True)

    def _latent(self, layer: int) -> Iterator[Parameter]:
        yield from self._take("attention", layer, "attention.q")
        for role in ("attention.q_a", "attention.q_a.bias"):
            yield from self._take("attention", layer, role, partial=True)
        yield from self._take("attention", layer, "attention.q_b")
        for role in ("attention.kv_a", "attention.kv_a.bias"):
            yield from self._take("attention", layer, role, partial=True)
        yield from self._take("attention", layer, "attention.kv_b")
        yield from self._take("attention", layer, "attention.o")
        yield from self._take("attention", layer, "attention.o.bias", partial=self._sp)
        for name in ("q", "q_a", "q_b", "kv_a", "kv_b", "o"):
            yield from self._adapters(layer, f"attention.{name}")
        for role in ("attention.q_a_norm", "attention.kv_a_norm"):
            yield from self._take("norms", layer, role, partial=True)

    def _gated(self, part: str, layer: int) -> Iterator[Parameter]:
        yield from self._take(part, layer, f"{part}.gate", f"{part}.up")
        yield from self._take(part, layer, f"{part}.down")
        yield from self._take(part, layer, f"{part}.gate.bias", f"{part}.up.bias")
        yield from self._take(part, layer, f"{part}.down.bias", partial=self._sp)
        yield from self._adapters(layer, f"{part}.gate", f"{part}.up")
        yield from self._adapters(layer, f"{part}.down")

    def _mixture(self, layer: int) -> Iterator[Parameter]:
        yield from self._take("router", layer, "router", partial=True)
        yield from self._take("router", layer, "router.linear.bias", partial=True)
        if self.model.has("expert.gate_up"):
            yield self._experts(layer, "expert.gate_up")
            yield self._experts(layer, "expert.down")
            yield self._experts(layer, "expert.gate_up.bias")
            yield self._experts(layer, "expert.down.bias", replicated=("etp",))
        else:
            yield self._experts(layer, "expert.gate", "expert.up")
            yield self._experts(layer, "expert.down")
        for roles in (("expert.gate_up",), ("expert.gate", "expert.up"), ("expert.down",)):
            yield from self._expert_adapters(layer, *roles)
        yield from self._take("shared", layer, "shared.router", partial=self._sp)
        yield from self._gated("shared", layer)

    def _adapters(self, layer: int, *roles: str) -> Iterator[Parameter]:
        """A and B of the adapters beside a parameter of these roles, if it has some."""
        present = [role for role in roles if self.model.find(role + LORA_A, layer) is not None]
        for end in (LORA_A, LORA_B) if present else ():
            yield from self._take("adapters", layer, *(role + end for role in present), partial=True)

    def _expert_adapters(self, layer: int, *roles: str) -> Iterator[Parameter]:
        present = [role for role in roles if self.model.find(role + LORA_A, layer, 0) is not None]
        for end in (LORA_A, LORA_B) if present else ():
            whole = self.model.rule(present[0] + end).split is None
            replicated = ("etp",) if whole else ()
            yield self._experts(layer, *(role + end for role in present), replicated=replicated, part="adapters")

    def _experts(self, layer: int, *roles: str, replicated: tuple[str, ...] = (), part: str = "experts") -> Parameter:
        """The stacked tensors of this rank's experts; vectors of all of them in one vector."""
        count = self.model.sizes["experts"] // self.degrees.ep
        shapes = [self._shape(role, layer) for role in roles]
        rows = sum(shape[0] for shape in shapes)
        shape = (count, rows, shapes[0][1]) if len(shapes[0]) > 1 else (count * rows,)
        settings = self._settings([self.model.tensor(role, layer, n) for n in range(count) for role in roles])
        return Parameter(part, shape, True, replicated, replicated, *settings)

    def _norm(self, role: str, layer: int | None, part: str) -> Iterator[Parameter]:
        yield from self._take(part, layer, role, partial=self._sp)
        if self.model.compute.norm == "layer":
            yield from self._take(part, layer, f"{role}.bias", partial=self._sp)

    def _take(self, part: str, layer: int | None, *roles: str, partial: bool = False) -> Iterator[Parameter]:
        """The parameter that holds these tensors' rectangles one below the other, if the layer has them."""
        found = [self.model.find(role, layer) for role in roles]
        if found[0] is None or not found[0].size:
            return
        shapes = [self._shape(role, layer) for role in roles]
        shape = (sum(rows for rows, *_ in shapes), *shapes[-1][1:])
        split = self.model.rule(roles[0]).split
        settings = self._settings([tensor for tensor in found if tensor is not None])
        if split is None:
            yield Parameter(part, shape, False, ("tp",), ("tp",) if partial else (), *settings)
            return
        # With more ranks than heads, neighbours hold the same head, each for its own query heads.
        shared = split.units is not None and self.model.sizes[split.units] < self.degrees.tp
        axes = ("kv",) if shared else ()
        yield Parameter(part, shape, False, axes, axes, *settings)

    def _vocabulary(self, role: str, part: str) -> Parameter:
        """The rows of an embedding or head, equally many on every rank of tp."""
        tied = self.model.tied and role in ("embedding", "head")
        tensor = self.model.tensor("embedding" if tied else role)
        rows = max(rect.shape[0] for rect in rank_rects(tensor, self.degrees))
        ends = ("ends",) if tied and self.degrees.pp > 1 else ()
        shape = (-(-rows // ROW_MULTIPLE) * ROW_MULTIPLE, *tensor.shape[1:])
        return Parameter(part, shape, False, ends, ends, *self._settings([tensor]))

    def _settings(self, tensors: Sequence[GlobalTensor]) -> tuple[TensorSettings | None, bool, int, bool]:
        """How a parameter's tensors are trained together, whether all are frozen, how many, and whether they are a frozen base's."""
        count, model = len(tensors), self.model
        if self.groups is None:
            return common(TensorSettings(decay=len(tensor.shape) > 1) for tensor in tensors[:1]), False, count, False
        found = [self.groups[tensor.name] for tensor in tensors]
        frozen = all(settings.frozen for settings in found)
        base = frozen and isinstance(model, AdaptedModel) and all(quantises(model, t.name) for t in tensors)
        return common(found), frozen, count, base

    def _shape(self, role: str, layer: int | None) -> tuple[int, ...]:
        expert = 0 if role.startswith("expert.") else None
        return rank_rects(self.model.tensor(role, layer, expert), self.degrees)[0].shape

    @property
    def _sp(self) -> bool:
        return self.sequence_parallel and self.degrees.tp > 1
