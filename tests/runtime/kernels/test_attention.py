"""Attention by whichever kernels a case gets, against a softmax written out in fp64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from runtime.ops.attention import attend
from runtime.ops.documents import Documents, Packed
from tests.runtime.moe.oracle import relative

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


def exact(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("sbhk,tbhk->bhst", q, k) / q.shape[-1] ** 0.5
    query = torch.arange(k.shape[0] - q.shape[0], k.shape[0], device=q.device).unsqueeze(1)
    key = torch.arange(k.shape[0], device=q.device)
    seen = (key <= query) & (key > query - (window or k.shape[0]))
    return torch.einsum("bhst,tbhk->sbhk", scores.masked_fill(~seen, float("-inf")).softmax(-1), v)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32] if CUDA else [torch.float32])
@pytest.mark.parametrize("window", [None, 1, 37, 1000])
@pytest.mark.parametrize(
    ("num_q", "num_k", "heads", "kv_heads", "dim"),
    [(256, 256, 8, 2, 128), (77, 77, 4, 4, 64), (64, 200, 6, 2, 96), (1, 1, 2, 1, 32), (300, 300, 3, 1, 40)],
)
def test_attention(
    num_q: int, num_k: int, heads: int, kv_heads: int, dim: int, window: int | None, dtype: torch.dtype
) -> None:
    q = torch.randn(num_q, 2, heads, dim, device=DEVICE).to(dtype).requires_grad_()
    kv = torch.randn(num_k, 2, 2 * kv_heads, dim, device=DEVICE).to(dtype).requires_grad_()
    out = attend(q, *kv.chunk(2, dim=2), window)
    assert out.shape == q.shape
    wide = [x.detach().double().requires_grad_() for x in (q, kv)]
    want = exact(wide[0], *wide[1].chunk(2, dim=2), window)
    grad = torch.randn_like(want)
    grads = torch.autograd.grad(out, [q, kv], grad.to(dtype))
    wants = torch.autograd.grad(want, wide, grad)
    bound = 1e-5 if dtype == torch.float32 else 1e-2
    assert relative(out, want) < bound
    for mine, other in zip(grads, wants, strict=True):
        # A position that sees itself alone has no gradient of its scores: held against a typical one.
        typical = 1e-30 if num_k > 1 and window != 1 else float(grad.norm())
        assert float((mine.double() - other).norm()) < bound * max(float(other.norm()), typical)


def exact_packed(q: Tensor, k: Tensor, v: Tensor, ids_BS: Tensor, window: int | None, sinks_H: Tensor | None) -> Tensor:
    """The same with documents, and with a column for the sinks."""
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("sbhk,tbhk->bhst", q, k) / q.shape[-1] ** 0.5
    query = torch.arange(k.shape[0] - q.shape[0], k.shape[0], device=q.device).unsqueeze(1)
    key = torch.arange(k.shape[0], device=q.device)
    seen = (key <= query) & (key > query - (window or k.shape[0]))
    seen = seen & (ids_BS[:, query] == ids_BS[:, None, :])
    scores = scores.masked_fill(~seen.unsqueeze(1), float("-inf"))
    if sinks_H is not None:
        scores = torch.cat([scores, sinks_H[None, :, None, None].expand(*scores.shape[:3], 1)], dim=-1)
    return torch.einsum("bhst,tbhk->sbhk", scores.softmax(-1)[..., : k.shape[0]], v)


GEOMETRIES = [(300, 300, 4, 2, 64, 64), (128, 384, 4, 1, 128, 128), (77, 77, 2, 2, 96, 64), (3, 300, 4, 2, 32, 32)]
"""Queries, keys, heads, key/value heads, head dim, dim of values."""


def compare_packed(
    geometry: tuple[int, ...],
    window: int | None,
    dtype: torch.dtype,
    attention: Callable[[list[Tensor], Packed], Tensor],
    *,
    sinks: bool,
) -> None:
    """Hold outputs and gradients of an attention over documents against a softmax written out in fp64."""
    num_q, num_k, heads, kv_heads, dim, value_dim = geometry
    shapes = [(num_q, 3, heads, dim), (num_k, 3, kv_heads, dim), (num_k, 3, kv_heads, value_dim)]
    shapes += [(heads,)] if sinks else []
    tensors = [torch.randn(*shape, device=DEVICE).to(dtype).requires_grad_() for shape in shapes]
    begins_BS = torch.rand(3, num_k) < 0.03  # documents that end before the first query, too
    begins_BS[0, 5] = begins_BS[1, 4:9] = True
    begins_BS[2] = False  # a row that is one document
    ids_BS = begins_BS.cumsum(1, dtype=torch.int32)
    out = attention(tensors, Documents(ids_BS, torch.device(DEVICE)).part(num_k - num_q, num_k))
    wide = [x.detach().double().requires_grad_() for x in tensors]
    want = exact_packed(wide[0], wide[1], wide[2], ids_BS.to(DEVICE), window, wide[3] if sinks else None)
    assert out.shape == want.shape
    grad = torch.randn_like(want)
    grads = torch.autograd.grad(out, tensors, grad.to(dtype))
    wants = torch.autograd.grad(want, wide, grad)
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    assert relative(out, want) < bound
    for mine, other in zip(grads, wants, strict=True):
        assert float((mine.double() - other).norm()) < bound * float(other.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32] if CUDA else [torch.float32])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("window", [None, 37])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_documents_do_not_see_each_other(
    geometry: tuple[int, ...], window: int | None, sinks: bool, dtype: torch.dtype
) -> None:
    def attention(x: list[Tensor], packed: Packed) -> Tensor:
        return attend(x[0], x[1], x[2], window, sinks_H=x[3] if sinks else None, packed=packed)

    compare_packed(geometry, window, dtype, attention, sinks=sinks)


def varlen(
    q: Tensor, k: Tensor, v: Tensor, cum_q: Tensor, cum_k: Tensor, max_q: int, max_k: int, dropout: float, causal: bool,
    debug: bool, *, scale: float | None = None, window_size_left: int = -1, window_size_right: int = -1,
) -> tuple[Tensor]:  # fmt: skip
    """What torch's flash attention computes of sequences of unequal length: the last query of each sees its last key."""
    assert causal
    assert not debug
    assert dropout == 0
    assert (cum_q.dtype, cum_k.dtype) == (torch.int32, torch.int32)
    assert max_q >= max(2, int(cum_q.diff().max()))
    assert max_k >= int(cum_k.diff().max())
    assert (int(cum_q[-1]), int(cum_k[-1])) == (len(q), len(k))
    window = None if window_size_left < 0 else window_size_left + 1
    factor = 1.0 if scale is None else scale * q.shape[-1] ** 0.5
    ranges = [(c[:-1].tolist(), c[1:].tolist()) for c in (cum_q, cum_k)]
    parts = [
        exact((q[a:b] * factor).unsqueeze(1), k[c:d].unsqueeze(1), v[c:d].unsqueeze(1), window).squeeze(1)
        for a, b, c, d in zip(*ranges[0], *ranges[1], strict=True)
    ]
    return (torch.cat(parts),)


@pytest.mark.parametrize(("window", "sinks"), [(None, False), (37, False), (None, True)])
@pytest.mark.parametrize("geometry", GEOMETRIES[:2] + GEOMETRIES[3:])
def test_documents_as_flash_attention_takes_them(
    geometry: tuple[int, ...], window: int | None, sinks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU the kernel itself is behind the test above; here what it is told."""
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", varlen)
    monkeypatch.setattr("runtime.ops.attention._flash_fits", lambda q: True)

    def attention(x: list[Tensor], packed: Packed) -> Tensor:
        return attend(x[0], x[1], x[2], window, sinks_H=x[3] if sinks else None, packed=packed)

    compare_packed(geometry, window, torch.float32, attention, sinks=sinks)
