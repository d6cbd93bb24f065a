"""What finetuning adds to a plan: adapters' products, and a frozen base whose numbers are made before each product.

Legend: P rank of a parameter's adapters together, D and N its input and output width, R rows.
"""

from __future__ import annotations

from collections.abc import Sequence

from runtime.estimate.local import Local
from runtime.estimate.machine import Machine
from runtime.estimate.parameters import Parameter
from runtime.estimate.setup import ITEMSIZE, Setup
from runtime.quantised.sizes import piece_bytes


def is_quantised(setup: Setup, parameter: Parameter) -> bool:
    """Say whether a rank holds a parameter quantised."""
    return setup.lora.quantize_base is not None and parameter.base


def quantised_bytes(setup: Setup, parameter: Parameter) -> int:
    """Count the bytes of codes and scales of a parameter that a rank holds quantised."""
    kind = setup.lora.quantize_base
    assert kind is not None
    columns = parameter.shape[-1]
    matrix = (parameter.size // parameter.matrices // columns, columns)
    return parameter.matrices * piece_bytes(kind, matrix, double=setup.lora.double_quant)


def workspace_bytes(setup: Setup, rank: int) -> int:
    """Count the bytes that a pipeline rank makes numbers in: those of its largest quantised weight."""
    if setup.lora.quantize_base is None:
        return 0
    kinds = {
        layer
        for layers in setup.parameters.chunks[rank :: setup.parallel.pp]
        for layer in setup.parameters.kinds(layers)
    }
    sizes = [p.size for layer in kinds for p in setup.parameters.layer(layer) if is_quantised(setup, p)]
    return max(sizes, default=0) * ITEMSIZE[setup.dtype]


def making_numbers(setup: Setup, machine: Machine, parameter: Parameter) -> float:
    """Give the seconds that the numbers of a parameter take before a product; 0 where it is not quantised."""
    if not is_quantised(setup, parameter):
        return 0.0
    traffic = quantised_bytes(setup, parameter) + parameter.size * ITEMSIZE[setup.dtype]
    return machine.moving(traffic, "dequantise")


def adapters_seconds(
    setup: Setup, local: Local, machine: Machine, parameters: Sequence[Parameter]
) -> tuple[float, float, float]:
    """Work out the adapters of a layer: passes over rows that they meet, since their products are thin.

    Args:
        setup: what is planned.
        local: one rank's sizes.
        machine: the constants.
        parameters: A and B in turns.

    Returns:
        Seconds of the forward pass, the backward pass, and those of it that are weights' gradients.
    """
    forward = backward = weights = 0.0
    for a, b in zip(parameters[::2], parameters[1::2], strict=True):
        depth, width = a.shape[-1], b.shape[-2]
        rows = (local.rows_computed if a.expert else local.tokens) * local.item
        # The input read; the product with B added to the output, which experts' own products do while they make it.
        forward += rows * (depth + (0 if a.expert else 2) * width)
        # The output's gradient read for A's and for B's; the input's written and added (or in the same way), the input read for A's.
        own = (a.size + b.size) * 2 * setup.gradient + rows * (width + depth * (2 if a.expert else 1))
        backward += rows * (width + (0 if a.expert else 4) * depth) + own
        weights += own
    return machine.moving(forward, "plain"), machine.moving(backward, "plain"), machine.moving(weights, "plain")
