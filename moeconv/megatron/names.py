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
_INPUT_NORM, _MLP_NORM = "input_layernorm.weight", "pre_mlp_layernorm.weight"
_FUSED_INPUT_NORM = "self_attention.linear_qkv.layer_norm_weight"
_FUSED_MLP_NORM = "mlp.linear_fc1.layer_norm_weight"
_Q_NORM, _FUSED_Q_NORM = "self_attention.q_layernorm.weight", "self_attention.linear_q_up_proj.layer_norm_weight"
_KV_NORM, _FUSED_KV_NORM = "self_attention.kv_layernorm.weight", "self_attention.linear_kv_up_proj.layer_norm_weight"
# What a kind's tensor is called in a layer: in a rank's state dict with Transformer Engine's and with local layers, then in torch_dist.
# Around latent attention (`latent_`) norms keep their own names, and only Transformer Engine fuses some.
_NAMES: dict[str, tuple[str, str, str, str]] = {
    **{
        kind: (name, name, name, name)
        for kind, name in {
            "qkv": "self_attention.linear_qkv.weight",
            "qkv_bias": "self_attention.linear_qkv.bias",
            "q_whole": "self_attention.linear_q_proj.weight",
            "q_down": "self_attention.linear_q_down_proj.weight",
            "q_up": "self_attention.linear_q_up_proj.weight",
            "kv_down": "self_attention.linear_kv_down_proj.weight",
            "kv_up": "self_attention.linear_kv_up_proj.weight",
            "proj": "self_attention.linear_proj.weight",
            "proj_bias": "self_attention.linear_proj.bias",
            "sinks": "self_attention.core_attention.softmax_offset",
            "q_layernorm": _Q_NORM,
            "k_layernorm": "self_attention.k_layernorm.weight",
            "router": "mlp.router.weight",
            "router_linear_bias": "mlp.router.bias",
            "router_bias": "mlp.router.expert_bias",
            "fc1": "mlp.linear_fc1.weight",
            "fc1_bias": "mlp.linear_fc1.bias",
            "fc2": "mlp.linear_fc2.weight",
            "fc2_bias": "mlp.linear_fc2.bias",
            "shared_fc1": "mlp.shared_experts.linear_fc1.weight",
            "shared_fc1_bias": "mlp.shared_experts.linear_fc1.bias",
            "shared_fc2": "mlp.shared_experts.linear_fc2.weight",
            "shared_fc2_bias": "mlp.shared_experts.linear_fc2.bias",
            "shared_gate": "mlp.shared_experts.gate_weight",
            "latent_input_norm": _INPUT_NORM,
            "latent_mlp_norm": _MLP_NORM,
        }.items()
    },
    "input_norm": (_FUSED_INPUT_NORM, _INPUT_NORM, _FUSED_INPUT_NORM, _FUSED_INPUT_NORM),
    # The local spec keeps the fused key even where the MLP is a mixture of experts, so that each spec's checkpoints need the same spec to load.
    "mlp_norm": (_MLP_NORM, _MLP_NORM, _MLP_NORM, _FUSED_MLP_NORM),
    "dense_mlp_norm": (_FUSED_MLP_NORM, _MLP_NORM, _FUSED_MLP_NORM, _FUSED_MLP_NORM),
    "latent_dense_mlp_norm": (_FUSED_MLP_NORM, _MLP_NORM, _FUSED_MLP_NORM, _MLP_NORM),
    "latent_q_layernorm": (_FUSED_Q_NORM, _Q_NORM, _FUSED_Q_NORM, _Q_NORM),
    "latent_kv_layernorm": (_FUSED_KV_NORM, _KV_NORM, _FUSED_KV_NORM, _KV_NORM),
}
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
    prefix = f"{LAYERS}{layer}."
    if tensor.kind in _NAMES:
        return prefix + _NAMES[tensor.kind][spec == "local"]
    linear, what = _of_expert(tensor.kind)
    if experts == "grouped":
        return f"{prefix}mlp.experts.{linear}.{what}{expert}"
    return f"{prefix}mlp.experts.local_experts.{expert}.{linear}.{what}"


def base_kind(kind: str) -> str:
    """Give the kind that a stored name tells: where the layer's other parts decide the name, several kinds share one."""
    return kind.removeprefix("latent_").removeprefix("dense_")


def _of_expert(kind: str) -> tuple[str, str]:
    """Give the linear layer of an expert's tensor, and what it is of it."""
    return f"linear_fc{kind.removeprefix('expert_fc')[0]}", "bias" if kind.endswith("_bias") else "weight"


def dist_key(tensor: MegatronTensor, spec: Spec, *, by_layer: bool = False) -> str:
    """Give the key of a tensor in a `torch_dist` checkpoint, where layers and experts are stacked.

    Args:
        tensor: the tensor.
        spec: the layer spec.
        by_layer: each layer has keys of its own, and only experts are stacked.

    Returns:
        The key.
    """
    if tensor.kind in TOP:
        return TOP[tensor.kind]
    prefix = f"{LAYERS}{tensor.layer}." if by_layer else LAYERS
    if tensor.kind in _NAMES:
        return prefix + _NAMES[tensor.kind][2 + (spec == "local")]
    return f"{prefix}mlp.experts.experts.{'.'.join(_of_expert(tensor.kind))}"


_PLAIN = {name: base_kind(kind) for kind, names in _NAMES.items() for name in names}
_IN_LAYER = re.compile(r"decoder\.layers\.(?:(?P<layer>\d{1,9})\.)?(?P<rest>.+)")
_EXPERT = [
    re.compile(r"mlp\.experts\.local_experts\.(?P<expert>\d{1,9})\.linear_fc(?P<fc>[12])\.(?P<what>weight|bias)"),
    re.compile(r"mlp\.experts\.linear_fc(?P<fc>[12])\.(?P<what>weight|bias)(?P<expert>\d{1,9})"),
    re.compile(
        r"mlp\.experts\.experts\.(?:(?P<expert>\d{1,9})\.)?linear_fc(?P<fc>[12])\.(?P<what>weight|bias)(?P<half>_[wv])?"
    ),
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
            bias = "_bias" if groups["what"] == "bias" else ""
            return Found(f"expert_fc{groups['fc']}{bias}{groups.get('half') or ''}", layer, expert)
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


_LATENT_LINEAR = {"q_whole", "q_down", "q_up", "kv_down", "kv_up"}


def _extra_modules(kinds: set[str], spec: Spec) -> list[str]:
    """Name the modules of a layer, but for its experts, that have an extra state: linear ones, and Transformer Engine's norms."""
    latent = sorted(kinds & _LATENT_LINEAR)
    names = ["self_attention.linear_proj"]
    names += [_NAMES[kind][0].removesuffix(".weight") for kind in latent] or ["self_attention.linear_qkv"]
    if spec == "te":
        names += ["input_layernorm"] if latent else []
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
        attention = ["self_attention.core_attention"] if spec == "te" and "sinks" in held else []
        for name in [*_extra_modules(held, spec), *attention]:
            out.append((f"{prefix}{name}.{EXTRA_STATE}/{alone}", layer, 0))
        for expert in range(num_experts if "router" in held else 0):
            where = f"shard_{at}{expert}_{of}{num_experts}"
            for linear in ("linear_fc1", "linear_fc2"):
                out.append((f"{prefix}mlp.experts.experts.{linear}.{EXTRA_STATE}/{where}", layer, expert))
    if spec == "te":
        out.append((f"decoder.final_layernorm.{EXTRA_STATE}/shard_0_1", len(kinds) - 1, 0))
    return out
