"""The loss of a step, as sums over micro-batches and ranks: no mean is taken anywhere but of the global batch at once."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from runtime.data.batch import IGNORED_LABEL
from runtime.model.context import ModelContext
from runtime.model.ends import take_positions
from runtime.moe.layer import moe_layers, set_loss_scale
from runtime.moe.losses import attach_loss, hf_load_balancing_loss
from runtime.ops.cross_entropy import cross_entropy


class StepLoss:
    """Gives each micro-batch's summand of the global batch's loss, and keeps the sum.

    What it computes with is filled anew in each step, and never replaced: a captured micro-batch reads it.
    """

    def __init__(self, context: ModelContext, module: nn.Module) -> None:
        """Have the layers' balancing losses scaled like the rest.

        Args:
            context: the model's.
            module: holds the stages.
        """
        self._context, self._module = context, module
        wide = torch.float64 if context.dtype == torch.float64 else torch.float32
        self._scale, self._balancing_scale = (torch.ones((), dtype=wide, device=context.device) for _ in range(2))
        set_loss_scale(module, self._balancing_scale)
        self.sum = torch.zeros((), dtype=torch.float64, device=context.device)
        """Of the cross entropy of this rank's labels, nats."""

    def begin(self, scale: float, num_tokens: Tensor, num_microbatches: int) -> None:
        """Begin a step.

        Args:
            scale: of fp16's gradients; 1 otherwise.
            num_tokens: 0-dim, of the global batch.
            num_microbatches: likewise; balancing losses are means over one.
        """
        self._scale.copy_(scale / num_tokens)
        self._balancing_scale.fill_(scale / num_microbatches)

    def __call__(self, logits_SBV: Tensor, labels_BS: Tensor) -> Tensor:
        """The summand of the global mean that this rank's gradient is taken of.

        Args:
            logits_SBV: [S / cp, B, V / tp] of the last stage.
            labels_BS: [B, S] int64 of the whole rows.

        Returns:
            0-dim, with the balancing losses attached.
        """
        context = self._context
        labels_SB = take_positions(labels_BS, context)
        begin, end = context.parameters.vocabulary_range()
        group = context.mesh.group("tp")
        losses = cross_entropy(logits_SBV, labels_SB, begin, group, num_columns=end - begin, ignored=IGNORED_LABEL)
        total = losses.sum()
        if context.mesh.rank("tp") == 0:
            self.sum += total.detach()
        loss, moe = total * self._scale, context.moe
        if moe is None or moe.aux_loss_mode != "hf" or not moe.aux_losses or not torch.is_grad_enabled():
            return loss
        layers = moe_layers(self._module)
        logits = [layer.take_router_logits() for layer in layers]
        pooled = hf_load_balancing_loss([item for item in logits if item is not None], moe.topk)
        for layer in layers:
            layer.stats.add_loss("aux_loss", pooled)
        return attach_loss(loss, pooled * moe.aux_losses[0][1], layers[0].loss_scale)
