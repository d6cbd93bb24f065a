"""The linear maps at the edges of tensor-parallel regions, with the gather before them or the sum after them.

With `--tp-comm-overlap` communication and product are overlapped where the map is a plain product, with an adapter or
without; one in FP8 or of a quantised weight waits for its communication as without.

Legend: S positions, B sequences, D input width, N output width of this rank.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from runtime.model.adapter import Adapter, adapted
from runtime.model.context import ModelContext
from runtime.ops.linear import Linears, linear, linears
from runtime.ops.sharded_linear import gather_linears, linear_scatter


class _Edge:
    """Whether a map at the edge of a region is overlapped with its communication, and why not."""

    def __init__(self, context: ModelContext, name: str, maps: Linears, hindrance: str | None) -> None:
        self._context, self._maps, self.name = context, maps, name
        if maps is not linears:
            hindrance = "FP8"
        self.hindrance = hindrance
        """Why it isn't overlapped where the others are; None: it is."""
        self._overlapped = context.tp_comm_overlap and hindrance is None


def _quantised(context: ModelContext) -> str | None:
    return None if context.lora.quantize_base is None else "a quantised base"


class ColumnMaps(_Edge):
    """Maps of one input at the beginning of a region: every rank of tp needs all tokens."""

    def __init__(
        self,
        context: ModelContext,
        name: str,
        *weights_ND: Tensor,
        fp8: bool = True,
        apart: bool = False,
        dense: bool = False,
    ) -> None:
        """Choose how the maps are computed.

        Args:
            context: the model's context.
            name: what the log calls them.
            *weights_ND: their weights.
            fp8: whether they may be in FP8.
            apart: without overlap each is a function of its own, followed by its adapter.
            dense: their weights are never quantised.
        """
        maps = context.maps(*weights_ND) if fp8 else linears
        super().__init__(context, name, maps, None if dense else _quantised(context))
        self._apart = apart

    def __call__(
        self,
        x_SBD: Tensor,
        weights_ND: Sequence[Tensor],
        biases_N: Sequence[Tensor | None],
        adapters: Sequence[Adapter | None],
        *,
        sinks: bool = True,
    ) -> tuple[Tensor, ...]:
        """Come into the region and apply the maps.

        Args:
            x_SBD: [S, B, D], with sequence parallelism [S / tp, B, D].
            weights_ND: [N, D] each.
            biases_N: [N] or None each.
            adapters: of each, or None.
            sinks: as of `runtime.ops.linear.linears`.

        Returns:
            [S, B, N] each.
        """
        if self._overlapped:
            tp, gives = self._context.mesh.group("tp"), any(adapter is not None for adapter in adapters)
            assert tp is not None
            outs = gather_linears(x_SBD, weights_ND, biases_N, tp, sinks=sinks, gives=gives)
            x = outs[-1]
        else:
            x = self._context.enter(x_SBD)
            if self._apart:
                parts = zip(weights_ND, biases_N, adapters, strict=True)
                return tuple(adapted(linear(x, w, b, sinks=sinks), x, adapter) for w, b, adapter in parts)
            outs = self._maps(x, weights_ND, biases_N, sinks=sinks)
        return tuple(adapted(out, x, adapter) for out, adapter in zip(outs, adapters, strict=False))


class RowMap(_Edge):
    """A map at the end of a region: the ranks of tp have summands of its output."""

    def __init__(self, context: ModelContext, name: str, weight_ND: Tensor, *, fp8: bool = True) -> None:
        """Choose how the map is computed; arguments as of `ColumnMaps`."""
        maps = context.maps(weight_ND) if fp8 else linears
        super().__init__(context, name, maps, _quantised(context))

    def __call__(self, x_SBD: Tensor, weight_ND: Tensor, adapter: Adapter | None) -> Tensor:
        """Apply the map and come out of the region: [S, B, D] to [S, B, N], with sequence parallelism [S / tp, B, N]."""
        if not self._overlapped:
            return self._context.leave(adapted(self._maps(x_SBD, [weight_ND])[0], x_SBD, adapter))
        tp = self._context.mesh.group("tp")
        assert tp is not None
        if adapter is None:
            return linear_scatter([x_SBD], [weight_ND], tp)
        return linear_scatter([x_SBD, adapter.reduced(x_SBD)], [weight_ND, adapter.b], tp)


def describe_overlap(module: nn.Module, *, num_stages: int) -> str:
    """Say which maps of a model's part are overlapped with their communication, and which aren't, and why.

    Args:
        module: the part that the first rank has.
        num_stages: of the pipeline.

    Returns:
        A line for the log.
    """
    edges = [edge for part in module.modules() for edge in vars(part).values() if isinstance(edge, _Edge)]
    hindrances = {edge.name: edge.hindrance for edge in edges}
    done = ", ".join(name for name, hindrance in hindrances.items() if hindrance is None)
    rest = ", ".join(f"{name} ({hindrance})" for name, hindrance in hindrances.items() if hindrance is not None)
    where = "" if num_stages == 1 else " in the first stage"
    return f"--tp-comm-overlap: overlapped{where}: {done or 'no map'}" + (f"; as without it: {rest}" if rest else "")
