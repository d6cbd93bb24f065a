"""The names of Megatron-Core's tensors on disk: by format, layer spec and expert implementation.

Source: https://github.com/NVIDIA/Megatron-LM/tree/d98e8a64/megatron/core/models/gpt/gpt_layer_specs.py (specs, and the
renaming of sharded keys), .../transformer/moe/experts.py and .../transformer/transformer_block.py (prefixes).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from moeconv.megatron.tensors import MegatronTensor

Spec = Literal["te", "local"]
Experts = Literal["grouped", "sequential"]
EXTRA_STATE = "_extra_state"

# Tensors named alike everywhere; those of a layer follow `decoder.layers.{layer}.`.
TOP = {
    "embedding": "embedding.word_embeddings.weight",
    "final_norm": "decoder.final_layernorm.weight",
    "output": "output_layer.weight",
}
_COMMON = {
    "qkv": "self_attention.linear_qkv.weight",
    "qkv_bias": "self_attention.linear_qkv.bias",
    "proj": "self_attention.linear_proj.weight",
    "q_layernorm": "self_attention.q_layernorm.weight",
    "k_layernorm": "self_attention.k_layernorm.weight",
    "router": "mlp.router.weight",
    "router_bias": "mlp.router.expert_bias",
    "fc1": "mlp.linear_fc1.weight",
    "fc2": "mlp.linear_fc2.weight",
    "shared_fc1": "mlp.shared_experts.linear_fc1.weight",
    "shared_fc2": "mlp.shared_experts.linear_fc2.weight",
    "shared_gate": "mlp.shared_experts.gate_weight",
}
_FUSED_INPUT_NORM = "self_attention.linear_qkv.layer_norm_weight"
_FUSED_MLP_NORM = "mlp.linear_fc1.layer_norm_weight"
_MLP_NORM = "pre_mlp_layernorm.weight"
LAYERS = "decoder.layers."


@dataclass(frozen=True, slots=True)
class Found:
    """What a stored name means: the kind of tensor, its layer (local to the file) and expert, or None where stacked."""

    kind: str
    layer: int | None = None
    expert: int | None = None


def rank_name(tensor: MegatronTensor, spec: Spec, experts: Experts, layer: int | None, expert: int | None) -> str:
    """Name a tensor in a rank's state dict, as the `torch` format stores it.

    Args:
        tensor: the tensor.
        spec: the layer spec; Transformer Engine fuses norms into the linear layer that follows.
        experts: SequentialMLP or TEGroupedMLP.
        layer: its number within the rank's model chunk.
        expert: its number within the rank.

    Returns:
        The name.
    """
    if tensor.kind in TOP:
        return TOP[tensor.kind]
    prefix, kind = f"{LAYERS}{layer}.", tensor.kind
    if kind in _COMMON:
        return prefix + _COMMON[kind]
    if kind == "input_norm":
        return prefix + (_FUSED_INPUT_NORM if spec == "te" else "input_layernorm.weight")
    if kind == "mlp_norm":
        return prefix + _MLP_NORM
    if kind == "dense_mlp_norm":
        return prefix + (_FUSED_MLP_NORM if spec == "te" else _MLP_NORM)
    linear = "linear_fc" + kind[-1]
    if experts == "grouped":
        return f"{prefix}mlp.experts.{linear}.weight{expert}"
    return f"{prefix}mlp.experts.local_experts.{expert}.{linear}.weight"


def dist_key(tensor: MegatronTensor, spec: Spec, *, by_layer: bool = False) -> str:
    """Give the key of a tensor in a `torch_dist` checkpoint, where layers and experts are stacked.

    Args:
        tensor: the tensor.
        spec: the layer spec. Both name the input norm alike, but the local one keeps its fused name for the MLP's norm
            even where the MLP is a mixture of experts, so that each spec's checkpoints need the same spec to load.
        by_layer: each layer has keys of its own, and only experts are stacked.

    Returns:
        The key.
    """
    if tensor.kind in TOP:
        return TOP[tensor.kind]
    prefix = f"{LAYERS}{tensor.layer}." if by_layer else LAYERS
    if tensor.kind in _COMMON:
        return prefix + _COMMON[tensor.kind]
    if tensor.kind == "input_norm":
        return prefix + _FUSED_INPUT_NORM
    if tensor.kind == "mlp_norm":
        return prefix + (_MLP_NORM if spec == "te" else _FUSED_MLP_NORM)
    if tensor.kind == "dense_mlp_norm":
        return prefix + _FUSED_MLP_NORM
    return f"{prefix}mlp.experts.experts.linear_fc{tensor.kind[-1]}.weight"


_NORMS = {"input_layernorm.weight": "input_norm", _FUSED_INPUT_NORM: "input_norm"}
_NORMS |= {_MLP_NORM: "mlp_norm", _FUSED_MLP_NORM: "mlp_norm"}
_PLAIN = {name: kind for kind, name in _COMMON.items()} | _NORMS
_IN_LAYER = re.compile(r"decoder\.layers\.(?:(?P<layer>\d{1,9})\.)?(?P<rest>.+)")
_EXPERT = [
    re.compile(r"mlp\.experts\.local_experts\.(?P<expert>\d{1,9})\.linear_fc(?P<fc>[12])\.weight"),
    re.compile(r"mlp\.experts\.linear_fc(?P<fc>[12])\.weight(?P<expert>\d{1,9})"),
    re.compile(r"mlp\.experts\.experts\.(?:(?P<expert>\d{1,9})\.)?linear_fc(?P<fc>[12])\.weight(?P<half>_[wv])?"),
]


def parse(name: Any) -> Found | None:
    """Find what a name of either format, any spec and any expert implementation means.

    Args:
        name: a key of a rank's state dict or of a `torch_dist` checkpoint.

    Returns:
        Its meaning. `expert_fc1_w` and `expert_fc1_v` are the halves that `singleton_local_shards` stores apart;
        `old_fc1` and `old_fc2` the tensors of the GroupedMLP that Megatron-Core had before v0.17. None where the name
        is none of Megatron's GPT model.
    """
    if not isinstance(name, str):
        return None
    for kind, top in TOP.items():
        if name == top:
            return Found(kind)
    inside = _IN_LAYER.fullmatch(name)
    if inside is None:
        return None
    layer = int(inside["layer"]) if inside["layer"] is not None else None
    rest = inside["rest"]
    if rest in _PLAIN:
        return Found(_PLAIN[rest], layer)
    if rest in ("mlp.experts.weight1", "mlp.experts.weight2"):
        return Found("old_fc" + rest[-1], layer)
    for pattern in _EXPERT:
        found = pattern.fullmatch(rest)
        if found is not None:
            groups = found.groupdict()
            expert = int(groups["expert"]) if groups["expert"] is not None else None
            return Found(f"expert_fc{groups['fc']}{groups.get('half') or ''}", layer, expert)
    return None


def rank_extra_states(kinds: set[str], spec: Spec, experts: Experts, layer: int, num_experts: int) -> list[str]:
    """Name the `_extra_state` entries of a layer in a rank's state dict.

    Args:
        kinds: the kinds of tensors that the layer has.
        spec: the layer spec.
        experts: the expert implementation.
        layer: the layer's number within the rank's model chunk.
        num_experts: experts that the rank holds.

    Returns:
        The names. Megatron's local layers accept None for them, Transformer Engine's an empty byte tensor.
    """
    names = _extra_modules(kinds, spec)
    names += ["self_attention.core_attention"] if spec == "te" else []
    for linear in ("linear_fc1", "linear_fc2") if "router" in kinds else ():
        if experts == "grouped":
            names.append(f"mlp.experts.{linear}")
        else:
            names += [f"mlp.experts.local_experts.{e}.{linear}" for e in range(num_experts)]
    return [f"{LAYERS}{layer}.{name}.{EXTRA_STATE}" for name in names]


def _extra_modules(kinds: set[str], spec: Spec) -> list[str]:
    """Name the modules of a layer, but for its experts, that have an extra state: linear ones, and Transformer Engine's norms."""
    names = ["self_attention.linear_proj", "self_attention.linear_qkv"]
    if spec == "te":
        names += ["pre_mlp_layernorm"] if "router" in kinds else []
        names += [f"self_attention.{n}_layernorm" for n in "qk" if f"{n}_layernorm" in kinds]
    names += ["mlp.linear_fc1", "mlp.linear_fc2"] if "fc1" in kinds else []
    return names + (["mlp.shared_experts.linear_fc1", "mlp.shared_experts.linear_fc2"] if "shared_fc1" in kinds else [])


def dist_extra_states(
    kinds: list[set[str]], spec: Spec, num_experts: int, *, by_layer: bool = False
) -> list[tuple[str, int, int]]:
    """Name the byte objects that a `torch_dist` checkpoint holds for the model's `_extra_state` entries.

    Args:
        kinds: for each layer of the whole model the kinds of tensors that it has.
        spec: the layer spec.
        num_experts: experts of a layer.
        by_layer: as for `dist_key`.

    Returns:
        For each its key, its layer and its expert, both 0 where it has none.
    """
    out = []
    for layer, held in enumerate(kinds):
        prefix = f"{LAYERS}{layer}." if by_layer else LAYERS
        at, of = ("", "") if by_layer else (f"{layer}.", f"{len(kinds)}.")
        alone = "shard_0_1" if by_layer else f"shard_{layer}_{len(kinds)}"
        for name in _extra_modules(held, spec):
            out.append((f"{prefix}{name}.{EXTRA_STATE}/{alone}", layer, 0))
        for expert in range(num_experts if "router" in held else 0):
            where = f"shard_{at}{expert}_{of}{num_experts}"
            for linear in ("linear_fc1", "linear_fc2"):
                out.append((f"{prefix}mlp.experts.experts.{linear}.{EXTRA_STATE}/{where}", layer, expert))
    if spec == "te":
        out.append((f"decoder.final_layernorm.{EXTRA_STATE}/shard_0_1", len(kinds) - 1, 0))
    return out
