"""The passes that make 8-bit operands block by block against plain torch: fresh inputs, poisoned outputs, empty experts.

On a GPU the kernels run compiled, without one in Triton's interpreter.
"""

import pytest
import torch

from runtime.fp8 import blocks
from runtime.fp8.operands import E4M3, Operand, spans, spread
from runtime.moe import passes
from tests.runtime.kernels.test_fp8 import DEVICE, E5M2, STEP, plan_of

pytestmark = pytest.mark.usefixtures("_poison")


def room(rows: int, depth: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty(rows, depth, device=DEVICE).to(dtype), torch.empty(depth // 128, rows, device=DEVICE)


def assert_like(made: tuple[torch.Tensor, torch.Tensor], expected: Operand, end: int | None = None) -> None:
    """Nearly all scales and numbers are the same, and the others near, of some rows."""
    bits, scale = made[0][:end], made[1][:, :end]
    wanted, scales = expected.bits[:end], expected.scale[:, :end]
    # A largest number that rounding moves over a power of two has twice the scale or half.
    assert (scale == scales).float().mean() > 0.99
    found, nearest = Operand(bits, scale).in_fp32(), Operand(wanted, scales).in_fp32()
    # Where rounding up reaches the next power of two, the interpreter (triton 3.6) gives half of it.
    carried = torch.zeros_like(found, dtype=torch.bool) if bits.is_cuda else (found * 2 == nearest) & (nearest != 0)
    assert carried.float().mean() < 0.05
    assert (found == nearest)[~carried].float().mean() > 0.98
    tiny = torch.finfo(bits.dtype).smallest_normal * torch.maximum(scale, scales).repeat_interleave(128, 0).t()
    assert ((found - nearest).abs() <= 2 * STEP[bits.dtype] * nearest.abs() + 2 * tiny)[~carried].all()


def varied(*shape: int) -> torch.Tensor:
    """Blocks of very different sizes, one of zeros among them; in fp32, where hardly a number lies midway."""
    num_blocks = [-(-size // 128) for size in shape[-2:]]
    sizes = 10 ** torch.randint(-9, 9, (*shape[:-2], *num_blocks), device=DEVICE).float()
    sizes[..., 0, 0] = 0
    return torch.randn(shape, device=DEVICE) * spread(sizes)[..., : shape[-2], : shape[-1]]


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize(("num_rows", "padded", "width"), [(300, 384, 256), (5, 128, 128)])
def test_rows_and_columns(num_rows: int, padded: int, width: int, dtype: torch.dtype) -> None:
    from runtime.kernels.fp8_blocks import quantise

    apart = torch.empty(num_rows, width + 16, device=DEVICE)  # NaN between the rows
    x = apart[:, :width].copy_(varied(num_rows, width))
    whole = torch.zeros(padded, width, device=DEVICE)
    whole[:num_rows] = x
    bits, scale = room(padded, width + 128, dtype)
    columns = room(width + 128, padded, dtype)
    rows = (bits[:, 128:], scale[1:])
    quantise(x, rows, (columns[0][128:], columns[1][:, 128:]))
    assert_like(rows, blocks.rows_of(whole, dtype))
    assert_like((columns[0][128:], columns[1][:, 128:]), blocks.columns_of(whole, dtype))
    assert bits[:, :128].float().isnan().all()
    assert scale[0].isnan().all()
    assert columns[0][:128].float().isnan().all()
    alone = room(width, padded, dtype)
    quantise(x, None, alone)
    assert torch.equal(alone[0].view(torch.uint8), columns[0][128:].view(torch.uint8))


def test_matrices() -> None:
    from runtime.kernels.fp8_blocks import quantise_matrices

    parts = [varied(2, 256, 384), varied(2, 128, 384)]
    made = blocks.empty_matrices(2, 384, 384, DEVICE)
    for part, place in zip(parts, spans(part.shape[1] for part in parts), strict=True):
        quantise_matrices(part, blocks._rows(made.rows, *place), blocks._columns(made.columns, *place))  # type: ignore[arg-type]
    on_cpu = blocks.empty_matrices(2, 384, 384, torch.device("cpu"))
    blocks.quantise_matrices([part.cpu() for part in parts], on_cpu)
    ones = torch.ones(3, 384)
    for mine, plain in ((made.rows, on_cpu.rows), (made.columns, on_cpu.columns)):
        assert mine is not None
        assert plain is not None
        assert torch.equal(mine.scale.cpu(), plain.scale)
        for group in range(2):
            assert_like((mine.bits[group].cpu(), ones), Operand(plain.bits[group], ones))
    assert made.rows is not None
    assert made.columns is not None
    assert torch.equal(made.rows.bits.view(torch.uint8), made.columns.bits.view(torch.uint8).transpose(1, 2))


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize(("num_tokens", "topk", "num_experts", "hidden"), [(150, 3, 7, 256), (1, 1, 1, 128)])
def test_rows_of_experts(num_tokens: int, topk: int, num_experts: int, hidden: int, dtype: torch.dtype) -> None:
    from runtime.kernels.fp8_blocks import gather_columns, gather_scales

    plan = plan_of(num_tokens, topk, num_experts)
    end = int(plan.offsets_E[-1])
    x = varied(num_tokens, hidden)
    places = (plan.slot_of_row_R, plan.offsets_E, topk)
    rows = passes.gather_rows(x, plan, fused=False)
    columns = gather_columns(x, dtype, *places)
    expected = blocks.columns_of(rows[:end], dtype)
    assert_like((columns[0][:, :end], columns[1][: end // 128]), expected)
    tokens = blocks.rows_of(x, dtype)
    scales = gather_scales(tokens.scale, *places)[:, :end]
    real = plan.slot_of_row_R[:end] >= 0
    assert torch.equal(scales[:, real], blocks.rows_of(rows[:end], dtype).scale[:, real])
    assert (scales[:, ~real] == 1).all()


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize(("num_tokens", "topk", "num_experts", "width"), [(60, 2, 3, 256)])
def test_swiglu(num_tokens: int, topk: int, num_experts: int, width: int, dtype: torch.dtype) -> None:
    from runtime.kernels.fp8_blocks_swiglu import swiglu, swiglu_backward

    plan = plan_of(num_tokens, topk, num_experts)
    end = int(plan.offsets_E[-1])
    hidden, grad = 3 * torch.randn(plan.num_rows, 2 * width, device=DEVICE), varied(plan.num_rows, width)
    padding = plan.slot_of_row_R < 0
    hidden[padding], grad[padding] = float("nan"), float("nan")  # nothing may come of them
    weights = torch.rand(num_tokens, topk, device=DEVICE)
    clean = [t.masked_fill(padding.unsqueeze(1), 0).float() for t in (hidden, grad)]
    expected_grad, expected_weights, expected = passes.swiglu_backward(clean[0], weights, clean[1], plan, fused=False)
    kept = (hidden, weights, plan.slot_of_row_R, plan.offsets_E)
    assert_like(swiglu(*kept), blocks.rows_of(expected[:end], E4M3), end)
    args = (hidden, weights, grad, plan.slot_of_row_R, plan.offsets_E)
    rows, columns, act, dots = swiglu_backward(*args, dtype)
    assert_like(rows, blocks.rows_of(expected_grad[:end], dtype), end)
    assert_like((columns[0][:, :end], columns[1][: end // 128]), blocks.columns_of(expected_grad[:end], dtype))
    assert_like((act[0][:, :end], act[1][: end // 128]), blocks.columns_of(expected[:end], E4M3))
    torch.testing.assert_close(
        passes.rows_to_slots(dots, plan), expected_weights, rtol=1e-4, atol=float(expected_weights.abs().max()) * 1e-5
    )
