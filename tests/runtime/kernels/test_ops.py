"""The fused steps of a model against plain torch in fp64: fresh inputs, poisoned outputs, odd sizes.

On a GPU the kernels run compiled, without one in Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from runtime.ops.cross_entropy import cross_entropy
from runtime.ops.embedding import add_gradient, embedding
from runtime.ops.latent_heads import latent_heads
from runtime.ops.linear import add_product, linear, linears
from runtime.ops.norm import add_rms_norm, as_tokens, rms_norm
from runtime.ops.rotary import rotary, rotate, split_pairs
from runtime.ops.sinks import add_sinks, sinks_gradient
from tests.runtime.moe.oracle import relative

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.usefixtures("_poison")


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE)


def double(leaves: list[Tensor]) -> list[Tensor]:
    return [leaf.detach().double().requires_grad_() for leaf in leaves]


def compare(
    mine: Callable[..., tuple[Tensor, ...]],
    exact: Callable[..., tuple[Tensor, ...]],
    leaves: list[Tensor],
    bound: float,
) -> None:
    """Outputs and gradients of a function against another in fp64, over random gradients of the outputs."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    wide = double(leaves)
    got, want = mine(*leaves), exact(*wide)
    for a, b in zip(got, want, strict=True):
        assert relative(a, b) < bound
    grads = [torch.randn_like(out) for out in got]
    gots = torch.autograd.grad(got, leaves, grads)
    wants = torch.autograd.grad(want, wide, [grad.double() for grad in grads])
    for a, b in zip(gots, wants, strict=True):
        assert a.dtype == leaves[0].dtype
        assert relative(a, b) < bound


NORM_SHAPES = [(7, 3, 48), (33, 64), (5, 2, 9, 128), (1, 3), (3, 2, 1000), (2, 4096), (19, 1, 2880)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", NORM_SHAPES)
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    bound = 2e-6 if dtype == torch.float32 else 8e-3
    leaves = [randn(*shape).to(dtype), (1 + 0.1 * randn(shape[-1])).to(dtype)]
    compare(
        lambda x, w: (rms_norm(x, w, 1e-5, fused=True),), lambda x, w: (F.rms_norm(x, w.shape, w, 1e-5),), leaves, bound
    )

    def exact(x: Tensor, delta: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return F.rms_norm(x + delta, w.shape, w, 1e-5), x + delta

    leaves = [leaves[0], randn(*shape).to(dtype), leaves[1]]
    compare(lambda x, delta, w: add_rms_norm(x, delta, w, 1e-5, fused=True), exact, leaves, bound)
    compare(lambda x, delta, w: add_rms_norm(x, delta, w, 1e-5, fused=False), exact, leaves, bound)


def test_rms_norm_of_a_part_of_the_heads() -> None:
    """Keys are the first of the heads that a projection gives: rows that aren't equally far apart."""
    weight = 1 + 0.1 * randn(64)

    def keys(x: Tensor) -> Tensor:
        return x.view(5, 2, 6, 64)[:, :, :3]

    compare(
        lambda x, w: (rms_norm(keys(x), w, 1e-6, fused=True),),
        lambda x, w: (F.rms_norm(keys(x), w.shape, w, 1e-6),),
        [randn(5, 2, 384), weight],
        2e-6,
    )


def test_rms_norm_where_the_norm_or_the_sum_has_no_gradient() -> None:
    x, delta = (randn(6, 40).requires_grad_() for _ in range(2))
    weight = randn(40).requires_grad_()
    normed, total = add_rms_norm(x, delta, weight, 1e-5, fused=True)
    grad = torch.randn_like(total)
    assert torch.equal(torch.autograd.grad(total, x, grad, retain_graph=True)[0], grad)
    for_norm = torch.autograd.grad(normed, [x, delta], grad)
    wide = x.detach().double().requires_grad_()
    exact = F.rms_norm(wide + delta.double(), (40,), weight.double(), 1e-5)
    want = torch.autograd.grad(exact, wide, grad.double())[0]
    assert relative(for_norm[0], want) < 2e-6
    assert torch.equal(*for_norm)


def tables(positions: int, rotated: int) -> tuple[Tensor, Tensor]:
    angles = torch.outer(torch.arange(positions), 1.0 / 100 ** (torch.arange(rotated // 2) / rotated)).repeat(1, 2)
    return angles.cos().to(DEVICE), angles.sin().to(DEVICE)


@pytest.mark.parametrize("neighbours", [False, True])
@pytest.mark.parametrize(
    ("positions", "sequences", "heads", "key_heads", "dim", "rotated"),
    [(5, 2, 4, 2, 16, 16), (7, 1, 3, 1, 24, 12), (3, 3, 40, 8, 128, 128), (4, 2, 1, 1, 64, 2), (0, 2, 2, 1, 8, 8)],
)
def test_rotary(
    positions: int, sequences: int, heads: int, key_heads: int, dim: int, rotated: int, *, neighbours: bool
) -> None:
    cos, sin = tables(positions, rotated)
    leaves = [randn(positions, sequences, heads, dim), randn(positions, sequences, 2 * key_heads, dim)]

    def mine(q: Tensor, kv: Tensor) -> tuple[Tensor, ...]:
        return rotary(q, kv[:, :, :key_heads], cos, sin, neighbours=neighbours, fused=True)

    def exact(q: Tensor, kv: Tensor) -> tuple[Tensor, ...]:
        both = (split_pairs(x, rotated) if neighbours else x for x in (q, kv[:, :, :key_heads]))
        return tuple(rotate(x, cos.double(), sin.double()) for x in both)

    compare(mine, exact, leaves, 1e-6)
    # Each sequence has positions of its own.
    places = (
        torch.randint(positions, (positions, sequences)) if positions else torch.zeros(0, sequences, dtype=torch.int64)
    )
    cos, sin = cos[places], sin[places]
    compare(mine, exact, leaves, 1e-6)


@pytest.mark.parametrize("neighbours", [False, True])
@pytest.mark.parametrize(
    ("positions", "sequences", "heads", "plain", "rotated", "value"),
    [
        (5, 2, 4, 16, 8, 16),
        (7, 1, 3, 24, 4, 40),
        (3, 3, 17, 128, 64, 128),
        (2, 2, 20, 192, 64, 256),
        (0, 2, 2, 8, 8, 8),
    ],
)
def test_latent_heads(
    positions: int, sequences: int, heads: int, plain: int, rotated: int, value: int, *, neighbours: bool
) -> None:
    """The turned part of the keys is the end of each token's latent vector, the heads' rows are of a wider projection."""
    cos, sin = tables(positions, rotated)
    widths = (plain + rotated, plain + value)
    leaves = [randn(positions, sequences, heads * width) for width in widths] + [
        randn(positions, sequences, 7 + rotated)
    ]

    def apply(q: Tensor, kv: Tensor, latent: Tensor, fused: bool) -> tuple[Tensor, ...]:
        split = [x.unflatten(2, (heads, -1)) for x in (q, kv)]
        turned = [table.to(q.dtype) for table in (cos, sin)]
        return latent_heads(*split, latent[..., 7:], *turned, neighbours=neighbours, fused=fused)  # type: ignore[call-arg]

    compare(lambda *x: apply(*x, fused=True), lambda *x: apply(*x, fused=False), leaves, 1e-6)
    if positions == 0:
        return
    places = torch.randint(positions, (positions, sequences))
    cos, sin = cos[places], sin[places]
    compare(lambda *x: apply(*x, fused=True), lambda *x: apply(*x, fused=False), leaves, 1e-6)


def test_latent_heads_are_put_together_as_described() -> None:
    cos, sin = tables(3, 4)
    q, kv, turned = randn(3, 1, 2, 10), randn(3, 1, 2, 11), randn(3, 1, 4)
    queries, keys, values = latent_heads(q, kv, turned, cos, sin, neighbours=False)
    torch.testing.assert_close(queries, torch.cat([q[..., :6], rotate(q[..., 6:], cos, sin)], dim=-1))
    for head in range(2):
        torch.testing.assert_close(keys[:, :, head, :6], kv[:, :, head, :6])
        torch.testing.assert_close(keys[:, :, head, 6:], rotate(turned.unsqueeze(2), cos, sin)[:, :, 0])
    assert torch.equal(values, kv[..., 6:])


def test_rotary_turns_by_the_angle_of_the_position() -> None:
    cos, sin = tables(9, 8)
    x = randn(9, 1, 1, 8)
    low, high = x[..., :4], x[..., 4:]
    turned = torch.complex(low, high) * torch.complex(cos[:, None, None, :4], sin[:, None, None, :4])
    for fused in (True, False):
        q, _ = rotary(x, x, cos, sin, fused=fused)
        torch.testing.assert_close(q, torch.cat([turned.real, turned.imag], -1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 2, 4, 16), (7, 1, 3, 24), (3, 3, 65, 64), (2, 2, 5, 192)])
def test_sinks(shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention and sums as kernels lay them out: [S, B, H, V], and [B, H, S]; programs that sum several rows."""
    monkeypatch.setattr("runtime.kernels.sinks.PROGRAMS", 4)
    positions, sequences, heads, _ = shape
    out, grad = (randn(*shape).to(dtype) for _ in range(2))
    log_sum = (3 * randn(sequences, heads, positions)).permute(2, 0, 1)
    sinks = (2 * randn(heads)).to(dtype)
    wide = [x.double() for x in (out, log_sum, sinks)]
    want, total = add_sinks(*wide, fused=False)
    bound = 2e-6 if dtype == torch.float32 else 8e-3
    found = add_sinks(out, log_sum, sinks, fused=True)
    assert relative(found[0], want) < bound
    assert relative(found[1], total) < 2e-6
    expected = sinks_gradient(grad.double(), want, total, wide[2], fused=False)
    for order in ((0, 1, 2), (1, 0, 2)):  # the gradient may lie otherwise
        laid = grad.permute(*order, 3).contiguous().permute(*order, 3)
        assert relative(sinks_gradient(laid, *found, sinks, fused=True), expected) < bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("tokens", "columns", "padded"), [(9, 33, 40), (3, 4096, 4096), (5, 9001, 9008), (1, 2, 8), (0, 8, 8)]
)
def test_cross_entropy(tokens: int, columns: int, padded: int, dtype: torch.dtype) -> None:
    logits = (randn(tokens, 1, padded) * 3).to(dtype)
    logits[..., columns:] = float("nan")  # padding: nothing may read it
    labels = torch.randint(columns, (tokens, 1), device=DEVICE)
    labels[1::3] = -100
    grad = randn(tokens, 1)
    exact = logits[..., :columns].detach().double().requires_grad_()
    want = F.cross_entropy(exact.flatten(0, 1), labels.flatten(), reduction="none").view(tokens, 1)
    (want * grad).sum().backward()
    bound = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float64: 1e-12}[dtype]
    for fused in (True, False):
        leaf = logits.clone().requires_grad_()
        got = cross_entropy(leaf * 1, labels, 0, None, num_columns=columns, fused=fused)
        torch.testing.assert_close(got.double(), want.detach(), rtol=1e-5, atol=1e-5)
        (got * grad).sum().backward()
        assert leaf.grad is not None
        # A probability near 1 less 1 keeps the rounding of what it is a difference of.
        error = (leaf.grad[..., :columns].double() - exact.grad).abs()
        assert (error <= bound * grad.abs().unsqueeze(-1)).all()
        assert not leaf.grad[..., columns:].any()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter, about infinities
def test_cross_entropy_of_parts_and_of_what_is_not_finite() -> None:
    from runtime.kernels.cross_entropy import token_statistics

    logits = randn(4, 50)
    logits[1, 7] = float("inf")
    logits[2, 9] = float("nan")
    labels = torch.randint(50, (4,), device=DEVICE)
    top, total, chosen = token_statistics(logits, labels, 0, 50)
    loss = total.log() + top - chosen
    assert torch.isfinite(loss).tolist() == [True, False, False, True]
    parts = [token_statistics(logits[:, a:b].contiguous(), labels, a, b - a) for a, b in ((0, 20), (20, 50))]
    highest = torch.maximum(parts[0][0], parts[1][0])
    sums = sum(part[1] * (part[0] - highest).exp() for part in parts)
    joined = sums.log() + highest - parts[0][2] - parts[1][2]
    torch.testing.assert_close(joined[::3], loss[::3])
    top, total, _ = token_statistics(logits[:, :8], labels, 50, 0)  # a rank without columns
    assert torch.isneginf(top).all()
    assert not total.any()


def test_a_second_pass_through_kept_logits() -> None:
    x = randn(6, 1, 24).requires_grad_()
    logits = x * 2
    loss = cross_entropy(logits, torch.randint(24, (6, 1), device=DEVICE), 0, None, fused=True).sum()
    first = torch.autograd.grad(loss, x, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(loss, x)[0], first)
    with pytest.raises(RuntimeError, match=r"second time|modified by an inplace"):
        torch.autograd.grad(loss, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "rows", "width", "distinct"), [(200, 50, 40, 50), (129, 7, 1500, 2), (64, 5, 16, 1), (1, 3, 8, 3)]
)
def test_embedding_gradient(tokens: int, rows: int, width: int, distinct: int, dtype: torch.dtype) -> None:
    grad, total = randn(tokens, width).to(dtype), randn(rows, width)
    ids = torch.randint(distinct + 1, (tokens,), device=DEVICE)
    ids[ids == distinct] = rows  # another rank's
    expected = total.double()
    known = ids < rows
    expected.index_add_(0, ids[known], grad[known].double())
    for fused in (True, False):
        sums = total.clone()
        add_gradient(grad, ids, sums, fused=fused)
        torch.testing.assert_close(sums.double(), expected, rtol=1e-5, atol=1e-4)
        if fused:
            again = total.clone()
            add_gradient(grad, ids, again, fused=True)
            assert torch.equal(sums, again)
        low = total.bfloat16()
        add_gradient(grad, ids, low, fused=fused)
        added = expected - total.double()
        # Rounded once however many tokens a row has; triton's interpreter cuts where a GPU rounds.
        torch.testing.assert_close(low.double(), total.bfloat16().double() + added, rtol=2**-7, atol=1e-4)


def test_embedding_looks_up_and_leaves_a_gradient() -> None:
    weight = randn(6, 8).requires_grad_()
    ids = torch.tensor([[1, 6, 1], [5, 0, 9]], device=DEVICE)
    out = embedding(ids, weight, partial=True)
    assert torch.equal(out[0, 0], weight[1])
    assert not out[0, 1].any()
    out.sum().backward()
    assert weight.grad is not None
    assert weight.grad[:, 0].tolist() == [1, 2, 0, 0, 0, 1]


def test_linears() -> None:
    leaves = [randn(3, 5, 16), randn(8, 16), randn(24, 16), randn(8)]
    compare(
        lambda x, a, b, c: linears(x, [a, b], [c, None]),
        lambda x, a, b, c: (F.linear(x, a, c), F.linear(x, b)),
        leaves,
        2e-6 if DEVICE.type == "cpu" else 1e-3,
    )
    x, weight = (leaf.requires_grad_() for leaf in leaves[:2])
    assert torch.equal(linear(x, weight), F.linear(x, weight))


def test_a_norms_output_is_made_again_where_it_is_needed() -> None:
    x, delta, norm, first, second = (randn(*s) for s in ((6, 2, 16), (6, 2, 16), (16,), (8, 16), (24, 16)))
    results = []
    for again in (True, False):
        leaves = [leaf.clone().requires_grad_() for leaf in (x, delta, norm, first, second)]
        normed, total = add_rms_norm(leaves[0], leaves[1], leaves[2], 1e-5, remade=True)
        tokens = as_tokens(normed) if again else normed.flatten(0, 1)
        outs = (*linears(tokens, [leaves[3]]), *linears(tokens, [leaves[4]]))
        for out in outs:
            saved = [kept.data_ptr() for kept in out.grad_fn.saved_tensors]
            assert (normed.data_ptr() in saved) is not again
            assert (total.data_ptr() in saved) is again
        results.append(torch.autograd.grad([out.square().sum() for out in outs], leaves))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_add_product(dtype: torch.dtype) -> None:
    left, right, total = randn(40, 24).to(dtype), randn(40, 16).to(dtype), randn(24, 16)
    product = left.double().t() @ right.double()
    for fresh in (False, True):
        sums = torch.full_like(total, float("nan")) if fresh else total.clone()
        add_product(sums, left, right, fresh=fresh)
        assert relative(sums, product if fresh else product + total.double()) < (6e-3 if DEVICE.type == "cpu" else 1e-3)


def adamw_reference(p: Tensor, g: Tensor, m: Tensor, v: Tensor, step: int) -> None:
    """In fp64 and in place; https://arxiv.org/abs/1711.05101."""
    lr, beta1, beta2, eps, decay = 1e-2, 0.9, 0.95, 1e-8, 0.1
    m.mul_(beta1).add_(g * (1 - beta1))
    v.mul_(beta2).add_(g * g * (1 - beta2))
    p.sub_(lr * decay * p + lr * (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + eps))


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 777, 5000])
def test_adamw(size: int, moments: torch.dtype) -> None:
    from runtime.kernels.adamw import adamw_step

    options = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
    p = randn(size)
    m, v = (torch.zeros(size, device=DEVICE, dtype=moments) for _ in range(2))
    exact = [x.double() for x in (p, m, v)]
    weight = torch.full((size,), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    no, yes = (torch.tensor(flag, device=DEVICE) for flag in (False, True))
    for step in range(1, 6):
        g = randn(size)
        adamw_step(g * 4, p, m, v, weight, torch.tensor(4.0, device=DEVICE), no, num_steps=step, **options)
        adamw_reference(exact[0], g.double(), exact[1], exact[2], step)
        # Triton's interpreter cuts where a GPU rounds.
        torch.testing.assert_close(
            weight.float(), p.bfloat16().float(), rtol=0 if DEVICE.type == "cuda" else 2**-7, atol=0
        )
    bounds = (2e-6, 2e-6, 2e-6) if moments == torch.float32 else (1.5e-2, 1.5e-2, 1.5e-2)
    for mine, other, bound in zip((p, m, v), exact, bounds, strict=True):
        assert relative(mine, other) < bound
    before = [x.clone() for x in (p, m, v)]
    adamw_step(g * float("nan"), p, m, v, None, torch.tensor(1.0, device=DEVICE), yes, num_steps=6, **options)
    assert all(torch.equal(a, b) for a, b in zip((p, m, v), before, strict=True))


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 777, 5000])
def test_adamw_with_remainders_gives_the_bits_of_fp32_masters(size: int, moments: torch.dtype) -> None:
    from runtime.kernels.adamw import adamw_step
    from runtime.parallel.masters import join, off_ties, split

    options = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
    whole = [off_ties(randn(size)), *(torch.zeros(size, device=DEVICE, dtype=moments) for _ in range(2))]
    written = torch.zeros(size, dtype=torch.bfloat16, device=DEVICE)
    weight, remainder = split(whole[0])
    halves = [remainder, *(x.clone() for x in whole[1:])]
    divisor, no, yes = torch.tensor(4.0, device=DEVICE), *(torch.tensor(f, device=DEVICE) for f in (False, True))
    for step in range(1, 6):
        g = randn(size).bfloat16()
        adamw_step(g, *whole, written, divisor, no, num_steps=step, **options)
        adamw_step(g, *halves, weight, divisor, no, num_steps=step, **options)
        assert torch.equal(join(weight, remainder), whole[0])
        assert all(torch.equal(a, b) for a, b in zip(halves[1:], whole[1:], strict=True))
        assert torch.equal(weight, whole[0].bfloat16())
        if DEVICE.type == "cuda":  # Triton's interpreter cuts where a GPU rounds
            assert torch.equal(weight, written)
    before = [x.clone() for x in (weight, *halves)]
    adamw_step(g * float("nan"), *halves, weight, divisor, yes, num_steps=6, **options)
    assert all(torch.equal(a, b) for a, b in zip((weight, *halves), before, strict=True))


def test_adamw_moves_masters_off_the_ties() -> None:
    from runtime.kernels.adamw import adamw_step
    from runtime.parallel.masters import join, off_ties, split

    low = torch.arange(1 << 17, dtype=torch.int32)[(1 << 14) :: 1 << 8]  # every kind of rounding, both ties among them
    bits = torch.cat([low | high for high in (0x3F800000, 0x41220000, -0x40000000, 0x7F7E0000, -0x00820000)])
    extra = torch.tensor([0.0, float("inf"), -float("inf"), float("nan")])
    numbers = torch.cat([bits.view(torch.float32), extra]).to(DEVICE)
    weight, remainder = split(numbers)
    whole, written, rest = numbers.clone(), torch.zeros_like(weight), []
    for _ in range(2):
        rest.append([torch.zeros_like(numbers), torch.zeros_like(numbers)])
    options = {"lr": 0.0, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.0, "num_steps": 1}
    one, no, g = torch.ones((), device=DEVICE), torch.tensor(False, device=DEVICE), torch.ones_like(numbers)
    adamw_step(g, whole, *rest[0], written, one, no, **options)
    adamw_step(g, remainder, *rest[1], weight, one, no, **options)
    want = off_ties(numbers)
    assert int((want != numbers).sum()) == 5 + 1  # NaN is unlike itself
    for got in (whole, join(weight, remainder)):
        assert torch.equal(got[:-1], want[:-1])
        assert got[-1].isnan()
    assert torch.equal(weight[:-1], want[:-1].bfloat16())
    assert weight[-1].isnan()


def test_adamw_in_pieces_is_adamw_at_once() -> None:
    from runtime.kernels.adamw import adamw_step
    from runtime.optim.adamw import random_bits, round_stochastically

    size, piece = 5000, 2064
    options = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "num_steps": 3}
    g, p = randn(size), randn(size)
    state = [p, *(torch.zeros(size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))]
    other = [x.clone() for x in state]
    rest = (None, torch.tensor(1.0, device=DEVICE), torch.tensor(False, device=DEVICE))
    adamw_step(g, *state, *rest, **options)
    for begin in range(0, size, piece):
        parts = [x[begin : begin + piece] for x in (g, *other)]
        adamw_step(*parts, *rest, **options, first=begin)
    assert all(torch.equal(a, b) for a, b in zip(state, other, strict=True))
    # And rounds as plain torch does, from the same bits.
    bits = random_bits(0, size, 3, g.device)
    assert torch.equal(state[1].float(), round_stochastically((1 - 0.9) * g, bits & 0xFFFF))
    assert torch.equal(state[2].float(), round_stochastically((1 - 0.95) * g * g, bits >> 16))


def test_moments_in_bf16_are_rounded_without_bias() -> None:
    from runtime.kernels.adamw import adamw_step

    # 1e-3 of the second moment is less than half of bf16's spacing: to the nearest, it would stand still.
    size, start, target = 4096, 1.0, 2.0
    p, g = torch.zeros(size, device=DEVICE), torch.full((size,), target**0.5, device=DEVICE)
    m, v = (torch.full((size,), start, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    options = {"lr": 0.0, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}
    one, no = torch.ones((), device=DEVICE), torch.tensor(False, device=DEVICE)
    for step in range(1, 41):
        adamw_step(g, p, m, v, None, one, no, num_steps=step, **options)
    expected = target + (start - target) * 0.999**40
    assert float(v.double().mean()) == pytest.approx(expected, abs=2e-3)
    assert float(v.double().std()) > 0  # the places are rounded differently


def test_rounding_is_stochastic_where_there_is_no_kernel() -> None:
    from runtime.optim.adamw import random_bits, round_stochastically

    values = torch.full((20_000,), 1.0 + 2**-9, device=DEVICE)  # a quarter of bf16's spacing above 1
    rounded = round_stochastically(values, random_bits(0, len(values), 3, values.device) >> 16)
    assert set(rounded.tolist()) == {1.0, 1.0 + 2**-7}
    assert float((rounded > 1).double().mean()) == pytest.approx(0.25, abs=0.02)
    assert torch.equal(rounded, rounded.bfloat16().float())
    odd = torch.tensor([float("inf"), float("nan"), -2.0, 0.0], device=DEVICE)
    torch.testing.assert_close(round_stochastically(odd, torch.full((4,), 0xFFFF, device=DEVICE)), odd, equal_nan=True)


@pytest.mark.parametrize("size", [0, 1, 70_001])
def test_square_sum(size: int) -> None:
    from runtime.kernels.adamw import square_sum

    values = randn(size)
    assert float(square_sum(values)) == pytest.approx(float(values.double().square().sum()), rel=1e-7)
