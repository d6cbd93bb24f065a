"""Attention by whichever kernels a case gets, against a softmax written out in fp64."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from runtime.ops.attention import attend, describe_attention
from runtime.ops.attention_kernels import Attended, Forward, Gradients
from runtime.ops.documents import Documents, Packed
from runtime.ops.joined_attention import attend_in_parts
from runtime.ops.te_attention import differs
from tests.runtime.moe.oracle import relative

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
# Of the first product in autograd's thread; torch then makes the context itself.
pytestmark = pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS")


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
    [
        (256, 256, 8, 2, 128),
        (77, 77, 4, 4, 64),
        (64, 200, 6, 2, 96),
        (1, 1, 2, 1, 32),
        (300, 300, 3, 1, 40),
        (128, 384, 4, 2, 64),  # keys before the first query, which have a kernel of their own
        (131, 300, 2, 2, 256),
    ],
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


def some_documents(num_k: int) -> Tensor:
    """[3, Sk] with documents that end before the first query, too, and a row that is one."""
    begins_BS = torch.rand(3, num_k) < 0.03
    begins_BS[0, 5] = begins_BS[1, 4:9] = True
    begins_BS[2] = False
    return begins_BS.cumsum(1, dtype=torch.int32)


GEOMETRIES = [(300, 300, 4, 2, 64, 64), (128, 384, 4, 1, 128, 128), (77, 77, 2, 2, 96, 64), (3, 300, 4, 2, 32, 32)]
"""Queries, keys, heads, key/value heads, head dim, dim of values."""


def compare_packed(
    geometry: tuple[int, ...],
    window: int | None,
    dtype: torch.dtype,
    attention: Callable[[list[Tensor], Packed], Tensor],
    *,
    sinks: bool,
    ids_BS: Tensor | None = None,
) -> None:
    """Hold outputs and gradients of an attention over documents against a softmax written out in fp64."""
    num_q, num_k, heads, kv_heads, dim, value_dim = geometry
    shapes = [(num_q, 3, heads, dim), (num_k, 3, kv_heads, dim), (num_k, 3, kv_heads, value_dim)]
    shapes += [(heads,)] if sinks else []
    tensors = [torch.randn(*shape, device=DEVICE).to(dtype).requires_grad_() for shape in shapes]
    ids_BS = some_documents(num_k) if ids_BS is None else ids_BS
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


@dataclass(frozen=True)
class Written:
    """What a library's kernel computes, written out: `sees` says of [Sq, Sk] which keys each query sees."""

    sees: Callable[[Tensor, Tensor], Tensor]
    scale: float | None

    def _scores(self, q: Tensor, k: Tensor) -> Tensor:
        k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
        scale = q.shape[-1] ** -0.5 if self.scale is None else self.scale
        scores = torch.einsum("sbhk,tbhk->sbht", q, k) * scale
        return scores.masked_fill(~self.sees(q, k)[:, None, None], float("-inf"))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Forward:
        scores, v = self._scores(q, k), v.repeat_interleave(q.shape[2] // v.shape[2], dim=2)
        return torch.einsum("sbht,tbhv->sbhv", scores.softmax(-1), v), scores.logsumexp(-1), ()

    def backward(self, grad: Tensor, done: Attended, kept: Any) -> Gradients:
        """By the formulas that such kernels follow: probabilities from the sums given, what the softmax takes back from the output."""
        q, k, v, out, log_sum = done
        groups, scale = q.shape[2] // k.shape[2], q.shape[-1] ** -0.5 if self.scale is None else self.scale
        keys, values = (x.repeat_interleave(groups, dim=2) for x in (k, v))
        p = torch.exp(self._scores(q, k) - log_sum.unsqueeze(-1))
        dp = torch.einsum("sbhv,tbhv->sbht", grad, values)
        ds = p * (dp - (grad * out).sum(-1, keepdim=True)) * scale
        dk, dv = torch.einsum("sbht,sbhk->tbhk", ds, q), torch.einsum("sbht,sbhv->tbhv", p, grad)
        dk, dv = (x.unflatten(2, (-1, groups)).sum(3) for x in (dk, dv))
        return torch.einsum("sbht,tbhk->sbhk", ds, keys), dk, dv


def everything(q: Tensor, k: Tensor) -> Tensor:
    return torch.ones(len(q), len(k), dtype=torch.bool, device=q.device)


def causal(q: Tensor, k: Tensor, window: int | None = None) -> Tensor:
    key = torch.arange(len(k), device=q.device)
    query = key[len(k) - len(q) :].unsqueeze(1)
    return (key <= query) & (key > query - (window or len(k)))


@pytest.mark.parametrize("sinks", [False, True])
def test_parts_are_joined(*, sinks: bool) -> None:
    """Of a context-parallel rank's queries, by cuDNN's kernels as written out: the keys before them, and the square."""
    torch.manual_seed(0)
    tensors = [
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in ((5, 2, 4, 8), (12, 2, 2, 8), (12, 2, 2, 6))
    ]
    sink = torch.randn(4, dtype=torch.float64, requires_grad=True) if sinks else None
    found = attend_in_parts(*tensors, sink, [(Written(everything, 0.3), 7), (Written(causal, 0.3), 5)])  # type: ignore[arg-type]
    ids_BS = torch.zeros(2, 12, dtype=torch.int32)
    want = exact_packed(tensors[0] * 0.3 * 8**0.5, tensors[1], tensors[2], ids_BS, None, sink)
    torch.testing.assert_close(found, want)
    inputs = tensors if sink is None else [*tensors, sink]
    grad = torch.randn_like(want)
    for mine, other in zip(
        torch.autograd.grad(found, inputs, grad), torch.autograd.grad(want, inputs, grad), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6)  # sums are kept in fp32 beside sinks


class Flash:
    """torch's flash kernels for sequences of unequal length: the last query of each sees its last key."""

    @staticmethod
    def written(window_size_left: int | None, scale: float | None) -> Written:
        window = None if window_size_left is None else window_size_left + 1
        return Written(functools.partial(causal, window=window), scale)

    @staticmethod
    def documents(q: Tensor, k: Tensor, sizes: tuple[Any, ...]) -> list[tuple[slice, slice]]:
        cum_q, cum_k, most_q, most_k = sizes
        assert (cum_q.dtype, cum_k.dtype) == (torch.int32, torch.int32)
        assert (int(cum_q[-1]), int(cum_k[-1])) == (len(q), len(k))
        assert most_q >= max(2, int(cum_q.diff().max()))
        assert most_k >= int(cum_k.diff().max())
        ends = [(cum[:-1].tolist(), cum[1:].tolist()) for cum in (cum_q, cum_k)]
        return [(slice(a, b), slice(c, d)) for a, b, c, d in zip(*ends[0], *ends[1], strict=True)]

    @classmethod
    def forward(
        cls, q: Tensor, k: Tensor, v: Tensor, *sizes: Any, scale: float | None = None,
        window_size_left: int | None = None, window_size_right: int = 0,
    ) -> tuple[Any, ...]:  # fmt: skip
        assert sizes[4:] == (0.0, True, False)
        assert window_size_right == 0
        kernel, out, sums = cls.written(window_size_left, scale), torch.empty_like(q), q.new_empty(q.shape[:2])
        if sizes[0] is None:  # rows of equal length
            out, sums, _ = kernel.forward(*(x.transpose(0, 1) for x in (q, k, v)))
            return out.transpose(0, 1), sums.permute(1, 2, 0).contiguous(), "seed", "offset", None
        for own, keys in cls.documents(q, k, sizes[:4]):
            found = kernel.forward(*(x.unsqueeze(1) for x in (q[own], k[keys], v[keys])))
            out[own], sums[own] = found[0].squeeze(1), found[1].squeeze(1)
        return out, sums.T.contiguous(), "seed", "offset", None

    @classmethod
    def backward(
        cls, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, *sizes: Any,
        scale: float | None = None, window_size_left: int | None = None, window_size_right: int = 0,
    ) -> Gradients:  # fmt: skip
        assert sizes[4:] == (0.0, True, "seed", "offset")
        assert window_size_right == 0
        kernel, grads = cls.written(window_size_left, scale), (q * 0, k * 0, v * 0)
        if sizes[0] is None:
            rows = [x.transpose(0, 1) for x in (grad, q, k, v, out)]
            found = kernel.backward(rows[0], Attended(*rows[1:], sums.permute(2, 0, 1)), None)
            return found[0].transpose(0, 1), found[1].transpose(0, 1), found[2].transpose(0, 1)
        for own, keys in cls.documents(q, k, sizes[:4]):
            x = [x.unsqueeze(1) for x in (grad[own], q[own], k[keys], v[keys], out[own], sums.T[own])]
            for whole, place, part in zip(
                grads, (own, keys, keys), kernel.backward(x[0], Attended(*x[1:]), None), strict=True
            ):
                whole[place] = part.squeeze(1)
        return grads


class Engine:
    """Transformer Engine's functions, as far as they are asked."""

    FusedAttnBackend: ClassVar = {"F16_arbitrary_seqlen": "backend"}

    @staticmethod
    def documents(layout: str, ends: Tensor, most: int, q: Tensor) -> list[slice]:
        assert ends.dtype == torch.int32
        assert most >= int(ends.diff().max())
        if layout == "sbhd":
            assert ends.tolist() == [row * len(q) for row in range(q.shape[1] + 1)]
            return [slice(None)]
        return [slice(a, b) for a, b in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)]

    @staticmethod
    def written(options: dict[str, Any], layout: str) -> Written:
        back, ahead = options["window_size"]
        assert ahead == (-1 if back < 0 else 0)
        assert options["attn_mask_type"] == ("causal" if layout == "sbhd" else "padding_causal")
        return Written(functools.partial(causal, window=None if back < 0 else back + 1), options["attn_scale"])

    @classmethod
    def fused_attn_fwd(cls, training: bool, *given: Any, **options: Any) -> tuple[Tensor, list[Any]]:
        most, most_k, ends, ends_k, q, k, v, dtype, backend = given
        assert (training, most_k, backend, dtype) == (True, most, "backend", q.dtype)
        assert ends_k is ends
        assert all(x.is_contiguous() for x in (q, k, v))
        layout = options["o_format"]
        kernel, out, sums = (
            cls.written(options, layout),
            q.new_empty(*q.shape[:-1], v.shape[-1]),
            q.new_empty(q.shape[:-1]),
        )
        for own in cls.documents(layout, ends, most, q):
            rows = [x[own] if layout == "sbhd" else x[own].unsqueeze(1) for x in (q, k, v)]
            found = kernel.forward(*rows)
            out[own], sums[own] = (x if layout == "sbhd" else x.squeeze(1) for x in found[:2])
        sums = sums.permute(1, 2, 0).contiguous() if layout == "sbhd" else sums
        return out, [sums.unsqueeze(-1), "state"]

    @classmethod
    def fused_attn_bwd(cls, *given: Any, **options: Any) -> list[Any]:
        most, _, ends, _, q, k, v, out, grad, _, (sums, state), _ = given
        assert state == "state"
        layout = options["o_format"]
        assert (options["do_format"], options["dqkv_layout"]) == (layout, options["qkv_layout"])
        kernel, grads = cls.written(options, layout), (q * 0, k * 0, v * 0)
        sums = sums.squeeze(-1).permute(2, 0, 1) if layout == "sbhd" else sums.squeeze(-1)
        for own in cls.documents(layout, ends, most, q):
            x = [x[own] if layout == "sbhd" else x[own].unsqueeze(1) for x in (grad, q, k, v, out, sums)]
            for whole, part in zip(grads, kernel.backward(x[0], Attended(*x[1:]), None), strict=True):
                whole[own] = part if layout == "sbhd" else part.squeeze(1)
        return [*grads, None, None]


@pytest.mark.parametrize(("documents", "window"), [(True, None), (True, 37), (False, 37)])
@pytest.mark.parametrize("sinks", [False, True])
def test_windows_and_documents_as_transformer_engine_takes_them(
    window: int | None, *, sinks: bool, documents: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU where it is installed its kernels are behind the tests above and below; here what they are told."""
    monkeypatch.setattr("runtime.ops.attention._cudnn_fits", lambda q, k, v: True)
    monkeypatch.setattr("runtime.ops.attention.transformer_engine", lambda: Engine)

    def attention(x: list[Tensor], packed: Packed) -> Tensor:
        sink = x[3] if sinks else None
        return attend(x[0], x[1], x[2], window, sinks_H=sink, packed=packed if documents else None)

    ids_BS = None if documents else torch.zeros(3, 150, dtype=torch.int32)
    compare_packed((150, 150, 4, 2, 24, 16), window, torch.float32, attention, sinks=sinks, ids_BS=ids_BS)


class WithoutWindows(Engine):
    """One that leaves windows out."""

    @staticmethod
    def written(options: dict[str, Any], layout: str) -> Written:
        return Engine.written(options | {"window_size": (-1, -1)}, layout)


class WithOtherSums(Engine):
    """One whose sums are of powers of two."""

    @classmethod
    def fused_attn_fwd(cls, training: bool, *given: Any, **options: Any) -> tuple[Tensor, list[Any]]:
        out, (sums, state) = super().fused_attn_fwd(training, *given, **options)
        return out, [sums / math.log(2), state]


def test_transformer_engine_is_tried_beside_flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", Flash.forward)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", Flash.backward)
    here = torch.device("cpu"), torch.float32
    assert differs(Engine, *here) == ""
    assert differs(WithoutWindows, *here).startswith("output with documents and a window differ by")
    assert differs(WithOtherSums, *here).startswith("sums with documents differ by")


def test_the_log_says_what_would_be_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, both = torch.device("cuda"), {"windows": True, "documents": True}
    monkeypatch.setattr("runtime.ops.attention._processor", lambda device: 9)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (line,) = describe_attention(gpu, torch.bfloat16, **both)
    assert line.startswith(
        "attention with windows and documents: torch's flash kernels; Transformer Engine's are faster"
    )
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    (line,) = describe_attention(gpu, torch.bfloat16, windows=True, documents=False)
    assert line.startswith("attention with windows: Transformer Engine's kernels")
    assert describe_attention(gpu, torch.bfloat16, windows=False, documents=False) == []
    assert describe_attention(gpu, torch.float32, **both) == []
    assert describe_attention(torch.device("cpu"), torch.bfloat16, **both) == []
    monkeypatch.setattr("runtime.ops.attention._processor", lambda device: 8)
    assert describe_attention(gpu, torch.bfloat16, **both) == []


@pytest.mark.parametrize("window", [None, 37])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("geometry", GEOMETRIES[:2] + GEOMETRIES[3:])
def test_documents_as_flash_attention_takes_them(
    geometry: tuple[int, ...], window: int | None, sinks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU the kernels themselves are behind the test above; here what they are told."""
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", Flash.forward)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", Flash.backward)
    monkeypatch.setattr("runtime.ops.attention._flash_fits", lambda q: True)
    monkeypatch.setattr("runtime.ops.attention._cudnn_fits", lambda q, k, v: False)

    def attention(x: list[Tensor], packed: Packed) -> Tensor:
        return attend(x[0], x[1], x[2], window, sinks_H=x[3] if sinks else None, packed=packed)

    compare_packed(geometry, window, torch.float32, attention, sinks=sinks)


class TestSinks:
    """Rows that are one document each, with a sink; on a GPU by cuDNN's kernels, or, with a window, by torch's flash kernels."""

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32] if CUDA else [torch.float32])
    @pytest.mark.parametrize("window", [None, 37])
    @pytest.mark.parametrize("geometry", [*GEOMETRIES, (256, 256, 4, 2, 192, 128), (1, 200, 8, 1, 64, 64)])
    def test_against_a_column_of_its_own(
        self, geometry: tuple[int, ...], window: int | None, dtype: torch.dtype
    ) -> None:
        num_k = geometry[1]
        ids_BS = torch.zeros(3, num_k, dtype=torch.int32)

        def attention(x: list[Tensor], packed: Packed) -> Tensor:
            return attend(x[0], x[1], x[2], window, sinks_H=x[3])

        compare_packed(geometry, window, dtype, attention, sinks=True, ids_BS=ids_BS)
