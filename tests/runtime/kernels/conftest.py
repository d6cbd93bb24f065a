"""Shared by the kernels' tests."""

import pytest
import torch


@pytest.fixture
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory of the kernels' outputs holds NaN, so that an element that nobody writes is seen."""
    new_empty, empty_like, empty = torch.Tensor.new_empty, torch.empty_like, torch.empty

    def filled(tensor: torch.Tensor) -> torch.Tensor:
        whole = {torch.uint8: 171, torch.int16: -30_000}
        return tensor.fill_(float("nan") if tensor.is_floating_point() else whole.get(tensor.dtype, -(10**6)))

    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: filled(new_empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: filled(empty_like(*a, **k)))
    monkeypatch.setattr(torch, "empty", lambda *a, **k: filled(empty(*a, **k)))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Draw the same numbers in each run: bounds on rounding hold for all but a few of them."""
    torch.manual_seed(0)
