"""What a rank holds between steps, to the byte: weights, gradient sums, masters and moments.

The trainer's own packing (`runtime.parallel.packing`), on shapes instead of tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

from moeconv.families.adapted import AdaptedModel
from runtime.estimate.finetuned import is_quantised, quantised_bytes
from runtime.estimate.parameters import Parameter
from runtime.estimate.setup import ITEMSIZE, Setup
from runtime.parallel.packing import lay_out, on_host, pack
from runtime.parallel.tensor_settings import DEFAULT


@dataclass(frozen=True, slots=True)
class State:
    """Bytes of one rank."""

    weights: int
    """In the compute dtype, of a quantised base codes and scales; with full sharding none are kept."""
    gradients: int
    """Sums in fp32 or bf16; with full sharding this rank's rows in fp32, which exist from the backward pass to the update."""
    masters: int
    """fp32, or their remainders; none where the weights are their own masters."""
    moments: int
    """And other states of the optimizer, such as the mean of the weights."""
    host: int = 0
    """Masters, moments and other states that are in the host's memory instead."""

    @property
    def total(self) -> int:
        """All of the GPU's together."""
        return self.weights + self.gradients + self.masters + self.moments

    def __add__(self, other: State) -> State:
        return State(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


def buckets(parameters: Sequence[Parameter]) -> Iterator[list[Parameter]]:
    """Sort a rank's parameters into the buckets that the trainer makes."""
    return pack(parameters, lambda p: p.alike, lambda p: p.size)


def rank_state(parameters: Sequence[Parameter], setup: Setup) -> State:
    """Count what a rank holds of its parameters.

    Args:
        parameters: the rank's, in the order of the model.
        setup: degrees, types and optimizer.

    Returns:
        Bytes by kind.
    """
    if not setup.parallel.fully_shard:
        return _in_buckets(parameters, setup, distributed=setup.parallel.use_distributed_optimizer)
    split = {expert: setup.replicas(expert=expert) > 1 for expert in (False, True)}
    whole = _in_buckets([p for p in parameters if not split[p.expert]], setup, distributed=False)
    return whole + _fully_sharded([p for p in parameters if split[p.expert]], setup)


def _in_buckets(parameters: Sequence[Parameter], setup: Setup, *, distributed: bool) -> State:
    weight, master = ITEMSIZE[setup.dtype], setup.master
    weights = sum(quantised_bytes(setup, p) for p in parameters if is_quantised(setup, p))
    gradients = 0
    owned: list[tuple[int, int]] = []
    """Elements that the rank updates of each bucket, and bytes of their optimizer states."""
    for members in buckets([p for p in parameters if not is_quantised(setup, p)]):
        still = members[0].frozen
        parts = setup.replicas(expert=members[0].expert) if distributed and not still else 1
        _, count = lay_out([member.size for member in members], parts)
        weights, gradients = weights + count * weight, gradients + (0 if still else count * setup.gradient)
        updated = 0 if still else count // parts
        owned.append((updated, updated * setup.states(members[0].settings)))
    masters = moments = host = 0
    chosen = on_host([count for count, _ in owned], setup.optim.on_host)
    for (count, states), away in zip(owned, chosen, strict=True):
        if away:
            host += count * master + states
        else:
            masters, moments = masters + count * master, moments + states
    return State(weights, gradients, masters, moments, host)


def _fully_sharded(parameters: Sequence[Parameter], setup: Setup) -> State:
    """Rows are dealt out evenly, rounded up; the shards are fp32 and are the masters, but for frozen ones."""
    sizes: list[int] = []
    frozen = 0
    for parameter in parameters:
        rows, parts = parameter.shape[0], setup.replicas(expert=parameter.expert)
        count = -(-rows // parts) * (parameter.size // rows)
        if parameter.frozen:
            frozen += count
        else:
            sizes.append(count)
    owned = sum(sizes)
    away = sum(size for size, chosen in zip(sizes, on_host(sizes, setup.optim.on_host), strict=True) if chosen)
    masters, states = owned * setup.wide, setup.states()
    return State(frozen * ITEMSIZE[setup.dtype], masters, masters, (owned - away) * states, away * states)


def checkpoint_bytes(setup: Setup, *, with_optimizer: bool = True) -> int:
    """Count the bytes of a checkpoint that a run saves: each element of the model once, without padding; of adapters without the model.

    Args:
        setup: the model and its types.
        with_optimizer: masters and moments, too.

    Returns:
        Bytes of tensors.
    """
    model = setup.model.by_itself() if isinstance(setup.model, AdaptedModel) else setup.model
    tensors = model.tensors.values()
    plain = [t for t in tensors if not t.rule.buffer and not setup.model.optional(t)]
    buffers = sum(t.size for t in tensors if t.rule.buffer) * 4
    groups, weight = setup.groups, ITEMSIZE[setup.dtype]
    settings = [(t.size, DEFAULT if groups is None else groups[t.name]) for t in plain]
    trained = [(size, found) for size, found in settings if with_optimizer and not found.frozen]
    masters = setup.wide if weight != setup.wide else 0
    states = sum(size * (masters + setup.states(found)) for size, found in trained)
    return buffers + sum(t.size for t in plain) * weight + states
