"""Causal attention on one device, by the fastest kernels that know the case.

Legend: Sq queries, Sk keys, B sequences, H query heads, G key/value heads, K head dim.

torch chooses among its kernels by itself, and not always alike: whether cuDNN's come first depends on the version of
the library that the process happens to have loaded. On Hopper they take about half of the time of its flash kernels, so
the choice is made here.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_CUDNN_ANY_LENGTH = 91501
"""From this version on, sequences needn't be multiples of 128 (torch's own condition)."""


@functools.cache
def _processor(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]


def _half(x: Tensor) -> bool:
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)


def _cudnn_fits(q: Tensor, k: Tensor) -> bool:
    if not _half(q) or _processor(q.device) not in (9, 10) or not torch.backends.cudnn.is_available():  # type: ignore[no-untyped-call]
        return False
    version: int = torch.backends.cudnn.version() or 0  # type: ignore[no-untyped-call]
    known_length = q.shape[0] % 128 == 0 or version >= _CUDNN_ANY_LENGTH
    return q.shape[0] == k.shape[0] > 1 and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128 and known_length


def _flash_fits(q: Tensor) -> bool:
    return _half(q) and _processor(q.device) >= 8 and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256


def _cudnn(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """Square causal attention; keys and values aren't repeated for the query heads."""
    heads_first = (x.permute(1, 2, 0, 3) for x in (q, k, v))
    grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    result = torch.ops.aten._scaled_dot_product_cudnn_attention(*heads_first, None, grad, 0.0, True, scale=scale)
    out: Tensor = result[0]
    return out.permute(2, 0, 1, 3)


def _flash(q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float | None) -> Tensor:
    """The last query sees the last key; with a window, the tiles outside it aren't computed."""
    sequence_first = (x.transpose(0, 1) for x in (q, k, v))
    options: dict[str, Any] = {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}
    options |= {} if scale is None else {"scale": scale}
    sizes = (None, None, q.shape[0], k.shape[0])
    result = torch.ops.aten._flash_attention_forward(*sequence_first, *sizes, 0.0, True, False, **options)
    out: Tensor = result[0]
    return out.transpose(0, 1)


def attend(
    q_SBHK: Tensor,
    k_SBGK: Tensor,
    v_SBGV: Tensor,
    window: int | None,
    *,
    scale: float | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """Attention of queries that are the last positions of the keys' sequence.

    Args:
        q_SBHK: [Sq, B, H, K].
        k_SBGK: [Sk, B, G, K]; Sk >= Sq; H a multiple of G.
        v_SBGV: [Sk, B, G, V]; V at most K.
        window: positions that a query looks back, itself included; None is all.
        scale: of queries times keys; None is one over the root of K.
        sinks_H: [H] a logit of each head beside those of the keys, whose value is 0; None for none.

    Returns:
        [Sq, B, H, V].
    """
    num_q, num_k, width = q_SBHK.shape[0], k_SBGK.shape[0], v_SBGV.shape[-1]
    if window is not None and window >= num_k:
        window = None
    if sinks_H is not None:
        scale = q_SBHK.shape[-1] ** -0.5 if scale is None else scale
        q_SBHK, k_SBGK, v_SBGV = _with_sink(q_SBHK, k_SBGK, v_SBGV, sinks_H / scale)
    if _half(q_SBHK) and q_SBHK.shape[-1] != v_SBGV.shape[-1]:  # the fast kernels want values as wide as keys
        v_SBGV = F.pad(v_SBGV, (0, q_SBHK.shape[-1] - v_SBGV.shape[-1]))
    if window is None and _cudnn_fits(q_SBHK, k_SBGK):
        return _cudnn(q_SBHK, k_SBGK, v_SBGV, scale)[..., :width]
    if _flash_fits(q_SBHK) and (window is None or sinks_H is None):
        return _flash(q_SBHK, k_SBGK, v_SBGV, window, scale)[..., :width]
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q_SBHK, k_SBGK, v_SBGV))
    gqa = q.shape[1] != k.shape[1]
    if window is None and num_q == k_SBGK.shape[0]:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa, scale=scale)
    else:
        mask = _mask(num_q, num_k, window, q.device)
        mask = mask if sinks_H is None else F.pad(mask, (1, 0), value=True)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=gqa, scale=scale)
    return out.permute(2, 0, 1, 3)[..., :width]


def _mask(num_q: int, num_k: int, window: int | None, device: torch.device) -> Tensor:
    """[Sq, Sk] which keys each query sees."""
    query = torch.arange(num_k - num_q, num_k, device=device).unsqueeze(1)
    key = torch.arange(num_k, device=device)
    return key <= query if window is None else (key <= query) & (key > query - window)


def _with_sink(q: Tensor, k: Tensor, v: Tensor, sinks_H: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Put a key before the first one whose product with each head's queries is the head's sink, with a value of 0.

    One more element of a head does it: the sink in queries, 1 in that key and 0 in all others. So sinks need no kernel of
    their own, and have their gradient.
    """
    more = 8 - q.shape[-1] % 8  # the fast kernels want heads of whole eights
    sink = sinks_H.to(q.dtype)[None, None, :, None].expand(*q.shape[:3], 1)
    q = torch.cat([q, sink, q.new_zeros(*q.shape[:3], more - 1)], dim=-1)
    first = k.new_zeros(1, *k.shape[1:3], k.shape[-1] + more)
    first[..., k.shape[-1]] = 1
    return q, torch.cat([first, F.pad(k, (0, more))]), F.pad(v, (0, 0, 0, 0, 0, 0, 1, 0))
