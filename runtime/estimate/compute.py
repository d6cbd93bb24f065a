"""How long a rank computes: a layer's parts and the model's ends with one micro-batch, and the optimizer's step.

A product takes its operations over the machine's rate, together with what it streams beside them: the weights, and for a
weight's gradient the fp32 sum that it is added to. Everything else is a pass over memory.

Legend: T tokens, D hidden size, R rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from runtime.estimate.finetuned import adapters_seconds, making_numbers
from runtime.estimate.fp8 import dense_passes, expert_passes, product_rate
from runtime.estimate.local import Local
from runtime.estimate.machine import Machine
from runtime.estimate.parameters import Parameter
from runtime.estimate.setup import ITEMSIZE, Setup

_SLOW = {"float32": 15.0, "float64": 15.0}
"""How many times longer products take than in bf16: fp32 and fp64 peaks of H100's data sheet, not measured."""
_TILE = 128
"""Keys that a tile of queries computes and half of it doesn't see, at both ends of its window together."""


@dataclass(frozen=True, slots=True)
class Work:
    """Seconds of one part of a layer, and what it computes."""

    part: str
    forward: float
    backward: float
    weights: float = 0.0
    """Of the backward pass: the gradients of weights, which a zero-bubble schedule computes apart."""

    def __add__(self, other: Work) -> Work:
        return Work(
            self.part,
            self.forward + other.forward,
            self.backward + other.backward,
            self.weights + other.weights,
        )


def layer_work(setup: Setup, local: Local, machine: Machine, layer: int, parameters: Iterable[Parameter]) -> list[Work]:
    """Work out a layer's parts.

    Args:
        setup: what is planned.
        local: one rank's sizes.
        machine: the constants.
        layer: its number.
        parameters: the layer's, of one rank.

    Returns:
        The parts with their times, recomputation of parts included, that of whole layers not.
    """
    groups: dict[str, list[Parameter]] = {}
    for parameter in parameters:
        groups.setdefault(parameter.part, []).append(parameter)
    out = [_norms(setup, local, machine), _attention(setup, local, machine, layer)]
    projections = groups.get("attention", ())
    out.append(_dense("projections", setup, local.tokens, machine, projections))
    out[-1] += Work("projections", *dense_passes(setup, local, machine, "projections", projections))
    if "experts" in groups:
        out.append(_experts(setup, local, machine, groups["experts"]))
        out.append(_router(setup, local, machine, groups.get("router", ())))
    for part in ("shared", "mlp"):
        if part in groups:
            out.append(_gated(part, setup, local, machine, groups[part]))
    if "adapters" in groups:
        out.append(Work("adapters", *adapters_seconds(setup, local, machine, groups["adapters"])))
    return out


def ends_work(setup: Setup, local: Local, machine: Machine) -> tuple[list[Work], list[Work]]:
    """Work out the embedding, and final norm, head and loss."""
    count = setup.model.sizes["layers"]
    last = range(count - 1, count)
    row = local.tokens * local.hidden * local.item
    rows_of_sum = local.tokens * local.hidden * 2 * setup.gradient
    embedding = Work("embedding", machine.moving(2 * row, "norm"), machine.moving(row + rows_of_sum, "embedding"))
    head = next((p for p in setup.parameters.ends(last) if p.shape == (local.vocabulary, local.hidden)), None)
    vocabulary = head if head is not None else Parameter("head", (local.vocabulary, local.hidden))
    logits = local.tokens * local.vocabulary * local.item
    loss = Work("loss", machine.moving(logits, "cross_entropy"), machine.moving(2 * logits, "cross_entropy"))
    return [embedding], [_dense("head", setup, local.tokens, machine, [vocabulary]), loss]


def update_seconds(setup: Setup, machine: Machine, owned: Mapping[bool, float]) -> float:
    """Give the time of the gradient norm and the optimizer's step.

    Args:
        setup: what is planned.
        machine: the constants.
        owned: elements that a rank updates, of experts (True) and of everything else.

    Returns:
        Seconds, without the gathers of updated weights.
    """
    weight, wide, moment, share = ITEMSIZE[setup.dtype], setup.wide, setup.moment, setup.optim.on_host
    count = sum(owned.values())
    # Masters are read and written, and the weights written; with remainders the weights are read, too.
    masters = (
        2 * (2 + weight) if setup.optim.master_weights == "remainder" else 2 * wide + (weight if weight != wide else 0)
    )
    update = machine.moving(count * (setup.reduced + masters + 4 * moment), "adamw")
    moved = share * sum(n * setup.host_bytes(expert=expert) for expert, n in owned.items())
    if setup.optim.ema_decay is not None:  # its pass brings the masters once more
        moved += share * count * setup.master
    ranks = min(setup.world_size, machine.gpus_per_node)
    # What is on the device is updated when the rest has come.
    travelling = max(machine.over_the_link(moved, ranks), share * update) + (1 - share) * update
    return (travelling if share else update) + machine.moving(count * setup.reduced, "grad_norm")


def _rate(setup: Setup, tflops: float) -> float:
    return tflops * 1e12 / _SLOW.get(setup.dtype, 1.0)


def _dense(part: str, setup: Setup, tokens: float, machine: Machine, parameters: Iterable[Parameter]) -> Work:
    """Products of tokens with matrices, and the three of their gradients."""
    forward = backward = weights = 0.0
    rate = _rate(setup, machine.dense_tflops)
    for parameter in parameters:
        if len(parameter.shape) < 2:
            continue
        own, item = product_rate(setup, machine, parameter, rate)
        computing = 2 * tokens * parameter.size / own
        streamed = parameter.size * (item or ITEMSIZE[setup.dtype])
        made = making_numbers(setup, machine, parameter)
        forward += machine.together(computing, streamed) + made
        gradient = 0.0 if parameter.frozen else machine.together(computing, parameter.size * machine.sum_bytes)
        backward += machine.together(computing, streamed) + made + gradient
        weights += gradient
    return Work(part, forward, backward, weights)


def _norms(setup: Setup, local: Local, machine: Machine) -> Work:
    """Two norms with the residual's sums; their outputs are made again where they aren't kept."""
    row = local.tokens_between * local.hidden * local.item
    again = 2 * row if setup.parallel.tp == 1 else 0
    return Work("norms", 2 * machine.moving(4 * row, "norm"), 2 * machine.moving(4 * row + again, "norm"))


def attention_operations(positions: int, window: int | None, keys: float, values: float) -> float:
    """Count attention's operations for each position, of both passes: scores and values, then scores again and four gradients.

    Args:
        positions: of a sequence.
        window: positions that a query looks back, itself included; None: all.
        keys: dims of all heads' keys together.
        values: likewise.

    Returns:
        Operations, those of the tiles at the ends of a window included.
    """
    seen = positions if window is None else min(window, positions)
    attended = seen * (1 - seen / (2 * positions))  # on average, by causality
    return (attended + (_TILE if seen < positions else 0)) * (8 * keys + 6 * values)


def _attention(setup: Setup, local: Local, machine: Machine, layer: int) -> Work:
    """Scores and values, rotary positions and norms of heads; projections are apart."""
    model, parallel = setup.model, setup.parallel
    seq, window = setup.seq_length, model.compute.windows[layer]
    operations = local.tokens * attention_operations(seq, window, local.query, local.value)
    if window is not None and window < seq:
        rate = machine.attention_window_tflops
    else:
        rate = machine.attention_cp_tflops if parallel.cp > 1 else machine.attention_tflops
        rate *= machine.attention_width(local.query // local.heads)
    kernels = operations / _rate(setup, rate)
    forward = kernels * machine.attention_forward_share
    moves, moves_back = _around_attention(setup, local, machine)
    core = forward + moves
    backward = kernels - forward + moves_back
    if setup.recompute.granularity == "selective" and "core_attn" in setup.recompute.modules:
        backward += core
    return Work("attention", core, backward)


def _around_attention(setup: Setup, local: Local, machine: Machine) -> tuple[float, float]:
    """The passes over queries and keys, and with sinks over the output, of both passes."""
    model, elements = setup.model, local.tokens * local.item
    if model.has("attention.kv_b"):  # queries are turned, and each head gets its key
        plain = local.query - local.heads * model.sizes["head_dim"]
        forward = machine.moving(elements * (3 * local.query + plain), "latent")
        return forward, machine.moving(elements * (3 * local.query + plain + 2 * local.value), "latent")
    turned = elements * (local.query + local.key_value / 2)
    moves = machine.moving(2 * turned, "rotary")
    if model.has("attention.q_norm"):
        moves += machine.moving(2.5 * turned, "head_norm")
    if model.has("attention.sinks"):
        moves += machine.moving(2 * elements * local.value, "plain")
    return moves, moves


def _experts(setup: Setup, local: Local, machine: Machine, parameters: Iterable[Parameter]) -> Work:
    """Grouped products, gathers and sums of rows, and the activation."""
    assert setup.moe is not None
    rate = _rate(setup, machine.grouped_tflops)
    forward = backward = weights = 0.0
    for parameter in parameters:
        if len(parameter.shape) < 3:
            continue
        own, item = product_rate(setup, machine, parameter, rate)
        computing = 2 * local.rows_computed * parameter.size / local.experts / own
        streamed = parameter.size * (item or ITEMSIZE[setup.dtype])
        made = making_numbers(setup, machine, parameter)
        *_, wide, deep = parameter.shape  # [out, in], beside a clamped gate [in, out]
        sizes = (wide, deep) if setup.model.compute.gate is None else (deep, wide)
        summed, rows = parameter.size * 2 * setup.gradient, local.rows_computed / local.experts
        there, back, gradient = machine.of_matrix(computing, sizes, rows, streamed=streamed, summed=summed)
        gradient = 0.0 if parameter.frozen else gradient
        forward += there + made
        backward += back + made + gradient
        weights += gradient
    b, rows, width = local.item, local.rows_computed, local.width
    tokens = local.gathered * local.hidden * b
    gather = machine.moving(rows * local.hidden * b + tokens, "gather")
    total = machine.moving(rows * local.hidden * b + tokens, "sum")
    swiglu = machine.moving(6 * rows * width * b, "swiglu")
    passes = (gather, 2 * gather + swiglu)
    in_fp8 = setup.fp8.format is not None
    if in_fp8:
        passes = expert_passes(setup, local, machine)
    forward += passes[0] + total
    backward += passes[1] + total
    if setup.model.compute.gate is not None or (machine.row_alignment == 1 and not in_fp8):
        # With biases, or torch's products: the activation is a pass of its own.
        forward += machine.moving(3 * rows * width * b, "swiglu")
    if local.exchanged:  # rows are put in the order of their ranks, and summed when they are back
        sent = local.departing * local.hidden * b + local.tokens_moe * local.hidden * b
        forward += machine.moving(sent, "gather") + machine.moving(sent, "sum")
        backward += machine.moving(sent, "gather") + machine.moving(sent, "sum")
    if setup.moe.recompute_layer:
        backward += forward
    return Work("experts", forward, backward, weights)


def _router(setup: Setup, local: Local, machine: Machine, parameters: Iterable[Parameter]) -> Work:
    """The projection, three times a bf16 product's work for fp32's accuracy, and what chooses and sorts."""
    projection = _dense("router", setup, 3 * local.tokens_moe, machine, parameters)
    other = machine.router_ms * 1e-3
    return projection + Work("router", other / 2, other / 2)


def _gated(part: str, setup: Setup, local: Local, machine: Machine, parameters: list[Parameter]) -> Work:
    """A gated layer that every token passes."""
    width = setup.model.width(part) // setup.parallel.tp
    passes = local.tokens * width * local.item
    work = _dense(part, setup, local.tokens, machine, parameters)
    work += Work(part, *dense_passes(setup, local, machine, part, parameters))
    return work + Work(part, machine.moving(3 * passes, "swiglu"), machine.moving(5 * passes, "swiglu"))
