"""The layer's GPU path against fp64 and against itself; needs a GPU, the grouped products a Hopper one."""

import importlib.util

import pytest
import torch

from moeconv.families.compute import Gate
from runtime.fp8.config import Fp8Config
from runtime.fp8.scaling import Scaling
from runtime.kernels.sharing import shared_device
from runtime.moe.clamped_mlp import clamped_mlp
from runtime.moe.grouped_gemm import GatedGemm, GroupedGemm, LoopGemm, make_gemm, resolve_backend
from runtime.moe.grouped_mlp import grouped_mlp
from runtime.moe.layer import MoELayer
from runtime.moe.passes import swiglu
from runtime.moe.permutation import plan_rows
from runtime.moe.router_linear import router_linear
from runtime.moe.sinkhorn import sinkhorn
from runtime.moe.thin import Thin
from tests.runtime.moe.oracle import relative
from tests.support.moe import moe_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    # Of the first product in autograd's thread; torch then makes the context itself.
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS"),
]
BF16 = torch.bfloat16
BACKENDS = ["torch"]
if torch.cuda.is_available() and resolve_backend(moe_config(num_experts=2), torch.device("cuda"), BF16) == "hopper":
    BACKENDS.append("hopper")

# tokens, hidden, width, experts, topk: multiples of the tile and not, odd numbers of tiles, many tiles a multiprocessor
# with few steps each, many experts, one token, all tokens dropped, skew
SHAPES = [
    (500, 256, 256, 4, 2),
    (3000, 512, 384, 8, 2),
    (1000, 1536, 512, 64, 4),
    (777, 2048, 768, 16, 8),
    (1, 256, 128, 8, 2),
    (300, 200, 96, 4, 2),
    (130, 128, 128, 4, 4),
    (9000, 256, 640, 8, 2),
    (1500, 128, 128, 600, 2),
    # multiples of 64 alone: tiles that reach beyond a matrix
    (700, 320, 192, 5, 2),
    (900, 960, 448, 4, 2),
    (600, 2880, 2880, 3, 2),
]


def random_case(shape: tuple[int, ...], *, dropped: float = 0.0, skew: float = 0.0) -> list[torch.Tensor]:
    num_tokens, hidden, width, num_experts, topk = shape
    scores = torch.randn(num_tokens, num_experts, device="cuda") - skew * torch.arange(num_experts, device="cuda")
    experts = scores.topk(topk, -1).indices
    experts = experts.masked_fill(torch.rand(num_tokens, topk, device="cuda") < dropped, num_experts)
    return [
        experts,
        torch.randn(num_tokens, hidden, device="cuda").to(BF16),
        torch.rand(num_tokens, topk, device="cuda") * (experts < num_experts),
        (torch.randn(num_experts, 2 * width, hidden, device="cuda") / hidden**0.5).to(BF16),
        (torch.randn(num_experts, hidden, width, device="cuda") / width**0.5).to(BF16),
        torch.randn(num_tokens, hidden, device="cuda").to(BF16),
    ]


def poison() -> None:
    """Leave NaN in the memory that the allocator hands out next."""
    blocks = [
        torch.full((size,), float("nan"), device="cuda") for size in (2**26, 2**24, 2**22, 2**20) for _ in range(3)
    ]
    del blocks


def run(case: list[torch.Tensor], backend: str, dtype: torch.dtype, fused: bool = True) -> list[torch.Tensor]:
    experts, x, weights, w13, w2, grad = case
    num_experts = w13.shape[0]
    gemm = LoopGemm() if backend == "loop" else make_gemm(backend)
    leaves = [t.to(dtype).clone().requires_grad_() for t in (x, w13, w2)]
    scale = (weights.double() if dtype == torch.float64 else weights).clone().requires_grad_()
    plan = plan_rows(experts, num_experts, experts.numel(), alignment=gemm.row_alignment, fused=fused)
    out = grouped_mlp(leaves[0], scale, leaves[1], leaves[2], plan, gemm, fused=fused)
    out.backward(grad.to(dtype))
    return [out.detach(), leaves[0].grad, scale.grad, leaves[1].grad, leaves[2].grad]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dropped", "skew"), [(0.0, 0.0), (0.2, 0.7), (1.0, 0.0)])
@pytest.mark.parametrize("shape", SHAPES)
def test_experts_against_fp64(backend: str, shape: tuple[int, ...], dropped: float, skew: float) -> None:
    case = random_case(shape, dropped=dropped, skew=skew)
    expected = run(case, "loop", torch.float64, fused=False)
    poison()
    out, grad_x, grad_weights, grad_w13, grad_w2 = zip(run(case, backend, BF16), expected, strict=True)
    single = shape[0] == 1
    bound = 1.2e-2 if single else 6e-3  # roundings of a single token don't average out
    for mine, other in (out, grad_x, grad_w13, grad_w2):
        assert relative(mine, other) < bound
    # A single token's routing gradients are products of two vectors that may cancel: they are held against a typical one.
    mine, other = grad_weights
    typical = 0.3 * (shape[1] * int((case[0] < shape[3]).sum())) ** 0.5 if single else 0.0
    assert float((mine.double() - other).norm()) <= bound * max(float(other.norm()), typical)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dropped", [0.0, 0.2])
@pytest.mark.parametrize("shape", [(500, 256, 256, 4, 2), (700, 320, 192, 5, 2), (600, 2880, 2880, 3, 2)])
def test_clamped_experts_against_fp64(backend: str, shape: tuple[int, ...], dropped: float) -> None:
    experts, x, weights, w13, w2, grad = random_case(shape, dropped=dropped)
    num_experts = w13.shape[0]
    biases = [
        torch.randn(num_experts, w13.shape[1], device="cuda"),
        torch.randn(num_experts, w2.shape[1], device="cuda"),
    ]
    given = [x, weights, w13.transpose(1, 2).contiguous(), w2.transpose(1, 2).contiguous(), *biases]

    def run_clamped(gemm: GroupedGemm, dtype: torch.dtype, fused: bool) -> list[torch.Tensor]:
        wide = dtype == torch.float64
        leaves = [t.to(BF16).to(dtype).requires_grad_() for t in given]
        leaves[1] = weights.to(dtype if wide else torch.float32).clone().requires_grad_()
        plan = plan_rows(experts, num_experts, experts.numel(), alignment=gemm.row_alignment, fused=fused)
        gate = Gate(alpha=1.702, limit=2.0)
        out = clamped_mlp(leaves[0], leaves[1], leaves[2:4], leaves[4:], plan, gate, gemm, fused=fused)
        out.backward(grad.to(dtype))
        return [out.detach(), *(leaf.grad for leaf in leaves)]

    exact = run_clamped(LoopGemm(), torch.float64, False)
    poison()
    for place, (mine, other) in enumerate(zip(run_clamped(make_gemm(backend), BF16, True), exact, strict=True)):
        assert relative(mine, other) < 3e-2, f"tensor {place}"  # rounding moves some across the gate's bounds


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("depth", [8, 16, 72, 128])
@pytest.mark.parametrize("shape", SHAPES)
def test_thin_products_beside_others(backend: str, depth: int, shape: tuple[int, ...]) -> None:
    """Such as low-rank adapters' of each expert; rows that belong to no expert may hold anything."""
    experts, _, weights, w13, w2, _ = random_case(shape, dropped=0.2, skew=0.5)
    _, hidden, width, num_experts, _ = shape
    gemm, exact = make_gemm(backend), LoopGemm()
    plan = plan_rows(experts, num_experts, experts.numel(), alignment=gemm.row_alignment)
    end, padding = int(plan.offsets_E[-1]), (plan.slot_of_row_R < 0).unsqueeze(1)

    def rows(size: int) -> torch.Tensor:
        out = torch.randn(plan.num_rows, size, device="cuda").to(BF16).masked_fill(padding, 0)
        out[end:] = float("nan")
        return out

    def matrices(*sizes: int) -> torch.Tensor:
        return (torch.randn(num_experts, *sizes, device="cuda") / depth**0.5).to(BF16)

    def compare(found: torch.Tensor, want: torch.Tensor) -> None:
        assert relative(found[:end], want[:end]) < 6e-3 if end else True

    wide, thin = rows(hidden), Thin(rows(depth), matrices(2 * width, depth))
    want = exact.rows_times_transposed_and(wide.double(), w13.double(), Thin(*(t.double() for t in thin)), plan)
    poison()
    compare(gemm.rows_times_transposed_and(wide, w13, thin, plan), want)
    if isinstance(gemm, GatedGemm):
        found, act = gemm.hidden_and_swiglu(wide, w13, weights, plan, thin)
        compare(found, want)
        compare(act, swiglu(want.nan_to_num(), weights.double(), plan, fused=False))
    thin = Thin(rows(depth), matrices(depth, width))
    want = exact.rows_times_and(wide.double(), w2.double(), Thin(*(t.double() for t in thin)), plan)
    compare(gemm.rows_times_and(wide, w2, thin, plan), want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("skew", [0.0, 3.0])  # with 3.0 some experts have no rows
@pytest.mark.parametrize("shape", SHAPES)
def test_weight_gradients_added_to_a_sum(backend: str, shape: tuple[int, ...], skew: float) -> None:
    _, rows_of, columns, num_experts, _ = shape
    experts = random_case(shape, dropped=0.2, skew=skew)[0]
    gemm = make_gemm(backend)
    plan = plan_rows(experts, num_experts, experts.numel(), alignment=gemm.row_alignment)
    left, right = (torch.randn(plan.num_rows, size, device="cuda").to(BF16) for size in (rows_of, columns))
    padding = plan.slot_of_row_R < 0
    for rows in (left, right):
        rows[padding] = 0
        rows[int(plan.offsets_E[-1]) :] = float("nan")  # belongs to no expert
    before = torch.randn(num_experts, rows_of, columns, device="cuda")
    sums = [before.clone() for _ in range(2)]
    for total in sums:
        gemm.add_transposed_times_rows(left, right, plan, total, fresh=False)
    assert torch.equal(*sums)
    expected = before.double()
    LoopGemm().add_transposed_times_rows(left.double(), right.double(), plan, expected, fresh=False)
    # The kernel rounds nothing to bf16; what backend torch adds has been rounded.
    bound = 1e-5 if backend == "hopper" and rows_of % 128 == 0 else 6e-3
    assert relative(sums[0], expected) < bound
    overwritten = torch.full_like(before, float("nan"))
    gemm.add_transposed_times_rows(left, right, plan, overwritten, fresh=True)
    assert relative(overwritten, expected - before.double()) < bound
    low = [before.to(BF16) for _ in range(2)]
    for total in low:
        gemm.add_transposed_times_rows(left, right, plan, total, fresh=False)
    assert torch.equal(*low)
    product = gemm.transposed_times_rows(left, right, plan)
    torch.testing.assert_close(low[0], before.to(BF16) + product, rtol=0, atol=0)  # rounded, added, and rounded
    written = torch.full_like(low[0], float("nan"))
    gemm.add_transposed_times_rows(left, right, plan, written, fresh=True)
    assert torch.equal(written, product)


@pytest.mark.skipif("hopper" not in BACKENDS, reason="needs a Hopper GPU")
@pytest.mark.parametrize("skew", [0.0, 3.0])
@pytest.mark.parametrize("shape", [*SHAPES, (8192, 4096, 4096, 4, 2)])
def test_jobs_that_are_dealt_out_late_give_the_same_bits(shape: tuple[int, ...], skew: float) -> None:
    """Beside transfers, the last jobs of a product go to whichever multiprocessors are free."""
    case = random_case(shape, dropped=0.2, skew=skew)
    for waves in (1, 3, 1000):  # up to a quarter of the jobs
        expected = run(case, "hopper", BF16)
        poison()
        with shared_device(waves):
            found = run(case, "hopper", BF16)
        for mine, other in zip(found, expected, strict=True):
            assert torch.equal(mine, other)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_pass_through_a_kept_graph(backend: str) -> None:
    """As the zero-bubble schedule does it; the kernel writes over what it needs where no second pass can come."""
    experts, x, weights, w13, w2, grad = random_case((500, 256, 256, 4, 2))
    gemm = make_gemm(backend)
    leaves = [t.requires_grad_() for t in (x, weights, w13, w2)]
    plan = plan_rows(experts, 4, experts.numel(), alignment=gemm.row_alignment)
    out = grouped_mlp(x, weights, w13, w2, plan, gemm)
    whole = torch.autograd.grad(out, leaves, grad, retain_graph=True)
    of_inputs = torch.autograd.grad(out, leaves[:2], grad, retain_graph=True)
    of_weights = torch.autograd.grad(out, leaves[2:], grad)
    for mine, other in zip((*of_inputs, *of_weights), whole, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_run_gives_the_same_bits(backend: str) -> None:
    case = random_case((2000, 512, 256, 16, 4), skew=0.2)
    first = run(case, backend, BF16)
    for _ in range(5):
        poison()
        for mine, other in zip(run(case, backend, BF16), first, strict=True):
            assert torch.equal(mine, other)


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_than_two_to_the_31_elements(backend: str) -> None:
    """Row offsets past the range of int32: the last rows are right, not only the first."""
    num_tokens, hidden, width, num_experts = 600_000, 4096, 128, 4
    x = torch.randn(num_tokens, hidden, device="cuda", dtype=BF16)
    experts = torch.randint(num_experts, (num_tokens, 1), device="cuda")
    w13 = (torch.randn(num_experts, 2 * width, hidden, device="cuda") / hidden**0.5).to(BF16)
    w2 = (torch.randn(num_experts, hidden, width, device="cuda") / width**0.5).to(BF16)
    weights = torch.rand(num_tokens, 1, device="cuda")
    gemm = make_gemm(backend)
    plan = plan_rows(experts, num_experts, num_tokens, alignment=gemm.row_alignment)
    with torch.no_grad():
        out = grouped_mlp(x, weights, w13, w2, plan, gemm)
    for rows in (slice(0, 64), slice(num_tokens - 64, num_tokens)):
        for token in range(rows.start, rows.stop, 7):
            expert = int(experts[token, 0])
            gate, up = (w13[expert].double() @ x[token].double()).chunk(2)
            expected = w2[expert].double() @ (torch.nn.functional.silu(gate) * up) * weights[token, 0].double()
            assert relative(out[token], expected) < 1e-2


def test_router_projection_is_exact_to_fp32() -> None:
    x = torch.randn(1000, 512, device="cuda").to(BF16)
    for dtype in (BF16, torch.float32):
        weight = torch.randn(64, 512, device="cuda").to(dtype).requires_grad_()
        leaf = x.clone().requires_grad_()
        logits = router_linear(leaf, weight, torch.float32)
        exact = x.double() @ weight.double().t()
        assert relative(logits, exact) < 1e-6
        grad = torch.randn_like(logits)
        logits.backward(grad)
        assert relative(weight.grad, grad.double().t() @ x.double()) < (1e-6 if dtype == torch.float32 else 4e-3)
        assert relative(leaf.grad, grad.double() @ weight.double()) < 4e-3


@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
@pytest.mark.parametrize(("num_tokens", "num_experts"), [(16384, 8), (4097, 60), (30000, 128), (10, 600), (0, 8)])
def test_sinkhorn_without_a_wait(num_tokens: int, num_experts: int) -> None:
    logits = torch.randn(num_tokens, num_experts, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        plans = [sinkhorn(logits), sinkhorn(logits, fused=False), sinkhorn(logits)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(plans[0].cpu().double(), sinkhorn(logits.cpu().double()), rtol=2e-3, atol=1e-9)
    torch.testing.assert_close(plans[0], plans[1], rtol=2e-3, atol=1e-9)
    assert torch.equal(plans[0], plans[2])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options", [{}, {"capacity_factor": 0.8}, {"load_balancing": ("expert_choice",)}, {"load_balancing": ("sinkhorn",)}]
)
def test_layer_on_gpu_equals_layer_on_cpu(backend: str, options: dict) -> None:
    torch.manual_seed(0)
    options = {"num_experts": 8, "z_loss_coeff": 0.01, **options}
    if "load_balancing" not in options:
        options["aux_loss_coeff"] = (0.1,)
    gpu = MoELayer(
        moe_config(gemm_backend=backend, **options), hidden_size=256, ffn_hidden_size=128, dtype=BF16, device="cuda"
    )
    cpu = MoELayer(
        moe_config(gemm_backend="loop", **options), hidden_size=256, ffn_hidden_size=128, dtype=torch.float64
    )
    for mine, other in zip(cpu.parameters(), gpu.parameters(), strict=True):
        torch.nn.init.normal_(other, std=0.1)
        mine.data.copy_(other.data.cpu())
    x = torch.randn(300, 256).to(BF16)
    inputs = [x.cuda().requires_grad_(), x.double().requires_grad_()]
    for module, leaf in zip((gpu, cpu), inputs, strict=True):
        module(leaf).square().mean().backward()
    assert torch.equal(gpu.stats.load_E.cpu(), cpu.stats.load_E)
    assert relative(inputs[0].grad.cpu(), inputs[1].grad) < 2e-2
    for mine, other in zip(gpu.parameters(), cpu.parameters(), strict=True):
        assert relative(mine.grad.cpu(), other.grad) < 2e-2
    for name, value in cpu.stats.losses.items():
        assert float(gpu.stats.losses[name]) == pytest.approx(float(value), rel=1e-4)


@pytest.mark.parametrize(
    ("backend", "fp8", "bound"),
    [
        ("grouped_gemm", {}, 6e-3),
        ("te", {}, 8e-3),
        ("te", {"format": "hybrid", "recipe": "delayed"}, 0.15),
        ("te", {"format": "hybrid", "recipe": "tensorwise"}, 0.15),
        ("te", {"format": "e4m3", "recipe": "blockwise"}, 0.15),
    ],
)
def test_other_backends_against_fp64(backend: str, fp8: dict, bound: float) -> None:
    package = "transformer_engine" if backend == "te" else backend
    if importlib.util.find_spec(package) is None:  # to import it here would load another cuDNN than torch's
        pytest.skip(f"{package} isn't installed")
    torch.manual_seed(0)
    config = moe_config(num_experts=4, topk=2, load_balancing=("none",), gemm_backend=backend)
    scaling = Scaling(Fp8Config(**fp8), torch.device("cuda")) if fp8 else None
    layer = MoELayer(config, hidden_size=512, ffn_hidden_size=256, dtype=BF16, device="cuda", fp8=scaling)
    exact = MoELayer(
        moe_config(num_experts=4, topk=2, load_balancing=("none",), gemm_backend="loop"),
        hidden_size=512,
        ffn_hidden_size=256,
        dtype=torch.float64,
    )
    for mine, other in zip(exact.parameters(), layer.parameters(), strict=True):
        torch.nn.init.normal_(other, std=0.1)
        mine.data.copy_(other.data.cpu())
    x = torch.randn(600, 512).to(BF16)
    inputs = [x.cuda().requires_grad_(), x.double().requires_grad_()]
    grad = torch.randn(600, 512).to(BF16)
    outs = [layer(inputs[0]), exact(inputs[1])]
    outs[0].backward(grad.cuda())
    outs[1].backward(grad.double())
    assert relative(outs[0].cpu(), outs[1]) < bound
    assert relative(inputs[0].grad.cpu(), inputs[1].grad) < bound
    for mine, other in zip(layer.experts.parameters(), exact.experts.parameters(), strict=True):
        assert relative(mine.grad.cpu(), other.grad) < bound
