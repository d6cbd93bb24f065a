"""Carriers: the mixture architectures that can hold a dense model's layers, what each can't hold, and their config.json.

What transformers computes for each was read at
https://github.com/huggingface/transformers/tree/v5.0.0/src/transformers/models
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from moeconv.errors import RecipeError
from moeconv.families import FAMILIES
from moeconv.families.base import Family, Model


@dataclass(frozen=True, kw_only=True, slots=True)
class Carrier:
    """What a mixture architecture can hold.

    `biases`: of queries, keys and values, or of the output projection too. `head_norms`: norms of query and key heads.
    `window`: a sliding window on every layer. `shared`: experts that every token passes, with a sigmoid gate or without.
    """

    model_type: str
    biases: Literal["none", "qkv", "qkvo"]
    head_norms: Literal["never", "always", "either"]
    window: bool = False
    shared: Literal["none", "gated", "plain"] = "none"
    softmax: bool = True

    @property
    def family(self) -> Family:
        """The carrier's family."""
        return FAMILIES[self.model_type]

    @property
    def optional_renormalize(self) -> bool:
        """Whether its routing weights can be left as the softmax over all experts gives them."""
        return self.softmax and self.model_type != "mixtral"


# In the order of preference.
CARRIERS = {
    c.model_type: c
    for c in (
        Carrier(model_type="mixtral", biases="none", head_norms="never", window=True),
        Carrier(model_type="qwen2_moe", biases="qkv", head_norms="never", shared="gated"),
        Carrier(model_type="qwen3_moe", biases="qkvo", head_norms="always"),
        Carrier(model_type="dots1", biases="qkvo", head_norms="always", shared="plain", softmax=False),
        Carrier(model_type="glm4_moe", biases="qkv", head_norms="either", shared="plain", softmax=False),
    )
}
SOURCES = ("llama", "mistral", "qwen2", "qwen3")

# What transformers takes where a dense model's config.json is silent.
_LLAMA = {"bos_token_id": 1, "eos_token_id": 2}
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA | {"max_position_embeddings": 2048},
    "mistral": _LLAMA | {"max_position_embeddings": 131072, "sliding_window": 4096},
    "qwen2": {"max_position_embeddings": 32768},
    "qwen3": {"max_position_embeddings": 32768},
}
COMMON = {"rms_norm_eps": 1e-6, "initializer_range": 0.02, "hidden_act": "silu", "attention_dropout": 0.0}
ROPE_THETA = 10000.0
_CARRIED = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "hidden_act", "max_position_embeddings",
    "initializer_range", "rms_norm_eps", "use_cache", "tie_word_embeddings", "attention_dropout", "bos_token_id",
    "eos_token_id", "pad_token_id", "rope_theta", "rope_scaling", "rope_parameters", "dtype", "torch_dtype",
    "transformers_version",
)  # fmt: skip
# Said by the carrier's own fields, or of no effect on what the model computes.
_SETTLED = (
    "architectures", "model_type", "intermediate_size", "num_key_value_heads", "head_dim", "attention_bias", "mlp_bias",
    "sliding_window", "use_sliding_window", "max_window_layers", "layer_types", "pretraining_tp", "_name_or_path",
    "_attn_implementation", "attn_implementation",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """The sizes of the mixture: routed experts of a layer, those a token uses, shared ones, their common width, the layers that have them."""

    experts: int
    top_k: int
    granularity: int
    shared: int
    width: int
    layers: frozenset[int]
    renormalize: bool = True


def window(config: Mapping[str, Any], model_type: str) -> int | None:
    """Give the sliding window that a dense model's attention has, or None.

    Raises:
        RecipeError: only some layers have one, which no carrier can hold.
    """
    size = config.get("sliding_window", DEFAULTS[model_type].get("sliding_window"))
    kinds = set(config.get("layer_types") or [])
    if model_type in ("qwen2", "qwen3"):
        first = config.get("max_window_layers", 28)
        some = config.get("use_sliding_window", False) and first < config["num_hidden_layers"] and size is not None
        if some and (not kinds or "sliding_attention" in kinds):
            raise RecipeError(
                f"config.json: use_sliding_window gives layers from {first} on a window of {size}, which no carrier holds alike; "
                "set use_sliding_window to false if the model may attend to everything"
            )
        return None
    if len(kinds) > 1:
        raise RecipeError(f"config.json: layer_types mixes {', '.join(sorted(kinds))}, which no carrier holds")
    return size if isinstance(size, int) else None


def problems(carrier: Carrier, source: Model, config: Mapping[str, Any], shape: Shape) -> list[str]:
    """List what a carrier can't hold.

    Args:
        carrier: the carrier.
        source: the dense model.
        config: its config.json.
        shape: the mixture that is asked for.

    Returns:
        What it can't hold, in words; empty where it holds the source exactly.
    """
    has = {name.rsplit("self_attn.", 1)[-1] for name in source.tensors}
    out = []
    if any(".mlp." in name and name.endswith(".bias") for name in source.tensors):
        out.append("biases in the feed-forward part (mlp_bias)")
    if "o_proj.bias" in has and carrier.biases != "qkvo":
        out.append("a bias on attention's output projection (attention_bias)")
    elif "q_proj.bias" in has and carrier.biases == "none":
        out.append("biases on queries, keys and values")
    if "q_norm.weight" in has and carrier.head_norms == "never":
        out.append("norms of query and key heads (qk-norm)")
    if "q_norm.weight" not in has and carrier.head_norms == "always":
        out.append("attention without norms of query and key heads (it always has qk-norm)")
    if not carrier.window and window(config, source.family.model_type) is not None:
        out.append("a sliding window")
    if shape.shared and carrier.shared == "none":
        out.append("shared experts")
    dense = sorted(set(range(source.sizes["layers"])) - shape.layers)
    kind = carrier.family.dense_layers
    if dense and (kind == "none" or (kind == "first" and dense != list(range(len(dense))))):
        out.append("dense layers" if kind == "none" else "dense layers after one with experts")
    if not shape.renormalize and not carrier.optional_renormalize:
        out.append("routing weights that are not renormalised")
    return out


def choose(name: str | None, source: Model, config: Mapping[str, Any], shape: Shape) -> Carrier:
    """Choose the carrier.

    Args:
        name: its model_type, or None for the first one that holds the source.
        source: the dense model.
        config: its config.json.
        shape: the mixture that is asked for.

    Returns:
        A carrier that holds everything.

    Raises:
        RecipeError: the named carrier, or every one, can't; the message says what, and which carrier can.
    """
    if name is not None and name not in CARRIERS:
        raise RecipeError(f"--carrier {name}: is unknown; carriers are {', '.join(CARRIERS)}")
    found = {c.model_type: problems(c, source, config, shape) for c in CARRIERS.values()}
    able = [c for c, missing in found.items() if not missing]
    if name is not None and found[name]:
        who = f"{', '.join(able)} can" if able else "no carrier can"
        raise RecipeError(
            f"--carrier {name}: can't hold {'; '.join(found[name])}; {who} hold this {source.family.name}"
        )
    if not able:
        each = "; ".join(f"{c}: {', '.join(missing)}" for c, missing in found.items())
        raise RecipeError(f"no carrier can hold this {source.family.name} model so. What each can't hold: {each}")
    return CARRIERS[name or able[0]]


def make_config(carrier: Carrier, source: Model, config: Mapping[str, Any], shape: Shape) -> dict[str, Any]:
    """Write the carrier's config.json.

    Args:
        carrier: a carrier that can hold the source.
        source: the dense model.
        config: its config.json.
        shape: the mixture.

    Returns:
        The config; whatever transformers would fill in differently for the carrier is stated.
    """
    kind = source.family.model_type
    full = {**COMMON, **DEFAULTS[kind], **config}
    out: dict[str, Any] = {"architectures": [carrier.family.architecture], "model_type": carrier.model_type}
    out |= {key: full[key] for key in _CARRIED if key in full}
    if "rope_theta" not in (out.get("rope_parameters") or {}) and "rope_theta" not in out:
        out["rope_theta"] = ROPE_THETA
    out |= {"num_key_value_heads": source.sizes["kv_heads"], "head_dim": source.sizes["head_dim"]}
    out |= {"tie_word_embeddings": source.flags["tied"], "num_experts_per_tok": shape.top_k}
    qkv = any(name.endswith("q_proj.bias") for name in source.tensors)
    norms = any(name.endswith("q_norm.weight") for name in source.tensors)
    dense = sorted(set(range(source.sizes["layers"])) - shape.layers)
    if carrier.model_type == "mixtral":
        sizes = {"intermediate_size": shape.width, "num_local_experts": shape.experts}
        return out | sizes | {"sliding_window": window(config, kind)}
    out |= {"intermediate_size": source.sizes["ffn"], "moe_intermediate_size": shape.width}
    out["norm_topk_prob"] = shape.renormalize
    if carrier.family.dense_layers == "listed":
        out |= {"num_experts": shape.experts, "decoder_sparse_step": 1, "mlp_only_layers": dense}
        out |= {"use_sliding_window": False}
        if carrier.model_type == "qwen2_moe":
            return out | {"shared_expert_intermediate_size": shape.shared * shape.width, "qkv_bias": qkv}
        return out | {"attention_bias": qkv}
    out |= {"n_routed_experts": shape.experts, "n_shared_experts": shape.shared, "first_k_dense_replace": len(dense)}
    out |= {"n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0, "attention_bias": qkv}
    if carrier.model_type == "dots1":
        return out | {"sliding_window": None, "max_window_layers": source.sizes["layers"]}
    return out | {"use_qk_norm": norms, "partial_rotary_factor": 1.0, "num_nextn_predict_layers": 0}


def left_out(config: Mapping[str, Any]) -> list[str]:
    """List the fields of a dense config.json that are in no carrier's, so that their effect, if any, is lost.

    Raises:
        RecipeError: the weights are quantized.
    """
    if config.get("quantization_config") is not None:
        raise RecipeError("config.json: quantization_config: quantized weights can't be upcycled; take the original")
    return sorted(key for key in config if key not in _CARRIED and key not in _SETTLED)
