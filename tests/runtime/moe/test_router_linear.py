"""The router's projection in bf16 parts. Only GPUs have its products, so here fp32 ones of the same numbers take their place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

from runtime.moe.router_linear import _SplitLinear, split_bf16
from tests.runtime.moe.oracle import relative
from tests.support.launches import Launches


class Products:
    """What a GPU does: bf16 factors, sums in fp32. Counts how often."""

    def __init__(self) -> None:
        self.count, self._mm = 0, torch.mm

    def __call__(self, left: torch.Tensor, right: torch.Tensor, out_dtype: torch.dtype | None = None) -> torch.Tensor:
        assert left.dtype == right.dtype == torch.bfloat16
        self.count += 1
        with _disable_current_modes():
            return self._mm(left.float(), right.float()).to(out_dtype or left.dtype)


@pytest.mark.parametrize("dim", [0, 1])
def test_three_parts_are_the_whole(dim: int) -> None:
    values = torch.randn(6, 8)
    parts = split_bf16(values, 3, dim).chunk(3, dim)
    assert torch.equal(sum(part.double() for part in parts), values.double())
    assert torch.equal(parts[0], values.bfloat16())
    assert split_bf16(parts[0], 3, dim) is parts[0]


@pytest.mark.parametrize(
    ("dtype", "forward", "backward", "bound"),
    [(torch.float32, 7, 13, 1e-6), (torch.bfloat16, 1, 10, 4e-3)],
)
def test_equals_fp64_in_few_launches(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, forward: int, backward: int, bound: float
) -> None:
    torch.manual_seed(0)
    products = Products()
    monkeypatch.setattr(torch, "mm", products)
    x = torch.randn(100, 64).bfloat16().requires_grad_()
    weight = torch.randn(16, 64).to(dtype).requires_grad_()
    grad = torch.randn(100, 16)
    with Launches() as launches:
        logits: Any = _SplitLinear.apply(x, weight)
    assert len(launches.names) + products.count == forward, launches.names
    with Launches() as launches:
        grad_x, grad_weight = torch.autograd.grad(logits, [x, weight], grad)
    assert len(launches.names) + products.count - 1 == backward, launches.names
    assert relative(logits, x.double() @ weight.double().t()) < 1e-6
    assert relative(grad_x, grad.double() @ weight.double()) < 4e-3
    assert relative(grad_weight, grad.double().t() @ x.double()) < bound
