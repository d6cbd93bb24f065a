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

from runtime.ops.documents import Packed

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


def _flash_packed(
    q: Tensor, k: Tensor, v: Tensor, packed: Packed, window: int | None, scale: float | None, sink: int | None
) -> Tensor:
    """Each document is a sequence of its own; tiles of pairs from two of them aren't computed.

    Args:
        q: [Sq, B, H, K].
        k: [Sk, B, G, K].
        v: [Sk, B, G, K].
        packed: the documents.
        window: as for `attend`.
        scale: as for `attend`.
        sink: element of a key that is 1 in the sink's, which each document gets; None: there is no sink.
    """
    positions, rows = q.shape[:2]
    q, k, v = (x.transpose(0, 1).flatten(0, 1) for x in (q, k, v))
    bounds = packed.bounds()
    if sink is not None:
        places = packed.sink_places()
        bounds, num_keys = places.bounds, len(k) + len(places.sinks)
        k, v = (x.new_zeros(num_keys, *x.shape[1:]).index_copy(0, places.keys, x) for x in (k, v))
        k[..., sink].index_fill_(0, places.sinks, 1)
    options: dict[str, Any] = {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}
    options |= {} if scale is None else {"scale": scale}
    sizes = (bounds.queries, bounds.keys, bounds.most_queries, bounds.most_keys)
    result = torch.ops.aten._flash_attention_forward(q, k, v, *sizes, 0.0, True, False, **options)
    out: Tensor = result[0]
    return out.view(rows, positions, *out.shape[1:]).transpose(0, 1)


def attend(
    q_SBHK: Tensor,
    k_SBGK: Tensor,
    v_SBGV: Tensor,
    window: int | None,
    *,
    scale: float | None = None,
    sinks_H: Tensor | None = None,
    packed: Packed | None = None,
) -> Tensor:
    """Attention of queries that are the last positions of the keys' sequence.

    Args:
        q_SBHK: [Sq, B, H, K].
        k_SBGK: [Sk, B, G, K]; Sk >= Sq; H a multiple of G.
        v_SBGV: [Sk, B, G, V]; V at most K.
        window: positions that a query looks back, itself included; None is all.
        scale: of queries times keys; None is one over the root of K.
        sinks_H: [H] a logit of each head beside those of the keys, whose value is 0; None for none.
        packed: the documents that the rows hold, which don't see each other; None: a row is one.

    Returns:
        [Sq, B, H, V].
    """
    num_q, num_k, width, dim = q_SBHK.shape[0], k_SBGK.shape[0], v_SBGV.shape[-1], q_SBHK.shape[-1]
    if window is not None and window >= num_k:
        window = None
    if sinks_H is not None:
        scale = dim**-0.5 if scale is None else scale
        q_SBHK, k_SBGK = _widened(q_SBHK, k_SBGK, sinks_H / scale)
    if _half(q_SBHK) and q_SBHK.shape[-1] != v_SBGV.shape[-1]:  # the fast kernels want values as wide as keys
        v_SBGV = F.pad(v_SBGV, (0, q_SBHK.shape[-1] - v_SBGV.shape[-1]))
    flash = _flash_fits(q_SBHK) and (window is None or sinks_H is None)
    if flash and packed is not None:
        sink = None if sinks_H is None else dim
        return _flash_packed(q_SBHK, k_SBGK, v_SBGV, packed, window, scale, sink)[..., :width]
    if sinks_H is not None:
        k_SBGK, v_SBGV = _with_sink(k_SBGK, v_SBGV, dim)
    if window is None and packed is None and _cudnn_fits(q_SBHK, k_SBGK):
        return _cudnn(q_SBHK, k_SBGK, v_SBGV, scale)[..., :width]
    if flash:
        return _flash(q_SBHK, k_SBGK, v_SBGV, window, scale)[..., :width]
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q_SBHK, k_SBGK, v_SBGV))
    gqa = q.shape[1] != k.shape[1]
    if window is None and packed is None and num_q == k_SBGK.shape[0]:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa, scale=scale)
    else:
        mask = _mask(num_q, num_k, window, q.device) if packed is None else packed.mask(window)
        mask = mask if sinks_H is None else F.pad(mask, (1, 0), value=True)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=gqa, scale=scale)
    return out.permute(2, 0, 1, 3)[..., :width]


def _mask(num_q: int, num_k: int, window: int | None, device: torch.device) -> Tensor:
    """[Sq, Sk] which keys each query sees."""
    query = torch.arange(num_k - num_q, num_k, device=device).unsqueeze(1)
    key = torch.arange(num_k, device=device)
    return key <= query if window is None else (key <= query) & (key > query - window)


def _widened(q: Tensor, k: Tensor, sinks_H: Tensor) -> tuple[Tensor, Tensor]:
    """Make room for a key whose product with each head's queries is the head's sink.

    One more element of a head does it: the sink in queries, 1 in that key and 0 in all others. So sinks need no kernel of
    their own, and have their gradient.
    """
    more = 8 - q.shape[-1] % 8  # the fast kernels want heads of whole eights
    sink = sinks_H.to(q.dtype)[None, None, :, None].expand(*q.shape[:3], 1)
    return torch.cat([q, sink, q.new_zeros(*q.shape[:3], more - 1)], dim=-1), F.pad(k, (0, more))


def _with_sink(k: Tensor, v: Tensor, sink: int) -> tuple[Tensor, Tensor]:
    """Put the sink's key, with a value of 0, before the first one."""
    first = k.new_zeros(1, *k.shape[1:])
    first[..., sink] = 1
    return torch.cat([first, k]), F.pad(v, (0, 0, 0, 0, 0, 0, 1, 0))
