"""Two micro-batches at a time, layer by layer: while one's rows travel between the ranks of experts, the other is computed.

A layer, for micro-batches A and B; what travels is in brackets, and the host waits for numbers of rows at the starts:

    attention A | attention B, [A to experts] | experts A, [B to experts] | experts B, [A back] | next attention A, [B back]

Autograd runs the node that was made last first, so that the backward pass is this line read from its end: experts A lies
between the gradient's departure of B and its arrival, and so on. Products have the sizes, and sums of gradients are
added to as often, as with one micro-batch at a time.

Legend: S positions, B sequences, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor

from runtime.kernels.sharing import shared_device
from runtime.model.decoder import DecoderLayer, DecoderStage, sum_up
from runtime.model.mlp import MoEMLP, UnderWay
from runtime.moe.tape import active_tape
from runtime.ops.documents import Documents
from runtime.parallel.gradient_sink import together
from runtime.parallel.runner import LossFunction, Microbatch, WholeModel


@dataclass
class _Lane:
    """A micro-batch between two layers, or in the middle of one."""

    cos: Tensor
    sin: Tensor
    documents: Documents | None
    summands: list[Tensor] = field(default_factory=list)
    """The residual, and what is to be added to it."""
    layer: DecoderLayer | None = None
    """Whose rows are under way, with the residual alone in `summands`."""
    under_way: UnderWay | None = None

    def settle(self) -> None:
        """End the layer that is under way, if one is."""
        if self.under_way is None or self.layer is None:
            return
        self.summands.append(self.layer.finish(self.under_way.finish()))
        self.under_way = self.layer = None

    def begin(self, layer: DecoderLayer) -> None:
        """Compute a layer as far as it needs no rows of other ranks."""
        if not isinstance(layer.mlp, MoEMLP):
            self.summands = list(layer(self.summands, self.cos, self.sin, self.documents))
            return
        to_mlp, residual = layer.attend(self.summands, self.cos, self.sin, self.documents)
        self.layer, self.under_way = layer, layer.mlp.begin(to_mlp)
        self.summands = [residual]


class PairedMicrobatches(WholeModel):
    """A whole model that computes micro-batches in pairs, and the last of an odd number alone."""

    at_once = 2

    def __init__(self, stage: DecoderStage, loss: LossFunction) -> None:
        """Take a model that isn't cut into stages; arguments as of `WholeModel`."""
        super().__init__(stage, loss)
        self._stage, self._loss_of = stage, loss

    def run(self, microbatches: Sequence[Microbatch], *, backward: bool) -> None:
        """Run the micro-batches of a step; arguments as of `Runner.run`."""
        paired = len(microbatches) // 2 * 2 if backward else 0
        for place in range(0, paired, 2):
            with shared_device(), together(2):
                losses = self._forward(microbatches[place : place + 2])
                torch.autograd.backward(losses)
            del losses
        super().run(microbatches[paired:], backward=backward)

    def _forward(self, pair: Sequence[Microbatch]) -> list[Tensor]:
        stage, lanes = self._stage, []
        for batch in pair:
            positions, documents = batch.more
            x, cos, sin = stage.begin(batch.tokens, positions)
            lanes.append(_Lane(cos, sin, documents, [x]))
            del x
        for place, layer in enumerate(stage.layers):
            self._layer(place, cast(DecoderLayer, layer), lanes)
        losses = []
        for lane, batch in zip(lanes, pair, strict=True):
            lane.settle()
            losses.append(self._loss_of(stage.end(lane.summands), batch.labels))
            lane.summands = []
        return losses

    def _layer(self, place: int, layer: DecoderLayer, lanes: Sequence[_Lane]) -> None:
        if not self._stage.recomputed(place):
            for lane in lanes:
                lane.settle()
                lane.summands = self._stage.cut(place, lane.summands)
                lane.begin(layer)
            _exchange(lanes)
            return
        for lane in lanes:
            lane.settle()
            lane.summands = self._stage.cut(place, lane.summands)

        def compute(*inputs_SBD: Tensor) -> tuple[Tensor, ...]:
            inner = [
                replace(lane, summands=[x], layer=None, under_way=None)
                for lane, x in zip(lanes, inputs_SBD, strict=True)
            ]
            for lane in inner:
                lane.begin(layer)
            _exchange(inner)
            for lane in inner:
                lane.settle()
            return tuple(x for lane in inner for x in lane.summands)

        # What is checkpointed is both micro-batches' layer: in the second run, too, one is computed while rows of the other travel.
        out = self._stage.run_again(compute, *(sum_up(lane.summands) for lane in lanes))
        for number, lane in enumerate(lanes):
            lane.summands = list(out[2 * number : 2 * number + 2])


def _exchange(lanes: Sequence[_Lane]) -> None:
    """Bring both micro-batches' rows to their experts, and send the results off."""
    first, second = (lane.under_way for lane in lanes)
    if first is None or second is None:
        return
    tape = active_tape()
    first.dispatch.start()
    first.dispatch.compute()
    # Before the first one's way back, which is launched next: transfers of a group run in the order of their launches.
    second.dispatch.start()
    if tape is not None and tape.replaying:
        # The second run of a checkpoint ends where the last tensor has been kept: nothing is to be under way there.
        second.dispatch.compute()
        first.dispatch.send_back()
    else:
        first.dispatch.send_back()
        second.dispatch.compute()
    second.dispatch.send_back()
