"""What FP8 changes in a plan: copies of weights in 8 bits, what layers keep, products, and passes that make operands.

Follows `runtime.fp8` and `runtime.moe.fp8_experts`, which experts through Transformer Engine (sizes that aren't multiples of
128) don't: they are counted alike.
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
_BLOCKS = 4 / 128
"""Bytes an element of its block's scale."""
_MAKING_COPIES = 6
"""Bytes an element that making both takes: read for the largest value, read again, written twice."""


def in_fp8(setup: Setup, parameter: Parameter) -> bool:
    """Say whether a parameter's products are in FP8."""
    if setup.fp8.format is None or len(parameter.shape) < 2:
        return False
    if parameter.part == "experts":
        return True
    if parameter.part == "attention" and setup.model.has("attention.kv_b"):
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
    if not in_fp8(setup, parameter):
        return otherwise, None
    return machine.fp8_tflops * 1e12 * (machine.fp8_blocks_share if _blockwise(setup) else 1), 1


def _blockwise(setup: Setup) -> bool:
    return setup.fp8.recipe == "blockwise"


def _looked_at(setup: Setup, local: Local) -> int:
    """Bytes an element of the pass that looks for the largest value; only tensorwise scaling has one."""
    return local.item if setup.fp8.recipe == "tensorwise" else 0


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
    # Read twice two bytes and written one; delayed, where the bound is known, the product before writes it.
    swiglu = 0.0 if setup.fp8.recipe == "delayed" else machine.moving(5 * inner, "swiglu")
    # Gate, up and gradient read; gradients in both layouts and the activation written; tensorwise read once more for the
    # largest value.
    kind = "swiglu_blocks" if _blockwise(setup) else "swiglu_fp8"
    back = machine.moving((6 + 5 + (6 if looked else 0)) * inner, kind)
    return made + gather + swiglu, made + 3 * gather + back


def expert_activations(setup: Setup, local: Local, inputs: float) -> tuple[float, float]:
    """Give the bytes that experts keep, and that they need beside it in the backward pass.

    Args:
        setup: the run.
        local: sizes of a rank.
        inputs: bytes of tokens that are kept in the model's type where nothing else keeps them.
    """
    tokens, rows = local.gathered * local.hidden, local.rows_allocated
    blocks = _BLOCKS if _blockwise(setup) else 0.0
    # Blockwise tokens are rounded again, in the blocks of their transpose: they are kept as they are.
    kept = (inputs if blocks else tokens) + rows * (2 * local.width * local.item + blocks * local.width)
    # SwiGLU's backward pass holds its incoming gradient in bf16 beside what it makes in 8 bits: gradients of gate and up in both
    # layouts and the activation. These five stay while the gradient of the rows is computed.
    made = 5 * local.width * (1 + blocks)
    working = rows * max(made + local.width * local.item, made + local.hidden * local.item)
    return kept, working + tokens * (1 + blocks)
