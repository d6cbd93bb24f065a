"""Each kernel against plain torch in fp64: fresh inputs, poisoned outputs, odd sizes, empty experts.

On a GPU the kernels run compiled, without one in Triton's interpreter.
"""

import os
import subprocess
import sys

import pytest
import torch

from moeconv.families.compute import Gate
from runtime.moe import passes
from runtime.moe.clamped_mlp import Activation, activate, activate_backward, experts_of_rows
from runtime.moe.permutation import RowPlan, plan_blocks, plan_rows
from runtime.moe.sinkhorn import MAX_ITERATIONS, TOLERANCE, sinkhorn
from runtime.moe.tail import TAIL
from runtime.ops.swiglu import swiglu
from tests.runtime.moe.oracle import relative

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES = [(37, 2, 4, 1, 48, 33), (60, 3, 7, 32, 130, 64), (1, 1, 1, 1, 8, 8), (5, 4, 4, 8, 32, 16), (0, 2, 3, 4, 16, 8)]


def plans(num_tokens: int, topk: int, num_experts: int, alignment: int) -> tuple[torch.Tensor, RowPlan]:
    """Random choices, a fifth of them dropped, the last expert empty where there are others."""
    usable = max(topk, num_experts - 1)
    experts = torch.stack([torch.randperm(usable)[:topk] for _ in range(num_tokens)] or [torch.zeros(topk)]).long()
    experts = experts[:num_tokens].to(DEVICE)
    experts[torch.rand(experts.shape, device=DEVICE) < 0.2] = num_experts
    plan = plan_rows(experts, num_experts, num_tokens * topk, alignment=alignment, fused=False)
    return experts, plan


pytestmark = pytest.mark.usefixtures("_poison")


@pytest.mark.parametrize(
    ("num_tokens", "topk", "num_experts", "alignment", "_d", "_f"), [*SIZES, (300, 3, 37, 128, 0, 0)]
)
def test_counting_sort(num_tokens: int, topk: int, num_experts: int, alignment: int, _d: int, _f: int) -> None:
    from runtime.kernels.counting_sort import counting_sort

    experts, plan = plans(num_tokens, topk, num_experts, alignment)
    order = counting_sort(experts, num_experts, plan.num_rows, alignment)
    assert torch.equal(order.offsets_E, plan.offsets_E)
    assert torch.equal(order.slot_of_row_R, plan.slot_of_row_R)
    assert torch.equal(order.row_of_slot_TK, plan.row_of_slot_TK)


@pytest.mark.parametrize("share", [0.4, 1.0, 2.0])
@pytest.mark.parametrize(
    ("num_tokens", "topk", "num_experts", "alignment"), [(37, 2, 4, 1), (300, 3, 37, 128), (1, 1, 1, 1)]
)
def test_counting_sort_where_room_is_less_than_needed(
    num_tokens: int, topk: int, num_experts: int, alignment: int, share: float
) -> None:
    """Of rows in all, and of each expert: what has no room has no row, and how much was needed is said."""
    from runtime.kernels.counting_sort import counting_sort

    experts, plan = plans(num_tokens, topk, num_experts, alignment)
    sizes = torch.bincount(experts.flatten(), minlength=num_experts + 1)[:num_experts]
    before = torch.ones((), dtype=torch.int32, device=DEVICE)
    max_rows = int(sizes.sum() * share)
    room = max(1, int(sizes.max() * share))
    for limits, make in (
        ({}, lambda note: plan_rows(experts, num_experts, max_rows, alignment=alignment, fused=False, needed=note)),
        ({"room": room}, lambda note: plan_blocks(experts, num_experts, room, note, fused=False)),
    ):
        note, noted = before.clone(), before.clone()
        want = make(note)
        order = counting_sort(experts, num_experts, want.num_rows, want.alignment, needed=noted, **limits)
        assert noted.item() == note.item() == max(1, int(sizes.max() if limits else sizes.sum()))
        assert torch.equal(order.offsets_E, want.offsets_E)
        assert torch.equal(order.slot_of_row_R, want.slot_of_row_R)
        assert torch.equal(order.row_of_slot_TK, want.row_of_slot_TK)
        kept = want.row_of_slot_TK[want.row_of_slot_TK >= 0]
        assert kept.unique().numel() == kept.numel() == (want.slot_of_row_R >= 0).sum()
        if limits:
            assert kept.numel() == sizes.clamp(max=room).sum()
            assert torch.equal(want.offsets_E.long(), room * torch.arange(1, num_experts + 1, device=DEVICE))
        elif share >= 1:
            assert torch.equal(want.row_of_slot_TK, plan.row_of_slot_TK)


@pytest.mark.parametrize(("num_tokens", "topk", "num_experts", "alignment", "hidden", "width"), SIZES)
def test_gather_and_sum(num_tokens: int, topk: int, num_experts: int, alignment: int, hidden: int, width: int) -> None:
    from runtime.kernels.permute import gather_rows, sum_rows

    _, plan = plans(num_tokens, topk, num_experts, alignment)
    end = int(plan.offsets_E[-1])
    x = torch.randn(num_tokens, hidden, device=DEVICE)
    rows = gather_rows(x, plan.row_of_slot_TK, plan.slot_of_row_R, plan.offsets_E, alignment)
    assert torch.equal(rows[:end], passes.gather_rows(x, plan, fused=False)[:end])
    values = torch.randn(plan.num_rows, hidden, device=DEVICE)
    values[end:] = float("nan")  # rows of no expert: nothing may read them
    total = sum_rows(values, plan.row_of_slot_TK)
    expected = passes.sum_rows(values.double(), plan, fused=False)
    torch.testing.assert_close(total.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("num_tokens", "topk", "num_experts", "alignment", "hidden", "width"), SIZES)
def test_rows_with_their_weights_behind_them(
    num_tokens: int, topk: int, num_experts: int, alignment: int, hidden: int, width: int
) -> None:
    from runtime.kernels.permute import Beside, gather_rows, sum_rows

    _, plan = plans(num_tokens, topk, num_experts, alignment)
    end, slots = int(plan.offsets_E[-1]), plan.row_of_slot_TK

    def packed(rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """All of it, the rows, and what lies behind them."""
        whole = torch.full((rows, hidden + TAIL), float("nan"), device=DEVICE)
        return whole, whole[:, :hidden], whole[:, hidden:]

    x, weights = torch.randn(num_tokens, hidden, device=DEVICE), torch.rand(num_tokens, topk, device=DEVICE)
    _, rows, tails = packed(plan.num_rows)
    args = (slots, plan.slot_of_row_R, plan.offsets_E, alignment)
    gather_rows(x, *args, out_RD=rows, beside=Beside(weights, tails))
    assert torch.equal(rows[:end], passes.gather_rows(x, plan, fused=False)[:end])
    filled = plan.slot_of_row_R[:end] >= 0
    assert torch.equal(tails[:end][filled, 0], passes.slots_to_rows(weights, plan)[:end][filled])
    assert not tails[:end][filled, 1:].any()
    # Back, from rows that lie apart to sums that do, and the weights to their slots.
    _, sums, beyond = packed(num_tokens)
    back = torch.full_like(weights, float("nan"))
    sum_rows(rows, slots, out_TD=sums, beside=Beside(back, tails))
    torch.testing.assert_close(sums, passes.sum_rows(rows.nan_to_num(), plan, fused=False), rtol=1e-6, atol=1e-6)
    assert torch.equal(back, torch.where(slots >= 0, weights, 0))
    assert beyond.isnan().all()
    assert torch.equal(gather_rows(sums, *args)[:end], passes.gather_rows(sums, plan, fused=False)[:end])


@pytest.mark.parametrize(("num_tokens", "topk", "num_experts", "alignment", "hidden", "width"), SIZES)
def test_swiglu(num_tokens: int, topk: int, num_experts: int, alignment: int, hidden: int, width: int) -> None:
    from runtime.kernels.swiglu import swiglu_backward, swiglu_forward

    _, plan = plans(num_tokens, topk, num_experts, alignment)
    end, slots = int(plan.offsets_E[-1]), plan.slot_of_row_R
    hidden_pre = torch.randn(plan.num_rows, 2 * width, device=DEVICE)
    weights = torch.rand(num_tokens, topk, device=DEVICE)
    grad = torch.randn(plan.num_rows, width, device=DEVICE)
    out = swiglu_forward(hidden_pre, weights, slots, plan.offsets_E)
    expected = passes.swiglu(hidden_pre.double(), weights.double(), plan, fused=False)
    torch.testing.assert_close(out[:end].double(), expected[:end], rtol=1e-5, atol=1e-6)
    expected = passes.swiglu_backward(hidden_pre.double(), weights.double(), grad.double(), plan, fused=False)
    version = hidden_pre._version
    actual = swiglu_backward(hidden_pre, weights, grad, slots, plan.offsets_E)
    for mine, other, rows in zip(actual, expected, (end, None, end), strict=True):
        torch.testing.assert_close(mine[:rows].double(), other[:rows], rtol=1e-5, atol=1e-5)
    if plan.num_rows:
        assert hidden_pre._version > version  # a second backward pass through it is an error


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "topk", "pre_softmax", "scale"),
    [
        (37, 4, 2, False, 1.0),
        (130, 60, 8, False, 2.5),
        (100, 64, 4, True, 1.0),
        (5, 1, 1, False, 1.0),
        (0, 8, 2, True, 1.0),
    ],
)
def test_topk_softmax(
    num_tokens: int, num_experts: int, topk: int, pre_softmax: bool, scale: float, given: bool
) -> None:
    """With choices given, they are any of a token's experts: what an earlier run chose needn't be best in this one."""
    from runtime.kernels.routing import topk_softmax

    logits = torch.randn(num_tokens, num_experts, device=DEVICE, requires_grad=True)
    exact = logits.detach().double().requires_grad_()
    drawn = torch.rand_like(logits).argsort(-1)[:, :topk] if given else None
    experts, weights, sums = topk_softmax(logits, topk, pre_softmax=pre_softmax, scale=scale, chosen_TK=drawn)
    probs = exact.softmax(-1)
    chosen = exact.topk(topk, -1).indices if drawn is None else drawn
    values = exact.gather(1, chosen)
    expected = (probs.gather(1, chosen) if pre_softmax else values.softmax(-1)) * scale
    squares = exact.logsumexp(-1).square().sum()
    assert torch.equal(experts, chosen)
    torch.testing.assert_close(weights.double(), expected, rtol=1e-5, atol=1e-6)
    counts = torch.bincount(chosen.flatten(), minlength=num_experts).double()
    rest = [squares.view(1), torch.special.entr(probs).sum().view(1), squares.new_zeros(1)]
    torch.testing.assert_close(sums.double(), torch.cat([probs.sum(0), counts, *rest]), rtol=1e-4, atol=1e-4)
    for_weights = torch.randn(num_tokens, topk, device=DEVICE)
    for_probs = torch.randn(num_experts, device=DEVICE)
    ((weights * for_weights).sum() + (sums[:num_experts] * for_probs).sum() + 0.3 * sums[-3]).backward()
    ((expected * for_weights).sum() + (probs.sum(0) * for_probs).sum() + 0.3 * squares).backward()
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter, about the NaN that it is given
def test_topk_softmax_ties_and_non_finite_tokens() -> None:
    from runtime.kernels.routing import topk_softmax

    logits = torch.zeros(4, 8, device=DEVICE)
    logits[1, 3] = float("nan")
    logits[2, 5] = float("inf")
    experts, _, sums = topk_softmax(logits, 3, pre_softmax=False, scale=1.0)
    assert experts[0].tolist() == [0, 1, 2]
    assert int(sums[-1]) == 2
    assert int(experts.min()) >= 0
    assert int(experts.max()) < 8


def test_bf16_and_fp16_are_rounded_once() -> None:
    from runtime.kernels.swiglu import swiglu_forward

    _, plan = plans(64, 2, 4, 1)
    end = int(plan.offsets_E[-1])
    weights = torch.rand(64, 2, device=DEVICE)
    for dtype, bound in ((torch.bfloat16, 5e-3), (torch.float16, 6e-4)):
        hidden = torch.randn(plan.num_rows, 64, device=DEVICE).to(dtype)
        out = swiglu_forward(hidden, weights, plan.slot_of_row_R, plan.offsets_E)
        expected = passes.swiglu(hidden.double(), weights.double(), plan, fused=False)
        assert relative(out[:end], expected[:end]) < bound


# On a GPU many programs meet at the barrier; the interpreter runs one after the other, so there it gets one.
SINKHORN_PROGRAMS = 128 if torch.cuda.is_available() else 1


@pytest.mark.parametrize("scale", [0.3, 3.0])
@pytest.mark.parametrize(("num_tokens", "num_experts"), [(700, 8), (33, 60), (1500, 4), (1, 3), (64, 128), (0, 8)])
def test_sinkhorn(num_tokens: int, num_experts: int, scale: float) -> None:
    from runtime.kernels.sinkhorn import sinkhorn_plan

    logits = torch.randn(num_tokens, num_experts, device=DEVICE) * scale
    exact = sinkhorn(logits.double(), fused=False)
    plan = sinkhorn_plan(logits, MAX_ITERATIONS, TOLERANCE, SINKHORN_PROGRAMS)
    torch.testing.assert_close(plan.double(), exact, rtol=2e-3, atol=1e-9)  # the tolerance of the iteration
    assert torch.equal(plan, sinkhorn_plan(logits, MAX_ITERATIONS, TOLERANCE, SINKHORN_PROGRAMS))
    # Without a tolerance: the same number of iterations exactly.
    cost = torch.exp(logits.double() - logits.double().amax(1, keepdim=True)) if num_tokens else logits.double()
    columns = cost.new_ones(num_experts)
    for iterations in (1, 2, 3):
        rows = 1 / (num_tokens * (cost @ columns + 1e-8))
        columns = 1 / (num_experts * (rows @ cost + 1e-8))
        plan = sinkhorn_plan(logits, iterations, 0.0, SINKHORN_PROGRAMS)
        torch.testing.assert_close(plan.double(), columns * cost * rows.unsqueeze(1), rtol=1e-5, atol=1e-12)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter, about the infinity that it is given
def test_sinkhorn_bears_large_and_non_finite_logits() -> None:
    from runtime.kernels.sinkhorn import sinkhorn_plan

    for size in (90.0, 1e4, 1e30):
        plan = sinkhorn_plan(torch.randn(200, 16, device=DEVICE) * size, 32, TOLERANCE, SINKHORN_PROGRAMS)
        assert bool(torch.isfinite(plan).all())
    logits = torch.randn(20, 4, device=DEVICE)
    logits[3, 2] = float("nan")
    assert bool(sinkhorn_plan(logits, MAX_ITERATIONS, TOLERANCE, SINKHORN_PROGRAMS).isnan().any())  # and it ends


@pytest.mark.parametrize(("shape", "width"), [((3, 2), 33), ((7,), 2500), ((0, 2), 8)])
def test_swiglu_of_every_token(shape: tuple[int, ...], width: int) -> None:
    leaf = torch.randn(*shape, 2 * width, device=DEVICE, requires_grad=True)
    exact = leaf.detach().double().requires_grad_()
    grad = torch.randn(*shape, width, device=DEVICE)
    out, expected = swiglu(leaf, fused=True), swiglu(exact, fused=False)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
    out.backward(grad)
    expected.backward(grad.double())
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("num_tokens", "topk", "num_experts", "alignment", "hidden", "width"), SIZES)
def test_clamped_gate(num_tokens: int, topk: int, num_experts: int, alignment: int, hidden: int, width: int) -> None:
    from runtime.kernels.clamped_gate import clamped_gate_backward, clamped_gate_forward

    _, plan = plans(num_tokens, topk, num_experts, alignment)
    end = int(plan.offsets_E[-1])
    hidden_pre = 3 * torch.randn(plan.num_rows, 2 * width, device=DEVICE)
    bias = torch.randn(num_experts, 2 * width, device=DEVICE)
    weights = torch.rand(num_tokens, topk, device=DEVICE)
    grad = torch.randn(plan.num_rows, width, device=DEVICE)
    gate = Gate(alpha=1.702, limit=2.5)  # which many values are beyond
    args = Activation(bias.double(), experts_of_rows(plan), plan, gate, False)
    beside = (plan.slot_of_row_R, plan.offsets_E, gate.alpha, gate.limit)
    out = clamped_gate_forward(hidden_pre, bias, args.expert_R, weights, *beside)
    expected = activate(hidden_pre.double(), weights.double(), args)
    torch.testing.assert_close(out[:end].double(), expected[:end], rtol=1e-5, atol=1e-5)
    exact = activate_backward(hidden_pre.double(), weights.double(), grad.double(), args)
    version = hidden_pre._version
    actual = clamped_gate_backward(
        hidden_pre, bias, args.expert_R, weights, grad, *beside, alignment=alignment, sum_bias=True
    )
    for mine, other, rows in zip(actual[:3], exact[:3], (end, None, end), strict=True):
        torch.testing.assert_close(mine[:rows].double(), other[:rows], rtol=1e-5, atol=3e-5)
    assert (actual[3] is None) == (alignment % 32 != 0)
    if actual[3] is not None:
        sums = torch.zeros_like(args.bias_E2F).index_add(0, args.expert_R[:end].long(), exact.hidden_R2F[:end])
        torch.testing.assert_close(actual[3].double(), sums, rtol=1e-5, atol=1e-4)
    if plan.num_rows:
        assert hidden_pre._version > version  # a second backward pass through it is an error


KINDS = [
    ("nt", "store"),
    ("nt", "swiglu"),
    ("nn", "store"),
    ("tn", "store"),
    ("tn", "add"),
    ("tn", "store_fp32"),
    ("tn", "add_bf16"),
]


@pytest.mark.parametrize("edges", [False, True])
@pytest.mark.parametrize(
    ("block_n", "kind", "epilogue"), [(size, *kind) for size in (128, 256) for kind in KINDS] + [(192, "nt", "store")]
)
def test_grouped_products_compile_for_hopper(block_n: int, kind: str, epilogue: str, edges: bool) -> None:
    pytest.importorskip("cuda.bindings")
    from runtime.kernels import grouped_matmul
    from runtime.kernels.cuda_module import compile_cubin

    cubin = compile_cubin(grouped_matmul.source(block_n, kind, epilogue, edges), "sm_90a")
    assert cubin.startswith(b"\x7fELF")
    assert b"grouped_matmul" in cubin
    assert grouped_matmul.shared_bytes(block_n) <= 227 * 1024  # of a block on compute capability 9.0


@pytest.mark.parametrize(
    ("columns", "nt", "others"),
    [
        (2048, 256, 256),
        (2880, 192, 256),  # 15 tiles, or 11 and a quarter
        (1408, 256, 256),  # 9 % for nothing, where narrow tiles take a quarter longer
        (320, 192, 128),
        (384, 192, 128),
        (128, 128, 128),
    ],
)
def test_tiles_are_as_wide_as_is_fastest(columns: int, nt: int, others: int) -> None:
    pytest.importorskip("cuda.bindings")
    from runtime.kernels.grouped_matmul import tile_columns

    assert tile_columns("nt", columns, None, in_bytes=False) == nt
    for kind, in_bytes in (("nn", False), ("tn", False), ("nt", True), ("tn", True)):
        assert tile_columns(kind, columns, None, in_bytes=in_bytes) == others


@pytest.mark.parametrize(("kind", "epilogue"), [("nt", "store"), ("nt", "swiglu"), ("nn", "store")])
def test_grouped_products_with_a_thin_one_compile_for_hopper(kind: str, epilogue: str) -> None:
    pytest.importorskip("cuda.bindings")
    from runtime.kernels import grouped_matmul
    from runtime.kernels.cuda_module import compile_cubin

    assert compile_cubin(grouped_matmul.source(256, kind, epilogue, edges=True, thin=True), "sm_90a").startswith(
        b"\x7fELF"
    )


@pytest.mark.parametrize("block_n", [128, 256])
@pytest.mark.parametrize(
    ("kind", "epilogue", "blocks"), [("nt", "store", True), ("tn", "add", True), ("tn", "store", False)]
)
def test_grouped_products_of_8_bits_compile_for_hopper(kind: str, epilogue: str, blocks: bool, block_n: int) -> None:
    pytest.importorskip("cuda.bindings")
    from runtime.kernels import grouped_matmul
    from runtime.kernels.cuda_module import compile_cubin

    text = grouped_matmul.source(block_n, kind, epilogue, True, ("e5m2", "e4m3"), split=True, blocks=blocks)
    assert compile_cubin(text, "sm_90a").startswith(b"\x7fELF")


def test_a_kernel_that_does_not_compile_says_why() -> None:
    pytest.importorskip("cuda.bindings")
    from runtime.kernels.cuda_module import compile_cubin

    with pytest.raises(RuntimeError, match=r"(?s)does not compile for sm_90a.*undeclared_name"):
        compile_cubin('extern "C" __global__ void kernel() { undeclared_name(); }', "sm_90a")


def test_adamw_compiles_for_hopper_in_every_pairing_of_types() -> None:
    """The interpreter, in which its other tests run, doesn't mind what the compiler refuses."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.runtime.kernels.adamw_for_hopper"]
    lines = subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout.splitlines()
    assert len(set(lines)) == 8
