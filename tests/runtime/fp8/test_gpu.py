"""FP8's kernels on a Hopper GPU against what their 8-bit operands stand for, in fp64, and against the plain path."""

import importlib.util

import pytest
import torch

from runtime.fp8 import blocks
from runtime.fp8.config import Fp8Config
from runtime.fp8.linear import Fp8Linears
from runtime.fp8.operands import Operand
from runtime.fp8.products import rows_times_transposed, weight_gradients
from runtime.fp8.scaling import Scaling
from runtime.kernels.transformer_engine import import_transformer_engine
from runtime.moe.fp8_block_experts import BlockExperts
from runtime.moe.fp8_experts import Fp8Experts
from runtime.moe.permutation import plan_rows
from tests.runtime.moe.oracle import relative

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")]
BF16, E4M3, E5M2 = torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2
# tiles alone and in pairs, odd numbers of columns of tiles, an expert without rows, widths of 128 and 256
GROUPS = [([128], 128, 128), ([256, 0, 640], 384, 256), ([128, 384, 128, 1024], 512, 640), ([0, 0], 256, 256)]


def draw(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return (torch.randn(*shape, device="cuda") * 30).to(dtype)


def exact(bits: torch.Tensor, bound: torch.Tensor) -> torch.Tensor:
    return bits.double() * bound.double() / torch.finfo(bits.dtype).max


def draw_blocks(*shape: int, dtype: torch.dtype) -> Operand:
    """Rows [R, K], or matrices [G, N, K], whose blocks have very different scales."""
    blocks = (shape[1] // 128, shape[0]) if len(shape) == 2 else (shape[0], shape[1] // 128, shape[2] // 128)
    return Operand(draw(*shape, dtype=dtype), 2.0 ** torch.randint(-9, 9, blocks, device="cuda"))


def ends_of(sizes: list[int]) -> torch.Tensor:
    return torch.tensor(sizes, device="cuda").cumsum(0).int()


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("left_dtype", [E4M3, E5M2])
@pytest.mark.parametrize(("sizes", "num_n", "depth"), GROUPS)
def test_rows_times_transposed(sizes: list[int], num_n: int, depth: int, left_dtype: torch.dtype, split: bool) -> None:
    from runtime.kernels.grouped_matmul import Bounds, launch

    total = sum(sizes) + 128
    rows, matrices = draw(total, depth, dtype=left_dtype), draw(len(sizes), num_n, depth, dtype=E4M3)
    left, right = torch.rand(1, device="cuda") + 1, torch.rand(len(sizes), device="cuda") + 1
    out = torch.full((total, num_n), float("nan"), device="cuda", dtype=BF16)
    bounds = Bounds(left, right, split)
    launch("nt", rows, matrices.view(-1, depth), out, ends_of(sizes), bounds=bounds)
    start = 0
    for expert, size in enumerate(sizes):
        part = slice(start, start + size)
        expected = exact(rows[part], left) @ exact(matrices[expert], right[expert]).t()
        if size:
            assert relative(out[part], expected) < 4e-3
        start += size
    assert out[start:].isnan().all()


@pytest.mark.parametrize("out_dtype", [torch.float32, BF16])
@pytest.mark.parametrize("left_dtype", [E4M3, E5M2])
@pytest.mark.parametrize(("sizes", "num_n", "num_k"), GROUPS)
def test_weight_gradients(
    sizes: list[int], num_n: int, num_k: int, left_dtype: torch.dtype, out_dtype: torch.dtype
) -> None:
    from runtime.kernels.grouped_matmul import Bounds, launch

    total = sum(sizes) + 128
    left, right = draw(num_n, total, dtype=left_dtype), draw(num_k, total, dtype=E4M3)
    bounds = Bounds(torch.rand(1, device="cuda") + 1, torch.rand(1, device="cuda") + 1, True)
    before = torch.randn(len(sizes), num_n, num_k, device="cuda").to(out_dtype)
    start = 0
    expected = []
    for size in sizes:
        part = slice(start, start + size)
        expected.append(exact(left[:, part], bounds.left) @ exact(right[:, part], bounds.right).t())
        start += size
    for add in [False, True] if out_dtype == torch.float32 else [False]:
        out = before.clone()
        launch("tn", left, right, out.view(-1, num_k), ends_of(sizes), add=add, bounds=bounds)
        wanted = torch.stack(expected) + (before.double() if add else 0)
        assert relative(out + 1, wanted + 1) < (1e-4 if out_dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize("left_dtype", [E4M3, E5M2])
@pytest.mark.parametrize(("sizes", "num_n", "depth"), GROUPS)
def test_rows_in_blocks_times_transposed(sizes: list[int], num_n: int, depth: int, left_dtype: torch.dtype) -> None:
    total = sum(sizes) + 128
    rows, matrices = draw_blocks(total, depth, dtype=left_dtype), draw_blocks(len(sizes), num_n, depth, dtype=E4M3)
    out = rows_times_transposed(rows, matrices, ends_of(sizes), BF16, exact=True)
    start = 0
    for expert, size in enumerate(sizes):
        part = slice(start, start + size)
        expected = rows.in_fp32()[part].double() @ matrices.in_fp32()[expert].double().t()
        if size:
            assert relative(out[part], expected) < 4e-3
        start += size


@pytest.mark.parametrize("out_dtype", [torch.float32, BF16])
@pytest.mark.parametrize("left_dtype", [E4M3, E5M2])
@pytest.mark.parametrize(("sizes", "num_n", "num_k"), GROUPS)
def test_weight_gradients_of_blocks(
    sizes: list[int], num_n: int, num_k: int, left_dtype: torch.dtype, out_dtype: torch.dtype
) -> None:
    total = sum(sizes) + 128
    left, right = draw_blocks(num_n + 128, total, dtype=left_dtype), draw_blocks(num_k, total, dtype=E4M3)
    left = left.part(128, num_n + 128)  # as one of several maps has it
    before = torch.randn(len(sizes), num_n, num_k, device="cuda").to(out_dtype)
    start, expected = 0, []
    for size in sizes:
        part = slice(start, start + size)
        expected.append(left.in_fp32()[:, part].double() @ right.in_fp32()[:, part].double().t())
        start += size
    for add in [False, True] if out_dtype == torch.float32 else [False]:
        out = before.clone()
        weight_gradients(left, right, ends_of(sizes), out, add=add)
        wanted = torch.stack(expected) + (before.double() if add else 0)
        assert relative(out + 1, wanted + 1) < (2e-4 if out_dtype == torch.float32 else 4e-3)


def test_blocks_are_those_of_transformer_engine() -> None:
    """Numbers and scales, of rows, of columns and of weights."""
    if importlib.util.find_spec("transformer_engine") is None:
        pytest.skip("Transformer Engine isn't installed")
    import_transformer_engine()
    import transformer_engine_torch as tex
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer

    for dtype, kind in ((E4M3, tex.DType.kFloat8E4M3), (E5M2, tex.DType.kFloat8E5M2)):
        x = (torch.randn(384, 512, device="cuda") * torch.logspace(-3, 3, 512, device="cuda")).to(BF16)
        options = {"fp8_dtype": kind, "rowwise": True, "columnwise": True, "force_pow_2_scales": True}
        theirs = Float8BlockQuantizer(**options, amax_epsilon=0.0, block_scaling_dim=1)(x)
        ours = blocks.quantise([x], dtype, alignment=1)
        for mine, bits, scale in (
            (ours.rows, theirs._rowwise_data, theirs._rowwise_scale_inv),
            (ours.columns, theirs._columnwise_data, theirs._columnwise_scale_inv),
        ):
            assert mine is not None
            assert torch.equal(mine.bits.view(torch.uint8), bits)
            assert torch.equal(mine.scale, scale[:, : mine.scale.shape[1]])
    weights = Float8BlockQuantizer(
        **options | {"fp8_dtype": tex.DType.kFloat8E4M3}, amax_epsilon=0.0, block_scaling_dim=2
    )
    theirs, made = weights(x), blocks.empty_matrices(1, 384, 512, x.device)
    blocks.quantise_matrices([x.unsqueeze(0)], made)
    assert made.rows is not None
    assert torch.equal(made.rows.bits[0].view(torch.uint8), theirs._rowwise_data)
    assert torch.equal(made.rows.scale[0], theirs._rowwise_scale_inv[:3, :4])


@pytest.mark.parametrize("fp8_format", ["e4m3", "hybrid"])
@pytest.mark.parametrize("recipe", ["tensorwise", "delayed", "blockwise"])
@pytest.mark.parametrize(
    "shape", [(500, 256, 256, 4, 2), (777, 512, 384, 16, 8), (1, 128, 128, 8, 2), (300, 128, 256, 4, 2)]
)
def test_experts_like_the_plain_path(shape: tuple[int, ...], recipe: str, fp8_format: str) -> None:
    num_tokens, hidden, width, num_experts, topk = shape
    torch.manual_seed(0)
    experts = torch.randn(num_tokens, num_experts).topk(topk, -1).indices
    experts = experts.masked_fill(torch.rand(num_tokens, topk) < 0.1, num_experts)
    tensors = [
        torch.randn(num_tokens, hidden).to(BF16),
        torch.rand(num_tokens, topk),
        (torch.randn(num_experts, 2 * width, hidden) / hidden**0.5).to(BF16),
        (torch.randn(num_experts, hidden, width) / width**0.5).to(BF16),
    ]
    grad = torch.randn(num_tokens, hidden).to(BF16)
    found = []
    for device in ("cuda", "cpu"):
        bounds = Scaling(Fp8Config(format=fp8_format, recipe=recipe), torch.device(device))  # type: ignore[arg-type]
        layer = (BlockExperts if recipe == "blockwise" else Fp8Experts)(bounds, torch.device(device))
        plan = plan_rows(experts.to(device), num_experts, experts.numel(), alignment=layer.row_alignment, fused=True)
        for _ in range(2):  # the second time with delayed bounds
            bounds.begin(trains=True)
            leaves = [t.to(device, copy=True).requires_grad_() for t in tensors]
            out = layer(*leaves, plan)
            out.backward(grad.to(device))
        found.append([out.detach().cpu(), *(leaf.grad.cpu() for leaf in leaves)])  # type: ignore[union-attr]
    for mine, plain in zip(*found, strict=True):
        assert relative(mine, plain) < 3e-2


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed", "blockwise"])
@pytest.mark.parametrize(
    ("num_tokens", "hidden", "widths"), [(256, 128, (256, 128)), (77, 384, (128, 384)), (1000, 512, (512,))]
)
def test_linears_like_the_plain_path(num_tokens: int, hidden: int, widths: tuple[int, ...], recipe: str) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(num_tokens, 1, hidden).to(BF16), *(torch.randn(n, hidden).to(BF16) for n in widths)]
    tensors += [torch.randn(n).to(BF16) for n in widths]
    grads = [torch.randn(num_tokens, 1, n).to(BF16) for n in widths]
    found = []
    for device in ("cuda", "cpu"):
        bounds = Scaling(Fp8Config(format="hybrid", recipe=recipe), torch.device(device))  # type: ignore[arg-type]
        maps = Fp8Linears(bounds)
        for _ in range(2):
            bounds.begin(trains=True)
            leaves = [t.to(device, copy=True).requires_grad_() for t in tensors]
            outs = maps(leaves[0], leaves[1 : 1 + len(widths)], leaves[1 + len(widths) :])
            torch.autograd.backward(outs, [g.to(device) for g in grads])
        found.append([*(out.detach().cpu() for out in outs), *(leaf.grad.cpu() for leaf in leaves)])  # type: ignore[union-attr]
    for mine, plain in zip(*found, strict=True):
        assert relative(mine, plain) < 1e-2
