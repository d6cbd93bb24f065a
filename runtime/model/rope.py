"""Rotary positions: frequencies of every kind, and tables for the positions of a rank.

Legend: S positions, R elements of a head that are turned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from moeconv.families.rope import Rope
from runtime.model.context import ModelContext
from runtime.model.ends import take_positions
from runtime.ops.context_attention import local_positions


def frequencies(rope: Rope, num_positions: int, max_positions: int) -> tuple[Tensor, float]:
    """Give the angle that each pair of elements turns by from one position to the next.

    Args:
        rope: the kind of positions and its parameters.
        num_positions: length of the sequences; some kinds depend on it.
        max_positions: positions that the model was made for.

    Returns:
        [R / 2] fp32 on the CPU, and a factor on cosines and sines.

    Source: https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/modeling_rope_utils.py
    """
    return _KINDS[rope.kind](rope, num_positions, max_positions)


def _inverse(base: float, dim: int) -> Tensor:
    # On the CPU in fp32, as transformers does: a GPU's pow would round otherwise.
    return 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim))


def _default(rope: Rope, num_positions: int, max_positions: int) -> tuple[Tensor, float]:
    return _inverse(rope.theta, rope.dim), 1.0


def _linear(rope: Rope, num_positions: int, max_positions: int) -> tuple[Tensor, float]:
    return _inverse(rope.theta, rope.dim) / rope.parameters["factor"], 1.0


def _dynamic(rope: Rope, num_positions: int, max_positions: int) -> tuple[Tensor, float]:
    factor, length = rope.parameters["factor"], max(num_positions, max_positions)
    growth = (factor * length / max_positions) - (factor - 1)
    return _inverse(rope.theta * growth ** (rope.dim / (rope.dim - 2)), rope.dim), 1.0


def _alpha(rope: Rope, num_positions: int, max_positions: int) -> tuple[Tensor, float]:
    return _inverse(rope.theta * rope.parameters["alpha"] ** (rope.dim / (rope.dim - 2)), rope.dim), 1.0


def _llama3(rope: Rope, num_positions: int, max_positions: int) -> tuple[Tensor, float]:
    values = rope.parameters
    factor, low, high = values["factor"], values["low_freq_factor"], values["high_freq_factor"]
    original = values["original_max_position_embeddings"]
    plain = _inverse(rope.theta, rope.dim)
    length = 2 * math.pi / plain
    slow = torch.where(length > original / low, plain / factor, plain)
    smooth = (original / length - low) / (high - low)
    between = (1 - smooth) * slow / factor + smooth * slow
    medium = ~(length < original / high) * ~(length > original / low)
    return torch.where(medium, between, slow), 1.0


def _magnitude(scale: float, weight: float = 1.0) -> float:
    return 1.0 if scale <= 1 else 0.1 * weight * math.log(scale) + 1.0


def _yarn(rope: Rope, num_positions: int, max_positions: int) -> tuple[Tensor, float]:
    values, dim = rope.parameters, rope.dim
    original = values["original_max_position_embeddings"]
    factor = values.get("factor") or max_positions / original
    attention = values.get("attention_factor")
    if attention is None:
        one, all_dim = values.get("mscale"), values.get("mscale_all_dim")
        attention = _magnitude(factor, one) / _magnitude(factor, all_dim) if one and all_dim else _magnitude(factor)

    def dim_of(turns: float) -> float:
        return (dim * math.log(original / (turns * 2 * math.pi))) / (2 * math.log(rope.theta))

    low, high = dim_of(values.get("beta_fast") or 32), dim_of(values.get("beta_slow") or 1)
    if values.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high += 0.001 if low == high else 0
    kept = 1 - ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    powers = rope.theta ** (torch.arange(0, dim, 2).float() / dim)
    return 1.0 / (factor * powers) * (1 - kept) + 1.0 / powers * kept, float(attention)


def _longrope(rope: Rope, num_positions: int, max_positions: int) -> tuple[Tensor, float]:
    values = rope.parameters
    original = values["original_max_position_embeddings"]
    factor, attention = values.get("factor") or max_positions / original, values.get("attention_factor")
    if attention is None:
        attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    length = "long" if num_positions > original else "short"
    if f"{length}_mscale" in values:
        # As transformers computes Phi-MoE: the factor follows the length, the frequencies don't.
        attention, length = values[f"{length}_mscale"], "short"
    factors = torch.tensor(values[f"{length}_factor"], dtype=torch.float32)
    exponents = torch.arange(0, rope.dim, 2, dtype=torch.int64).float() / rope.dim
    return 1.0 / (factors * rope.theta**exponents), float(attention)


_KINDS: Mapping[str, Callable[[Rope, int, int], tuple[Tensor, float]]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "alpha": _alpha,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}


class Rotary(nn.Module):
    """Cosines and sines of the positions that this rank holds; computed once for each sequence length."""

    def __init__(self, context: ModelContext) -> None:
        super().__init__()
        self._context = context
        self._tables: dict[tuple[int, int, bool], tuple[Tensor, Tensor]] = {}

    def forward(self, num_positions: int, position_ids_BS: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Give the tables of a sequence.

        Args:
            num_positions: length of the whole sequence.
            position_ids_BS: [B, S] positions of whole sequences, from 0 in each document; None: 0 to S - 1 in each row.

        Returns:
            Two tables in the compute dtype: [S / cp, R], or [S / cp, B, R] where rows have positions of their own.
        """
        if position_ids_BS is None:
            return self._table(num_positions, num_positions, mine=True)
        positions_SB = take_positions(position_ids_BS, self._context)
        tables = [table[positions_SB] for table in self._table(num_positions, num_positions, mine=False)]
        original = self.changes_at()
        if original is not None and original < num_positions:
            short_SB1 = take_positions(document_lengths(position_ids_BS), self._context).unsqueeze(-1) <= original
            shorts = self._table(num_positions, original, mine=False)
            tables = [short[positions_SB].where(short_SB1, long) for short, long in zip(shorts, tables, strict=True)]
        if positions_SB.shape[1] == 1:
            tables = [table.squeeze(1) for table in tables]
        return tables[0], tables[1]

    def behind(self, begin: int, num_positions: int, length: int) -> tuple[Tensor, Tensor]:
        """Give the tables of positions behind others.

        Args:
            begin: the first one.
            num_positions: S.
            length: of the sequence, as far as it goes now; some kinds of positions depend on it.

        Returns:
            Two tables [S, R] in the compute dtype.
        """
        return self._turned(torch.arange(begin, begin + num_positions), length)

    def changes_at(self) -> int | None:
        """The length of a sequence beyond which its positions turn otherwise; None where length changes nothing."""
        rope = self._context.model.compute.rope
        return int(rope.parameters["original_max_position_embeddings"]) if rope.kind == "longrope" else None

    def _table(self, num_positions: int, length: int, *, mine: bool) -> tuple[Tensor, Tensor]:
        """Tables of positions 0 to `num_positions` as sequences of a length have them: this rank's rows, or all."""
        if (num_positions, length, mine) not in self._tables:
            mesh = self._context.mesh
            rank, size = (mesh.rank("cp"), mesh.size("cp")) if mine else (0, 1)
            positions = local_positions(num_positions, rank, size, torch.device("cpu"))
            self._tables[num_positions, length, mine] = self._turned(positions, length)
        return self._tables[num_positions, length, mine]

    def _turned(self, positions_S: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Tables [S, R] of positions, on the CPU, as sequences of a length have them."""
        context, compute = self._context, self._context.model.compute
        per_position, factor = frequencies(compute.rope, length, compute.max_positions)
        angles = torch.outer(positions_S.float(), per_position).repeat(1, 2)
        cos, sin = ((table * factor).to(context.device, context.dtype) for table in (angles.cos(), angles.sin()))
        return cos, sin


def document_lengths(position_ids_BS: Tensor) -> Tensor:
    """Give the length of the document that each position is in.

    Args:
        position_ids_BS: [B, S] from 0 in each document.

    Returns:
        [B, S] int64.
    """
    places_S = torch.arange(position_ids_BS.shape[1], device=position_ids_BS.device)
    last_BS = torch.ones_like(position_ids_BS, dtype=torch.bool)
    last_BS[:, :-1] = position_ids_BS[:, 1:] != position_ids_BS[:, :-1] + 1
    ends_BS = torch.where(last_BS, places_S, places_S[-1]).flip(1).cummin(1).values.flip(1)
    return position_ids_BS.gather(1, ends_BS) + 1
