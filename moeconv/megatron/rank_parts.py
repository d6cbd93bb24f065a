"""What the parameters of a rank's Megatron-Core GPT model are made of, by their names in the module."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from moeconv.errors import LayoutError
from moeconv.families.base import Model
from moeconv.layout.degrees import Degrees, chunk_layers
from moeconv.layout.rect import Rect
from moeconv.megatron.names import Spec, base_kind, parse
from moeconv.megatron.tensors import MegatronTensor, Part, megatron_tensors


class RankForm:
    """A rank's part of a model in Megatron's form; both specs, grouped and sequential experts."""

    def __init__(self, model: Model, degrees: Degrees, rank: Mapping[str, int], names: Iterable[str]) -> None:
        """Lay out the rank's stage.

        Args:
            model: the model.
            degrees: the layout.
            rank: coordinates by axis (tp, pp, vpp, ep, etp); those left out are 0, etp that of tp, modulo its degree.
            names: all of the module's, by which its layer spec is known: Transformer Engine fuses norms into linear layers.

        Raises:
            MappingError: Megatron-Core has no form for the family.
            LayoutError: the layers don't divide.
        """
        self._model, self._degrees, tp = model, degrees, rank.get("tp", 0)
        self._at = {"tp": tp, "etp": rank.get("etp", tp % degrees.etp)}
        chunks = chunk_layers(model.sizes["layers"], degrees)
        chunk = rank.get("vpp", 0) * degrees.pp + rank.get("pp", 0)
        self._layers, self._first, self._last = chunks[chunk], chunk == 0, chunk == len(chunks) - 1
        self._local_experts = model.sizes.get("experts", 0) // degrees.ep
        self._first_expert = rank.get("ep", 0) * self._local_experts
        spec: Spec = "te" if any(name.endswith(".layer_norm_weight") for name in names) else "local"
        self._tensors = {(base_kind(t.kind), t.layer, t.expert): t for t in megatron_tensors(model, spec)}

    def parts(self, name: str, rows: int) -> tuple[tuple[int, ...], tuple[Part, ...]] | None:
        """Say what a parameter holds.

        Args:
            name: its name in the module.
            rows: its rows there, which for a vocabulary may be more than the model has.

        Returns:
            Its shape, and its parts; padding of the vocabulary repeats its last row, as Megatron's saver does it. None for an
            unknown name.
        """
        tensor = self._find(name)
        if tensor is None:
            return None
        index, count = self._place(tensor)
        if not tensor.padded:
            return tensor.rank(index, count)
        whole = tensor.shape[0]
        if rows * count < whole:  # the shape that it should have at least
            return (-(-whole // count), *tensor.shape[1:]), ()
        shape, parts = tensor.rank(index, count, rows * count)
        filled = sum(part.rect.shape[0] for part in parts)
        last, tail = Rect.slab(tensor.shape, 0, whole - 1, whole), (0,) * (len(shape) - 1)
        return shape, parts + tuple(Part(tensor.parts[0].tensor, last, (row, *tail)) for row in range(filled, rows))

    def wanted(self) -> set[str]:
        """Name the hub's tensors that the rank's parameters are made of, were none missing."""
        out = set()
        for tensor in self._tensors.values():
            if tensor.layer is None:
                tied = tensor.kind == "embedding" and self._model.tied and self._last
                here = tied or (self._first if tensor.owner == "first" else self._last)
            else:
                experts = range(self._first_expert, self._first_expert + self._local_experts)
                here = tensor.layer in self._layers and (tensor.expert is None or tensor.expert in experts)
            if here and tensor.padded:
                out.add(tensor.parts[0].tensor)
            elif here:
                out |= {part.tensor for part in tensor.rank(*self._place(tensor))[1]}
        return out

    def _place(self, tensor: MegatronTensor) -> tuple[int, int]:
        """Give the rank along the tensor's axis, and the axis' degree."""
        return (self._at[tensor.axis], getattr(self._degrees, tensor.axis)) if tensor.axis else (0, 1)

    def _find(self, name: str) -> MegatronTensor | None:
        found = parse(name)
        if found is None or (found.expert is not None and found.expert >= self._local_experts):
            return None
        layer = None if found.layer is None else self._layers.start + found.layer
        expert = None if found.expert is None else self._first_expert + found.expert
        # The last stage has its own copy of a tied embedding.
        kind = "embedding" if found.kind == "output" and self._model.tied else found.kind
        return self._tensors.get((kind, layer, expert))


def check_rank(degrees: Degrees, rank: Mapping[str, int]) -> None:
    """Check a rank's coordinates.

    Raises:
        LayoutError: an axis is unknown, or a coordinate is outside its degree.
    """
    for axis, number in rank.items():
        if axis not in ("tp", "pp", "vpp", "ep", "etp"):
            raise LayoutError(f"rank axis {axis!r} is unknown; axes are tp, pp, vpp, ep, etp")
        if not 0 <= number < getattr(degrees, axis):
            raise LayoutError(
                f"rank {axis}={number}: the layout has {axis} {getattr(degrees, axis)}; coordinates go from 0"
            )
