"""Causal attention on one device, by the fastest kernels that know the case.

Legend: Sq queries, Sk keys, B sequences, H query heads, G key/value heads, K head dim.

torch chooses among its kernels by itself, and not always alike: whether cuDNN's come first depends on the version of
the library that the process happens to have loaded. On Hopper they take about half of the time of its flash kernels, so
the choice is made here. Windows and documents get cuDNN's by way of Transformer Engine, where it is installed.
"""

from __future__ import annotations

import functools
import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor

from runtime.ops.attention_kernels import Cudnn, Flash
from runtime.ops.documents import Packed
from runtime.ops.joined_attention import Parts, attend_in_parts
from runtime.ops.te_attention import TransformerEngine, transformer_engine

_CUDNN_ANY_LENGTH = 91501
"""From this version on, sequences needn't be multiples of 128 (torch's own condition)."""
_CUDNN_WIDE = 91900
"""From this version on heads wider than 128, and values narrower than keys, are known to be right on Hopper."""
_PREFIX = 128
"""Queries from which on keys before the first of them are worth a kernel of their own."""


@functools.cache
def _processor(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]


def _half(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)


def _suits_cudnn(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether cuDNN's kernels are the faster ones: on Hopper and Blackwell."""
    return _half(device, dtype) and _processor(device) in (9, 10)


def _cudnn_fits(q: Tensor, k: Tensor, v: Tensor) -> bool:
    if not _suits_cudnn(q.device, q.dtype) or not torch.backends.cudnn.is_available():  # type: ignore[no-untyped-call]
        return False
    version: int = torch.backends.cudnn.version() or 0  # type: ignore[no-untyped-call]
    (num_q, *_, width), value_width = q.shape, v.shape[-1]
    wide = version >= _CUDNN_WIDE and _processor(q.device) == 9 and width <= 256
    known_width = (wide or value_width == width <= 128) and width % 8 == value_width % 8 == 0
    known_length = version >= _CUDNN_ANY_LENGTH or num_q % 128 == len(k) % 128 == 0
    return known_width and known_length and (num_q == len(k) > 1 or num_q >= _PREFIX)


def _flash_fits(q: Tensor) -> bool:
    return _half(q.device, q.dtype) and _processor(q.device) >= 8 and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256


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
    if window is not None and window >= k_SBGK.shape[0]:
        window = None
    width, plain = v_SBGV.shape[-1], window is None and packed is None
    if _cudnn_fits(q_SBHK, k_SBGK, v_SBGV):
        if plain:
            return attend_in_parts(q_SBHK, k_SBGK, v_SBGV, sinks_H, _cudnn_parts(len(q_SBHK), len(k_SBGK), scale))
        functions = transformer_engine() if len(q_SBHK) == len(k_SBGK) else None
        if functions is not None:
            engine = TransformerEngine(functions, scale, window, None if packed is None else packed.bounds())
            return attend_in_parts(q_SBHK, k_SBGK, v_SBGV, sinks_H, [(engine, len(k_SBGK))])
    if _flash_fits(q_SBHK):
        if width < q_SBHK.shape[-1]:
            v_SBGV = F.pad(v_SBGV, (0, q_SBHK.shape[-1] - width))
        flash = Flash(scale, window, None if packed is None else packed.bounds())
        return attend_in_parts(q_SBHK, k_SBGK, v_SBGV, sinks_H, [(flash, len(k_SBGK))])[..., :width]
    return attend_by_torch(q_SBHK, k_SBGK, v_SBGV, window, scale=scale, sinks_H=sinks_H, packed=packed)


def attend_by_torch(
    q_SBHK: Tensor,
    k_SBGK: Tensor,
    v_SBGV: Tensor,
    window: int | None,
    *,
    scale: float | None = None,
    sinks_H: Tensor | None = None,
    packed: Packed | None = None,
) -> Tensor:
    """Attention by torch's choice of a kernel, with a mask of all pairs where a row isn't just causal.

    Args and Returns are as of `attend`.
    """
    if sinks_H is not None:
        return _with_sinks(q_SBHK, k_SBGK, v_SBGV, window, scale, sinks_H, packed)
    causal = window is None and packed is None and len(q_SBHK) == len(k_SBGK)
    return _plain(q_SBHK, k_SBGK, v_SBGV, None if causal else _mask(q_SBHK, k_SBGK, window, packed), scale)


def describe_attention(device: torch.device, dtype: torch.dtype, *, windows: bool, documents: bool) -> list[str]:
    """Give a line for the log where a faster kernel than torch's is a matter of installation: none elsewhere.

    Args:
        device: where attention is computed.
        dtype: of queries, keys and values.
        windows: whether layers have some.
        documents: whether rows hold several.
    """
    kinds = [name for name, there in (("windows", windows), ("documents", documents)) if there]
    if not kinds or not _suits_cudnn(device, dtype):
        return []
    line = f"attention with {' and '.join(kinds)}: "
    if importlib.util.find_spec("transformer_engine") is None:
        return [line + "torch's flash kernels; Transformer Engine's are faster: pip install 'moeconv[gpu]'"]
    return [line + "Transformer Engine's kernels, if they find what torch's find"]


def _cudnn_parts(num_q: int, num_k: int, scale: float | None) -> Parts:
    """cuDNN's causal attention is square: what comes before the queries is a part of its own, of which all see all."""
    square = Cudnn(causal=True, scale=scale), num_q
    return [square] if num_q == num_k else [(Cudnn(causal=False, scale=scale), num_k - num_q), square]


def _plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """torch's choice of kernel; without a mask square and causal."""
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
    gqa, causal = q.shape[1] != k.shape[1], mask is None
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=gqa, scale=scale)
    return out.permute(2, 0, 1, 3)


def _mask(q: Tensor, k: Tensor, window: int | None, packed: Packed | None) -> Tensor:
    """[Sq, Sk], or [B, 1, Sq, Sk] with documents: which keys each query sees."""
    if packed is not None:
        return packed.mask(window)
    key = torch.arange(len(k), device=q.device)
    query = key[len(k) - len(q) :].unsqueeze(1)
    return key <= query if window is None else (key <= query) & (key > query - window)


def _with_sinks(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float | None, sinks_H: Tensor, packed: Packed | None
) -> Tensor:
    """Where no fast kernel is: the sink is the product of each head's queries with a key before the first one, whose value is 0.

    One more element of a head does it: the sink in queries, 1 in that key and 0 in all others.
    """
    dim = q.shape[-1]
    scale = dim**-0.5 if scale is None else scale
    more = 7 - dim % 8  # zeros behind it: torch's kernels want heads of whole eights
    sink = F.pad((sinks_H / scale).to(q.dtype)[None, None, :, None], (0, more)).expand(*q.shape[:3], 1 + more)
    first = F.pad(k.new_ones(1, *k.shape[1:3], 1), (dim, more))
    mask = F.pad(_mask(q, k, window, packed), (1, 0), value=True)
    keys = torch.cat([first, F.pad(k, (0, 1 + more))])
    return _plain(torch.cat([q, sink], dim=-1), keys, F.pad(v, (0, 0, 0, 0, 0, 0, 1, 0)), mask, scale)
