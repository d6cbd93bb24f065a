"""What FP8 changes in a plan: copies of weights in 8 bits, what layers keep, products, and passes that make operands.

Follows `runtime.fp8` and `runtime.moe.fp8_experts`, which experts through Transformer Engine (`--fp8-recipe blockwise`, sizes
that aren't multiples of 128) don't: they are counted alike.
"""

from __future__ import annotations

from collections.abc import Iterable

from runtime.estimate.local import Local
from runtime.estimate.machine import Machine
from runtime.estimate.parameters import Parameter
from runtime.estimate.setup import Setup
from runtime.fp8.config import ROW_ALIGNMENT

COPIES = 2
"""Of a weight, a byte an element each: the tensor cores want the reduction along the rows, forward and backward."""
_MAKING_COPIES = 6
"""Bytes an element that making both takes: read for the largest value, read again, written twice."""


def in_fp8(setup: Setup, parameter: Parameter) -> bool:
    """Say whether a parameter's products are in FP8."""
    if setup.fp8.format is None or len(parameter.shape) < 2:
        return False
    if parameter.part == "experts":
        return True
    if setup.fp8.recipe == "blockwise" or (parameter.part == "attention" and setup.model.has("attention.kv_b")):
        return False
    fits = all(size % ROW_ALIGNMENT == 0 for size in parameter.shape)
    return fits and parameter.part in ("attention", "mlp", "shared")


def parts_in_fp8(setup: Setup, layer: int) -> set[str]:
    """Give the parts of a layer that compute in FP8."""
    if setup.fp8.format is None:
        return set()
    return {p.part for p in setup.parameters.layer(layer) if in_fp8(setup, p)}


def copied_elements(setup: Setup, rank: int) -> int:
    """Count the elements of a pipeline rank's weights that it holds in 8 bits as well, whole also under full sharding."""
    if setup.fp8.format is None:
        return 0
    chunks = setup.parameters.chunks[rank :: setup.parallel.pp]
    counted = [(layer, n) for layers in chunks for layer, n in setup.parameters.kinds(layers).items()]
    return sum(n * p.size for layer, n in counted for p in setup.parameters.layer(layer) if in_fp8(setup, p))


def copying_seconds(setup: Setup, machine: Machine, rank: int) -> float:
    """Give the time in a step in which weights are brought to 8 bits."""
    return machine.moving(_MAKING_COPIES * copied_elements(setup, rank), "quantise")


def product_rate(setup: Setup, machine: Machine, parameter: Parameter, otherwise: float) -> tuple[float, int | None]:
    """Give the operations a second of a parameter's products, and its bytes an element; the latter None where it is not in FP8."""
    return (machine.fp8_tflops * 1e12, 1) if in_fp8(setup, parameter) else (otherwise, None)


def _looked_at(setup: Setup, local: Local) -> int:
    """Bytes an element of the pass that looks for the largest value; delayed scaling has none."""
    return 0 if setup.fp8.recipe == "delayed" else local.item


def dense_passes(
    setup: Setup, local: Local, machine: Machine, part: str, parameters: Iterable[Parameter]
) -> tuple[float, float]:
    """Give the seconds in which tokens and gradients of a part's products come to 8 bits, in both layouts; forward and backward."""
    own = [p for p in parameters if in_fp8(setup, p)]
    if not own:
        return 0.0, 0.0
    each = local.item + COPIES + _looked_at(setup, local)
    between = local.query if part == "projections" else setup.model.width(part) // setup.parallel.tp
    inputs, gradients = local.hidden + between, sum(p.shape[0] for p in own)
    return tuple(machine.moving(local.tokens * width * each, "quantise") for width in (inputs, gradients))  # type: ignore[return-value]


def expert_passes(setup: Setup, local: Local, machine: Machine) -> tuple[float, float]:
    """Give the seconds of passes over experts' rows in 8 bits, without the sums, forward and backward."""
    rows, tokens = local.rows_computed * local.hidden, local.gathered * local.hidden
    inner, looked = local.rows_computed * local.width, _looked_at(setup, local)
    made = machine.moving(tokens * (local.item + 1 + looked), "quantise")
    gather = machine.moving(rows + tokens, "gather")
    # Read twice two bytes and written one; with a bound that is known, the product before writes it.
    swiglu = machine.moving(5 * inner, "swiglu") if looked else 0.0
    # Gate, up and gradient read; gradients in both layouts and the activation written; read once more for the largest value.
    back = machine.moving((6 + 5 + (6 if looked else 0)) * inner, "swiglu_fp8")
    return made + gather + swiglu, made + 3 * gather + back


def expert_activations(setup: Setup, local: Local) -> tuple[float, float]:
    """Give the bytes that experts keep, and that they need beside it in the backward pass."""
    tokens, rows = local.gathered * local.hidden, local.rows_allocated
    kept = tokens + rows * 2 * local.width * local.item
    # SwiGLU's backward pass holds its incoming gradient in bf16 beside what it makes in 8 bits: gradients of gate and up in both
    # layouts and the activation. These five stay while the gradient of the rows is computed.
    made = 5 * local.width
    working = rows * max(made + local.width * local.item, made + local.hidden * local.item)
    return kept, working + tokens
