"""What a checkpoint is, in numbers: sizes, parameters, layout, and the rectangles of a rank."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import msgspec

from moeconv.checkpoint import Checkpoint
from moeconv.dtypes import dtype
from moeconv.errors import LayoutError
from moeconv.families.key_states import unknown_keys
from moeconv.placement import Placement, split_optimizer_name


@dataclass(frozen=True, slots=True)
class RankTensor:
    """A tensor of a rank: hub name, dtype, the rank's rectangle, its bytes."""

    name: str
    dtype: str
    rect: str
    nbytes: int


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """Describe a checkpoint.

    Args:
        checkpoint: the opened checkpoint.

    Returns:
        JSON values: family, sizes, dtypes, parameters (total and active for one token), bytes, layout, bytes of each kind of rank.
    """
    model = checkpoint.model
    stored = [model.tensors[n] for n in checkpoint.tensors if split_optimizer_name(n)[0] is None]
    total = sum(t.parameters for t in stored)
    experts, top_k = model.sizes.get("experts", 0), model.sizes.get("top_k", 0)
    in_experts = sum(t.parameters for t in stored if t.expert is not None)
    out: dict[str, Any] = {
        "path": str(checkpoint.root),
        "kind": checkpoint.title,
        "family": model.family.name,
        "sizes": dict(model.sizes),
        "tied_embeddings": model.flags.get("tied", False),
        "dtypes": sorted({checkpoint.tensors[t.name].dtype for t in stored}),
        "tensors": len(stored),
        "parameters": total,
        "active_parameters": total - in_experts + (in_experts * top_k // experts if experts else 0),
        "bytes": sum(info.nbytes for info in checkpoint.tensors.values()),
        "files": len(checkpoint.files),
        "quantised": {"as": model.scheme.name, "weights": len(model.quantised)}
        if model.quantised and model.scheme
        else None,
        "carried_tensors": len(model.carried),
        "unread_config_keys": unknown_keys(model.family, checkpoint.config),
        "optimizer_state": len(stored) < len(checkpoint.tensors),
    }
    if checkpoint.adapter is not None:
        out["adapter"] = msgspec.to_builtins(checkpoint.adapter)
    if checkpoint.manifest is not None:
        out["degrees"] = checkpoint.manifest.degrees
        out["stages"] = checkpoint.manifest.stages
        out["rank_bytes"] = rank_bytes(checkpoint)
    return out


def rank_bytes(checkpoint: Checkpoint) -> list[dict[str, int]]:
    """Give the bytes of weights that ranks hold in memory: one row for each stage, first and last tensor rank and expert rank told apart.

    Args:
        checkpoint: a sharded checkpoint.

    Returns:
        For each coordinate (pp, tp, ep) its weights in bytes, at most 64 rows.
    """
    degrees = checkpoint.degrees
    rows: list[dict[str, int]] = []
    for pp in range(degrees.pp):
        for tp in range(degrees.tp):
            for ep in range(degrees.ep):
                if len(rows) < 64:
                    nbytes = sum(t.nbytes for t in rank_tensors(checkpoint, {"pp": pp, "tp": tp, "ep": ep}))
                    rows.append({"pp": pp, "tp": tp, "ep": ep, "bytes": nbytes})
    return rows


def rank_tensors(checkpoint: Checkpoint, coordinates: dict[str, int], pattern: str = "*") -> list[RankTensor]:
    """List the rectangles that one rank holds.

    Args:
        checkpoint: a sharded checkpoint, or a Hugging Face folder (one rank).
        coordinates: the rank's place, by axis (tp, pp, ep, etp); axes left out are 0.
        pattern: a shell-style pattern that names must match.

    Returns:
        The rank's tensors in the order of the model.

    Raises:
        LayoutError: an axis is unknown, or a coordinate is outside its degree.
    """
    unknown = sorted(set(coordinates) - {"tp", "pp", "ep", "etp"})
    if unknown:
        raise LayoutError(f"rank axis {unknown[0]!r} is unknown; axes are tp, pp, ep, etp")
    placement = Placement(checkpoint.model, checkpoint.degrees)
    out = []
    for tensor, rect in placement.held(**coordinates):
        info = checkpoint.tensors.get(tensor.name)
        if info is not None and fnmatchcase(tensor.name, pattern):
            out.append(RankTensor(tensor.name, info.dtype, str(rect), rect.size * dtype(info.dtype).itemsize))
    return out
