"""Time each fused step of a training step beside plain torch and its floor: `python -m benchmarks.fused_steps`.

Needs a GPU. Sizes are those of a layer of Mixtral 8x7B (or, with --model qwen3, Qwen3-30B-A3B) over a micro-batch of 8192
tokens. The floor is the fewest bytes at the bandwidth of a large copy of the same run, or the operations at the rate of
a large product.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from runtime.kernels import adamw
from runtime.ops.attention import attend
from runtime.ops.cross_entropy import cross_entropy
from runtime.ops.embedding import add_gradient
from runtime.ops.linear import add_product
from runtime.ops.norm import add_rms_norm, rms_norm
from runtime.ops.rotary import rotary, rotate
from runtime.ops.swiglu import swiglu
from runtime.parallel.masters import split

BF16 = torch.bfloat16
POSITIONS, SEQUENCES = 4096, 2


@dataclass(frozen=True)
class Sizes:
    """Of a model."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int


MODELS = {"mixtral": Sizes(4096, 32, 8, 128, 32000), "qwen3": Sizes(2048, 32, 4, 128, 151936)}


@dataclass
class Case:
    """One row of the table."""

    name: str
    num_bytes: float
    flops: float
    fused: Callable[[], object]
    plain: Callable[[], object] | None = None


def randn(*shape: int, dtype: torch.dtype = BF16, grad: bool = False) -> Tensor:
    """Random numbers on the GPU."""
    return torch.randn(*shape, device="cuda").to(dtype).requires_grad_(grad)


def forward_backward(function: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> Callable[[], object]:
    """A function and its gradients, over gradients of the outputs that are made once."""
    grads = [torch.randn_like(out) for out in function(*inputs)]

    def run() -> object:
        return torch.autograd.grad(function(*inputs), [x for x in inputs if x.requires_grad], grads)

    return run


def norm_cases(sizes: Sizes) -> list[Case]:
    """Norm of the residual and a branch; norm of query heads."""
    x, delta = (randn(POSITIONS, SEQUENCES, sizes.hidden, grad=True) for _ in range(2))
    weight = randn(sizes.hidden, grad=True)

    def plain(x: Tensor, delta: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        total = x + delta
        return F.rms_norm(total, weight.shape, weight, 1e-5), total

    fused = forward_backward(lambda *args: add_rms_norm(*args, 1e-5), x, delta, weight)
    row = 2.0 * x.numel()
    cases = [Case("norm + residual", 8 * row, 0, fused, forward_backward(plain, x, delta, weight))]
    q, head_weight = (
        randn(POSITIONS, SEQUENCES, sizes.heads, sizes.head_dim, grad=True),
        randn(sizes.head_dim, grad=True),
    )
    cases.append(
        Case(
            "norm of query heads",
            5 * 2.0 * q.numel(),
            0,
            forward_backward(lambda x, w: (rms_norm(x, w, 1e-5),), q, head_weight),
            forward_backward(lambda x, w: (F.rms_norm(x, w.shape, w, 1e-5),), q, head_weight),
        )
    )
    return cases


def gated_cases(sizes: Sizes) -> list[Case]:
    """SwiGLU of a dense layer with the width of Llama 3.1 8B's."""
    hidden = randn(POSITIONS, SEQUENCES, 2 * 14336, grad=True)
    fused, plain = (
        forward_backward(lambda x, fused=fused: (swiglu(x, fused=fused),), hidden) for fused in (True, False)
    )
    return [Case("SwiGLU of a dense layer", 8.0 * hidden.numel(), 0, fused, plain)]


def attention_cases(sizes: Sizes) -> list[Case]:
    """Rotary positions, and attention with and without a window."""
    q = randn(POSITIONS, SEQUENCES, sizes.heads, sizes.head_dim, grad=True)
    k, v = (randn(POSITIONS, SEQUENCES, sizes.kv_heads, sizes.head_dim, grad=True) for _ in range(2))
    angles = torch.outer(torch.arange(POSITIONS), 1e4 ** -(torch.arange(sizes.head_dim // 2) / 64.0)).repeat(1, 2)
    cos, sin = angles.cos().cuda().to(BF16), angles.sin().cuda().to(BF16)
    num_bytes = 4 * 2.0 * (q.numel() + k.numel())
    fused = forward_backward(lambda q, k: rotary(q, k, cos, sin), q, k)
    plain = forward_backward(lambda q, k: (rotate(q, cos, sin), rotate(k, cos, sin)), q, k)
    cases = [Case("rotary, q and k", num_bytes, 0, fused, plain)]
    flops = 7.0 * SEQUENCES * sizes.heads * POSITIONS**2 * sizes.head_dim  # causal: half of 14

    def sdpa(backend: str) -> Callable[..., tuple[Tensor, ...]]:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
            with sdpa_kernel(getattr(SDPBackend, backend)):
                args = (x.permute(1, 2, 0, 3) for x in (q, k, v))
                return (F.scaled_dot_product_attention(*args, is_causal=True, enable_gqa=True),)

        return run

    whole = forward_backward(lambda *args: (attend(*args, None),), q, k, v)
    cases.append(Case("attention", 0, flops, whole, forward_backward(sdpa("FLASH_ATTENTION"), q, k, v)))
    window = 1024
    seen = 1 - (1 - window / POSITIONS) ** 2
    windowed = forward_backward(lambda *args: (attend(*args, window),), q, k, v)
    cases.append(Case(f"attention, window {window}", 0, flops * seen, windowed, None))
    return cases


def vocabulary_cases(sizes: Sizes) -> list[Case]:
    """Cross entropy, forward and backward; the embedding's gradient."""
    tokens = POSITIONS * SEQUENCES
    logits, labels = randn(POSITIONS, SEQUENCES, sizes.vocab), torch.randint(sizes.vocab, (POSITIONS, SEQUENCES)).cuda()

    def run(fused: bool) -> Callable[[], object]:
        def step() -> object:
            leaf = logits.detach().requires_grad_()
            loss = cross_entropy(leaf, labels, 0, None, fused=fused).sum()
            return torch.autograd.grad(loss, leaf)

        return step

    cases = [Case("cross entropy", 3 * 2.0 * tokens * sizes.vocab, 0, run(True), run(False))]
    grad, total = randn(tokens, sizes.hidden), torch.zeros(sizes.vocab, sizes.hidden, device="cuda")
    ids = labels.flatten()

    def plain() -> None:
        total.add_(torch.ops.aten.embedding_dense_backward(grad, ids, sizes.vocab, -1, False))

    num_bytes = tokens * sizes.hidden * (2.0 + 8.0)
    cases.append(Case("embedding gradient", num_bytes, 0, lambda: add_gradient(grad, ids, total), plain))
    return cases


def product_cases(sizes: Sizes) -> list[Case]:
    """Weight gradients of dense products, added to fp32 sums."""
    cases = []
    tokens, width = POSITIONS * SEQUENCES, sizes.heads * sizes.head_dim
    for name, rows in (
        ("queries", width),
        ("keys, values", 2 * sizes.kv_heads * sizes.head_dim),
        ("head", sizes.vocab),
    ):
        left, right = randn(tokens, rows), randn(tokens, sizes.hidden)
        total = torch.zeros(rows, sizes.hidden, device="cuda")
        flops = 2.0 * tokens * rows * sizes.hidden

        def fused(left: Tensor = left, right: Tensor = right, total: Tensor = total) -> None:
            add_product(total, left, right, fresh=False)

        def plain(left: Tensor = left, right: Tensor = right, total: Tensor = total) -> None:
            total.add_(left.t() @ right)

        cases.append(Case(f"weight gradient, {name}", 8.0 * total.numel(), flops, fused, plain))
    return cases


def optimizer_cases(size: int = 2**28) -> list[Case]:
    """AdamW with masters in fp32 and as remainders, moments in fp32 and bf16, beside torch's fused one and the copy to bf16; the
    gradient's norm."""
    grad, master = torch.randn(size, device="cuda"), torch.randn(size, device="cuda")
    weight, remainder = split(master)
    divisor, skip = torch.ones((), device="cuda"), torch.zeros((), dtype=torch.bool, device="cuda")
    options = {"lr": 1e-4, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
    cases = []
    for dtype in (torch.float32, BF16):
        m, v = (torch.zeros(size, device="cuda", dtype=dtype) for _ in range(2))

        def fused(m: Tensor = m, v: Tensor = v) -> None:
            adamw.adamw_step(grad, master, m, v, weight, divisor, skip, num_steps=9, **options)

        plain = None
        if dtype == torch.float32:
            parameter = torch.nn.Parameter(master)
            parameter.grad = grad
            torchs = torch.optim.AdamW([parameter], fused=True, capturable=True)

            def plain(torchs: torch.optim.AdamW = torchs) -> None:
                torchs.step()
                weight.copy_(master)

        name = str(dtype).removeprefix("torch.")
        moment_bytes = 2 * 2 * m.element_size()
        cases.append(Case(f"AdamW, moments in {name}", (14.0 + moment_bytes) * size, 0, fused, plain))

        def halves(m: Tensor = m, v: Tensor = v) -> None:
            adamw.adamw_step(grad, remainder, m, v, weight, divisor, skip, num_steps=9, **options)

        cases.append(Case(f"AdamW with remainders, moments in {name}", (12.0 + moment_bytes) * size, 0, halves, None))
    cases.append(
        Case("gradient norm", 4.0 * size, 0, lambda: adamw.square_sum(grad), lambda: torch._foreach_norm([grad]))
    )
    return cases


def ceilings() -> tuple[float, float]:
    """Measure what floors are counted by, and say so: bytes a second of a large copy, operations of a large product."""
    from triton.testing import do_bench

    source, target = (torch.empty(2**30, dtype=torch.uint8, device="cuda") for _ in range(2))
    bandwidth = 2 * 2**30 / do_bench(lambda: target.copy_(source), return_mode="median") * 1e3
    square = randn(8192, 8192)
    rate = 2 * 8192**3 / do_bench(lambda: square @ square, return_mode="median") * 1e3
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}")
    print(f"copy {bandwidth / 1e12:.2f} TB/s, dense product {rate / 1e12:.0f} TFLOP/s; times in ms")
    return bandwidth, rate


def main() -> None:
    """Parse the options and print the table."""
    from triton.testing import do_bench_cudagraph

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="mixtral", choices=MODELS)
    sizes = MODELS[parser.parse_args().model]
    bandwidth, rate = ceilings()
    print("| step | floor | fused | of the floor | plain torch |\n| --- | --- | --- | --- | --- |")
    for make in (
        norm_cases,
        gated_cases,
        attention_cases,
        vocabulary_cases,
        product_cases,
        lambda _: optimizer_cases(),
    ):
        for case in make(sizes):
            floor = max(case.num_bytes / bandwidth, case.flops / rate) * 1e3
            # Replayed from a graph: what the host needs to launch a step doesn't count, it is ahead of the device.
            fused = do_bench_cudagraph(case.fused, return_mode="median")
            plain = f"{do_bench_cudagraph(case.plain, return_mode='median'):.3f}" if case.plain is not None else ""
            print(f"| {case.name} | {floor:.3f} | {fused:.3f} | {floor / fused:.2f} | {plain} |", flush=True)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
