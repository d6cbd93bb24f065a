"""The passes that make 8-bit operands against plain torch: fresh inputs, poisoned outputs, odd sizes, empty experts.

On a GPU the kernels run compiled, without one in Triton's interpreter.
"""

import os
import re
import subprocess
import sys

import pytest
import torch

from runtime.fp8.operands import E4M3, eight_bits, in_fp32
from runtime.moe import passes
from runtime.moe.permutation import RowPlan, plan_rows

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
E5M2 = torch.float8_e5m2
STEP = {E4M3: 2**-3, E5M2: 2**-2}  # the largest distance of neighbours, relative
pytestmark = pytest.mark.usefixtures("_poison")


def assert_rounded(bits: torch.Tensor, bound: torch.Tensor, exact: torch.Tensor) -> None:
    """Nearly all numbers are the nearest, and the others near it."""
    found, nearest = bits.float(), eight_bits(exact, bound, bits.dtype).float()
    # Where rounding up reaches the next power of two, the interpreter (triton 3.6) gives half of it.
    carried = torch.zeros_like(found, dtype=torch.bool) if bits.is_cuda else (found * 2 == nearest) & (nearest != 0)
    assert carried.float().mean() < 0.05
    assert (found == nearest)[~carried].float().mean() > 0.98
    tiny = torch.finfo(bits.dtype).smallest_normal
    assert ((found - nearest).abs() <= STEP[bits.dtype] * nearest.abs() + tiny)[~carried].all()


def plan_of(num_tokens: int, topk: int, num_experts: int) -> RowPlan:
    experts = torch.rand(num_tokens, max(topk, num_experts - 1), device=DEVICE).topk(topk, -1).indices  # one is empty
    experts[torch.rand(experts.shape, device=DEVICE) < 0.2] = num_experts
    return plan_rows(experts, num_experts, num_tokens * topk, alignment=128, fused=False)


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize(("shape", "padded"), [((2, 70, 130), 128), ((1, 5, 3), 5), ((3, 64, 128), 64)])
def test_quantise(shape: tuple[int, int, int], padded: int, dtype: torch.dtype) -> None:
    from runtime.kernels.fp8 import amax, quantise

    room = torch.empty(*shape[:2], shape[2] + 16, dtype=torch.bfloat16, device=DEVICE)  # NaN between the rows
    x = room[:, :, : shape[2]].copy_(torch.randn(shape, device=DEVICE).to(torch.bfloat16) * 3)
    bound = torch.rand(shape[0], device=DEVICE) + 4  # some saturate
    rows = torch.empty(shape[0], padded, shape[2], device=DEVICE).to(dtype)
    columns = torch.empty(shape[0], shape[2] + 4, padded, device=DEVICE).to(dtype)
    found, alone = torch.zeros(shape[0], device=DEVICE), torch.zeros(shape[0], device=DEVICE)
    quantise(x, bound, rows, columns[:, 2:-2], found)
    amax(x, alone)
    assert torch.equal(found, x.abs().float().amax((1, 2)))
    assert torch.equal(found, alone)
    for group in range(shape[0]):
        assert_rounded(rows[group, : shape[1]], bound[group], x[group])
    assert torch.equal(rows.view(torch.uint8), columns[:, 2:-2].transpose(1, 2).view(torch.uint8))
    assert not rows[:, shape[1] :].view(torch.uint8).any()
    assert columns[:, :2].float().isnan().all()


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_what_is_not_finite_becomes_nan(dtype: torch.dtype) -> None:
    from runtime.kernels.fp8 import quantise

    x = torch.tensor([[[1.0, float("inf"), -float("inf"), float("nan"), 1e30, -1e30, 0.0, 5.0]]], device=DEVICE)
    bound, rows = torch.full((1,), 2.0, device=DEVICE), torch.empty(1, 1, 8, device=DEVICE).to(dtype)
    quantise(x.to(torch.bfloat16), bound, rows, None)
    expected = torch.tensor([1.0, *[float("nan")] * 3, 2.0, -2.0, 0.0, 2.0])
    plain = eight_bits(x[0, 0], bound, dtype)
    for bits in (rows[0, 0], plain) if DEVICE.type == "cuda" else (plain,):  # the interpreter's conversion knows no NaN
        torch.testing.assert_close(in_fp32(bits, bound).cpu(), expected, equal_nan=True, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("num_tokens", "topk", "num_experts", "hidden"), [(37, 2, 4, 48), (150, 3, 7, 130), (1, 1, 1, 8)]
)
def test_gather_columns(num_tokens: int, topk: int, num_experts: int, hidden: int) -> None:
    from runtime.kernels.fp8 import gather_columns

    plan = plan_of(num_tokens, topk, num_experts)
    end = int(plan.offsets_E[-1])
    x = torch.randint(0, 255, (num_tokens, hidden), dtype=torch.uint8, device=DEVICE)
    columns = gather_columns(x.view(E4M3), plan.slot_of_row_R, plan.offsets_E, topk).view(torch.uint8)
    assert torch.equal(columns[:, :end], passes.gather_rows(x, plan, fused=False)[:end].t())


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize(("num_tokens", "topk", "num_experts", "width"), [(60, 2, 3, 256)])
def test_swiglu(num_tokens: int, topk: int, num_experts: int, width: int, dtype: torch.dtype) -> None:
    from runtime.kernels.fp8 import swiglu, swiglu_backward

    plan = plan_of(num_tokens, topk, num_experts)
    end = int(plan.offsets_E[-1])
    hidden = torch.randn(plan.num_rows, 2 * width, device=DEVICE).to(torch.bfloat16)
    grad = torch.randn(plan.num_rows, width, device=DEVICE).to(torch.bfloat16)
    padding = plan.slot_of_row_R < 0
    hidden[padding], grad[padding] = float("nan"), float("nan")  # nothing may come of them
    weights = torch.rand(num_tokens, topk, device=DEVICE)
    clean = [t.masked_fill(padding.unsqueeze(1), 0).double() for t in (hidden, grad)]
    expected_grad, expected_weights, expected = passes.swiglu_backward(
        clean[0], weights.double(), clean[1], plan, fused=False
    )
    bounds = torch.tensor([2.0], device=DEVICE), torch.tensor([1.5], device=DEVICE)
    kept = (hidden, weights, plan.slot_of_row_R, plan.offsets_E)
    assert_rounded(swiglu(*kept, bounds[1])[:end], bounds[1], expected[:end])
    args = (hidden, weights, grad, plan.slot_of_row_R, plan.offsets_E)
    alone, beside = torch.zeros(1, device=DEVICE), torch.zeros(1, device=DEVICE)
    assert swiglu_backward(*args, None, dtype, alone) is None
    made = swiglu_backward(*args, bounds, dtype, beside)
    assert made is not None
    rows, columns, act, dots = made
    assert float(alone) == float(beside) == pytest.approx(float(expected_grad.abs().max()), rel=1e-5)
    assert_rounded(rows[:end], bounds[0], expected_grad[:end])
    assert torch.equal(rows.view(torch.uint8)[:end], columns.view(torch.uint8).t()[:end])
    assert_rounded(act.t()[:end], bounds[1], expected[:end])
    torch.testing.assert_close(passes.rows_to_slots(dots, plan).double(), expected_weights, rtol=1e-4, atol=1e-5)


def test_no_rounded_pair_is_both_packed_and_split() -> None:
    """ptxas 12.8 for sm_90 splits such a pair's register before the pair is in it."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.runtime.kernels.fp8_for_hopper"]
    out = subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout
    kernels = dict(part.split("\n", 1) for part in out.split("// kernel: ")[1:])
    counts = {}
    for name, ptx in kernels.items():
        pairs = set(re.findall(r"cvt\.rn\.satfinite\.e4m3x2\.f32\s+(%rs\d+)", ptx))
        packed = {pair for both in re.findall(r"mov\.b32\s+%r\d+, \{(%rs\d+), (%rs\d+)\}", ptx) for pair in both}
        split = set(re.findall(r"shr\.u16\s+%rs\d+, (%rs\d+), 8", ptx))
        assert pairs == (packed | split) & pairs, name
        assert not packed & split & pairs, name
        counts[name] = len(pairs)
    assert len(counts) == 7
    assert (
        counts["swiglu_backward"] == 40
    )  # of 16 elements a thread: gradients of gate and up for each layout, and the output
