"""The decoder: layers, and the consecutive part of the model that one pipeline stage computes.

Legend: S positions, B sequences, D hidden size, V rows of the vocabulary on this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from runtime.model.attention import Attention
from runtime.model.context import ModelContext
from runtime.model.ends import Embedding, Head
from runtime.model.latent import LatentAttention
from runtime.model.mlp import GatedMLP, MoEMLP
from runtime.model.norm import ResidualLayerNorm, ResidualNorm
from runtime.model.offload import ActivationOffload
from runtime.model.past import Past
from runtime.model.recompute import OffloadModule
from runtime.model.rope import Rotary
from runtime.moe.tape import RoutingTape
from runtime.ops.documents import Documents
from runtime.parallel.arrival import FIRST, LAST


class DecoderLayer(nn.Module):
    """Attention and feed-forward, each after a norm and added to the residual."""

    def __init__(self, context: ModelContext, layer: int, offload: ActivationOffload | None) -> None:
        """Build a layer on the meta device.

        Args:
            context: the model's context.
            layer: its number.
            offload: where its activations go; None: they stay, or the whole layer is computed again.
        """
        super().__init__()
        self.index = layer
        self._offload = offload
        self.attention_norm = _norm(context, "attention_norm", layer)
        latent = context.model.has("attention.kv_b")
        self.attention: nn.Module = LatentAttention(context, layer) if latent else Attention(context, layer)
        self._norms_last = context.model.compute.norm_place == "after"
        self._scale = context.model.compute.residual_scale
        self.mlp_norm = _norm(context, "mlp_norm", layer)
        if context.moe is not None and layer in context.model.moe_layers:
            self.mlp: nn.Module = MoEMLP(context, context.moe, layer)
        else:
            self.mlp = GatedMLP(context, "mlp", layer)

    def forward(
        self,
        summands_SBD: list[Tensor],
        cos: Tensor,
        sin: Tensor,
        documents: Documents | None = None,
        past: Past | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Compute the layer.

        Args:
            summands_SBD: the residual [S, B, D], split over tp with sequence parallelism, and what the layer before
                adds to it, if there is one: the norm does, in one pass. The list is emptied, so that what nobody keeps
                for the backward pass is freed.
            cos: table of the positions.
            sin: table of the positions.
            documents: of the rows, which don't see each other; None: a row is one.
            past: has the positions before these, and takes these; None: there are none.

        Returns:
            The residual, and what this layer adds to it.
        """
        to_mlp, x_SBD = self.attend(summands_SBD, cos, sin, documents, past)
        with self._away("mlp", self.mlp, () if self._norms_last else (x_SBD,)):
            delta_SBD = self.mlp(to_mlp)
        return x_SBD, self.finish(delta_SBD)

    def attend(
        self,
        summands_SBD: list[Tensor],
        cos: Tensor,
        sin: Tensor,
        documents: Documents | None = None,
        past: Past | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Compute the first half of the layer; arguments as of `forward`.

        Returns:
            What the feed-forward part takes, and the residual.
        """
        delta_SBD = summands_SBD.pop() if len(summands_SBD) > 1 else None
        if self._norms_last:
            return self._attend_first(summands_SBD.pop(), delta_SBD, cos, sin, documents, past)
        normed, x_SBD = self.attention_norm(summands_SBD.pop(), delta_SBD)
        del delta_SBD
        normed, x_SBD = self.mlp_norm(x_SBD, self._attend(normed, x_SBD, cos, sin, documents, past))
        return normed, x_SBD

    def finish(self, delta_SBD: Tensor) -> Tensor:
        """What the layer adds to the residual, from what the feed-forward part gives."""
        return self._scaled(self.mlp_norm(delta_SBD)[0] if self._norms_last else delta_SBD)

    def _attend(
        self,
        normed_SBD: Tensor,
        x_SBD: Tensor,
        cos: Tensor,
        sin: Tensor,
        documents: Documents | None,
        past: Past | None,
    ) -> Tensor:
        with self._away("attention", self.attention, (x_SBD, cos, sin)):
            return self._scaled(self.attention(normed_SBD, cos, sin, documents, past))

    def _away(self, part: OffloadModule, owner: nn.Module, stays: Sequence[Tensor]) -> AbstractContextManager[None]:
        """Have what a part of the layer keeps go to the host, where that is wanted; but for what others keep, too."""
        return nullcontext() if self._offload is None else self._offload.region(part, owner, stays)

    def _scaled(self, delta_SBD: Tensor) -> Tensor:
        return delta_SBD if self._scale == 1.0 else delta_SBD * self._scale

    def _attend_first(
        self,
        x_SBD: Tensor,
        delta_SBD: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        documents: Documents | None,
        past: Past | None,
    ) -> tuple[Tensor, Tensor]:
        """The norms are of what attention and feed-forward part give, before it is added."""
        x_SBD = x_SBD if delta_SBD is None else x_SBD + delta_SBD
        with self._away("attention", self.attention, (cos, sin)):
            delta_SBD = self.attention(x_SBD, cos, sin, documents, past)
        x_SBD = x_SBD + self._scaled(self.attention_norm(delta_SBD)[0])
        return x_SBD, x_SBD


def _norm(context: ModelContext, role: str, layer: int | None = None) -> ResidualNorm | ResidualLayerNorm:
    """Make a norm over the hidden dim; with sequence parallelism the ranks of tp see different tokens."""
    weight = context.parameters.take(role, layer=layer, partial=context.sp)
    if context.model.compute.norm == "rms":
        return ResidualNorm(weight, context.model.compute.norm_eps)
    bias = context.parameters.take(f"{role}.bias", layer=layer, partial=context.sp)
    return ResidualLayerNorm(weight, bias, context.model.compute.norm_eps)


def sum_up(summands: list[Tensor]) -> Tensor:
    """The residual with what the last layer adds to it."""
    return summands[0] if len(summands) == 1 else summands[0] + summands[1]


class DecoderStage(nn.Module):
    """Consecutive layers, with the embedding before the first and norm and head after the last layer of the model."""

    def __init__(self, context: ModelContext, layers: range) -> None:
        """Build a stage on the meta device.

        Args:
            context: the model's context.
            layers: global numbers of its layers.
        """
        super().__init__()
        model = context.model
        self._context = context
        self.rotary = Rotary(context)
        self.is_first, self.is_last = layers.start == 0, layers.stop == model.sizes["layers"]
        self.embedding = Embedding(context) if self.is_first else None
        self.offload = ActivationOffload(context.recompute.offload, context.device)
        self.layers = nn.ModuleList(
            DecoderLayer(context, layer, None if self.recomputed(place) else self.offload)
            for place, layer in enumerate(layers)
        )
        self.needs: Callable[[int], None] = lambda _: None
        """Told which part begins, whose weights may still be on their way (`runtime.parallel.arrival`)."""
        self.norm: ResidualNorm | ResidualLayerNorm | None = None
        self.head: Head | None = None
        if self.is_last:
            self.norm = _norm(context, "final_norm")
            tied = self.embedding.weight if model.tied and self.embedding is not None else None
            self.head = Head(context, tied)

    def forward(
        self,
        x: Tensor,
        position_ids_BS: Tensor | None = None,
        documents: Documents | None = None,
        past: Past | None = None,
    ) -> Tensor:
        """Compute the stage.

        Args:
            x: tokens [B, S] int64 on the first stage, else activations [S / cp, B, D], split over tp with sequence
                parallelism.
            position_ids_BS: [B, S] positions of whole rows, from 0 in each document; None: 0 to S - 1 in each row.
            documents: of the rows, which don't see each other; None: a row is one.
            past: has the positions before these, and takes these; no gradient then.

        Returns:
            Logits [S / cp, B, V], V with the vocabulary's padding, on the last stage, else activations. With a past the logits
            are those of the last position that it keeps, [1, B, V].
        """
        x, cos, sin = self.begin(x, position_ids_BS, past)
        summands = [x]
        del x
        self.offload.begin()
        for place, layer in enumerate(self.layers):
            summands = self.cut(place, summands)
            if torch.is_grad_enabled() and self.recomputed(place):
                # Kept for the second run: the sum alone, not both summands.
                with self.offload.region("layer_inputs", None):
                    out = self.run_again(lambda x, layer=layer: layer([x], cos, sin, documents), sum_up(summands))
            else:
                out = layer(summands, cos, sin, documents, past)
            summands = list(out)
            del out
        return self.end(summands, past)

    def begin(
        self, x: Tensor, position_ids_BS: Tensor | None, past: Past | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What the first layer takes, and the tables of the positions; arguments as of `forward`."""
        self.needs(FIRST)
        context = self._context
        if self.embedding is not None:
            num_positions = x.shape[1]
            x = self.embedding(x)
        else:
            shares = context.mesh.size("cp") * (context.mesh.size("tp") if context.sp else 1)
            num_positions = x.shape[0] * shares
        if past is None:
            return x, *self.rotary(num_positions, position_ids_BS)
        return x, *self.rotary.behind(past.length, num_positions, past.length + past.count)

    def run_again(self, function: Callable[..., tuple[Tensor, ...]], *args: Tensor) -> tuple[Tensor, ...]:
        """Run a function of layers without keeping its activations; routers in it choose once.

        Args:
            function: what to run.
            *args: its arguments.

        Returns:
            What it gives.
        """
        random, contexts = self._context.draws, RoutingTape().contexts
        out: tuple[Tensor, ...] = checkpoint(
            function, *args, use_reentrant=False, preserve_rng_state=random, context_fn=contexts
        )
        return out

    def cut(self, place: int, summands: list[Tensor]) -> list[Tensor]:
        """What a layer takes, of what the one before gives: below the first trained layer there are no gradients."""
        self.needs(place)
        layer = cast(DecoderLayer, self.layers[place])
        if layer.index == self._context.first_trained and not summands[0].requires_grad:
            # From here on every rank has a backward pass, also one that holds nothing but frozen experts.
            return [sum_up(summands).detach().requires_grad_(torch.is_grad_enabled())]
        return summands

    def end(self, summands: list[Tensor], past: Past | None = None) -> Tensor:
        """What the stage gives, of what its last layer does."""
        self.needs(LAST)
        if self.head is not None and self.norm is not None:
            logits: Tensor = self.head(self.norm(*summands)[0], None if past is None else past.count - 1)
            return logits
        return sum_up(summands)

    def last_modules(self) -> Iterator[nn.Module]:
        """What comes after the last layer."""
        yield from (module for module in (self.norm, self.head) if module is not None)

    def recomputed(self, place: int) -> bool:
        """Whether a layer of the stage is computed again in the backward pass."""
        recompute = self._context.recompute
        return recompute.granularity == "full" and (recompute.num_layers == 0 or place < recompute.num_layers)
