"""What activations take: bytes that a layer keeps for its backward pass, and that passes need while they run.

Follows what the functions of `runtime.ops`, `runtime.moe` and `runtime.model` save on a GPU: a norm keeps the sum that it
normalises, and whoever needs its output makes it again; experts keep their pre-activations alone; the logits' gradient takes
the logits' place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from runtime.estimate.fp8 import expert_activations, parts_in_fp8
from runtime.estimate.local import Local
from runtime.estimate.setup import ITEMSIZE, Setup

ROUTER_BYTES = 4
"""Of a logit."""


@dataclass(frozen=True, slots=True)
class Kept:
    """Bytes of a micro-batch on one rank."""

    parts: Mapping[str, float]
    """Kept from the forward to the backward pass, by part of the model."""
    working: float
    """Needed for a moment in the backward pass, beside what is kept."""

    @property
    def total(self) -> float:
        """Kept bytes of all parts."""
        return sum(self.parts.values())


def layer_activations(setup: Setup, local: Local, layer: int) -> Kept:
    """Count the activations of a layer.

    Args:
        setup: what is planned.
        local: one rank's sizes.
        layer: its number.

    Returns:
        What it keeps, by part, without recomputation of whole layers.
    """
    model, b = setup.model, local.item
    between = local.tokens_between * local.hidden * b
    eight = parts_in_fp8(setup, layer)
    parts = {
        "norms": 2 * (between + 4 * local.tokens_between),
        "attention": _attention(setup, local, in_fp8="attention" in eight),
    }
    if layer in model.moe_layers and setup.moe is not None:
        experts, working = _experts(setup, local)
        parts["experts"] = experts
        parts["router"] = local.tokens_moe * local.num_experts * ROUTER_BYTES
        if model.width("shared"):
            parts["shared"] = _gated(setup, local, "shared", in_fp8="shared" in eight)
    else:
        in_fp8 = "mlp" in eight
        parts["mlp"], working = _gated(setup, local, "mlp", in_fp8=in_fp8), _gated_working(setup, local, in_fp8=in_fp8)
    return Kept(parts, working + 2 * between)


def ends_activations(setup: Setup, local: Local) -> tuple[Kept, Kept]:
    """Count the activations of the model's two ends: embedding, and final norm, head and loss."""
    between = local.tokens_between * local.hidden * local.item
    logits = local.tokens * local.vocabulary * local.item
    entered = local.tokens * local.hidden * local.item if setup.parallel.tp > 1 else 0
    last = {"head": between + entered + logits}
    copies = 0.0 if setup.model.compute.logits_divisor == 1.0 else logits
    zero_bubble = setup.parallel.pp > 1 and setup.parallel.pp_schedule == "zero-bubble"
    working = local.tokens * local.hidden * local.item + copies + (logits if zero_bubble else 0)
    if setup.model.tied:  # its gradient comes from two places, so it is made whole first
        working += local.vocabulary * local.hidden * local.item
    return Kept({"embedding": 0.0}, 0.0), Kept(last, working)


def layer_input(setup: Setup) -> float:
    """Bytes of the residual between two layers: what a recomputed layer keeps, and stages send each other."""
    shares = setup.parallel.cp * (setup.parallel.tp if setup.sp else 1)
    tokens = setup.micro_batch_size * setup.seq_length // shares
    return tokens * setup.model.sizes["hidden"] * ITEMSIZE[setup.dtype]


def _attention(setup: Setup, local: Local, *, in_fp8: bool) -> float:
    """Queries, keys, values, output and the softmax's sums; with tensor parallelism the input too, in FP8 both inputs of products."""
    model, b, tokens = setup.model, local.item, local.tokens
    width = 2 * local.query + local.key_value
    if model.has("attention.kv_b"):
        sizes = model.sizes
        # Queries and keys; keys' plain dims and values as they were projected, of which values are a part; the output. Latent vectors
        # are kept before and after their norms.
        width = 2 * local.query + local.key_value - local.heads * sizes["head_dim"] + local.value
        width += 2 * (sizes["kv_rank"] + sizes["q_rank"]) + sizes["head_dim"]
    elif model.has("attention.q_norm"):  # norms of heads keep what they normalise
        width += local.query + local.key_value
    entered = local.hidden * b if setup.parallel.tp > 1 else 0
    if in_fp8:
        entered = local.hidden + local.query
    cp = setup.parallel.cp
    others = (cp - 1) * local.key_value  # keys and values of the whole sequence
    return tokens * (b * (width + others) + entered + 4 * local.heads)


def _experts(setup: Setup, local: Local) -> tuple[float, float]:
    """What the experts keep, and what they need beside it in the backward pass."""
    assert setup.moe is not None
    b, hidden, width = local.item, local.hidden, local.width
    alone = local.gathered == local.tokens_moe  # the tokens are the norm's output, which is made again
    inputs = 0.0 if alone and (setup.sp or setup.parallel.tp == 1) else local.gathered * hidden * b
    if setup.fp8.format is not None:
        kept, working = expert_activations(setup, local, inputs)
        return _around_experts(setup, local, kept, working)
    kept = inputs + local.rows_allocated * 2 * width * b
    # The rows of the gradient beside that of the activation; then of the input beside what is sent back.
    working = local.rows_allocated * (hidden + width) * b
    return _around_experts(setup, local, kept, working)


def _around_experts(setup: Setup, local: Local, kept: float, working: float) -> tuple[float, float]:
    """Add what is sent back; or keep the layer's input alone."""
    if local.exchanged:
        working += local.departing * local.hidden * local.item
    if setup.moe is not None and setup.moe.recompute_layer:
        working += kept
        kept = local.tokens_moe * local.hidden * local.item
    return kept, working


def _gated(setup: Setup, local: Local, part: str, *, in_fp8: bool) -> float:
    """Gate, up and their product; with tensor parallelism the input too. In FP8 input and product in 8 bits."""
    width = setup.model.width(part) // setup.parallel.tp
    if in_fp8:
        return local.tokens * (2 * width * local.item + width + local.hidden)
    entered = local.hidden if setup.parallel.tp > 1 else 0
    return local.tokens * local.item * (3 * width + entered)


def _gated_working(setup: Setup, local: Local, *, in_fp8: bool) -> float:
    """Gradients of gate, up and product; in FP8 of gate and up in 8 bits, in both layouts, too."""
    width = setup.model.width("mlp") // setup.parallel.tp
    return local.tokens * width * (3 * local.item + (4 if in_fp8 else 0))
