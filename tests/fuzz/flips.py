"""Other values of the same kind for each key of a config.json, and keys that the hub's files have besides."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from moeconv.families import FAMILIES
from moeconv.families.key_states import key_states

_ABSENT = object()
FACTORS = {"short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [2.0, 3.0, 4.0, 5.0]}
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 2.0},
    "old-linear": {"type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "alpha": {"rope_type": "dynamic", "factor": 1.0, "alpha": 50.0},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8},
    "yarn-all": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "beta_fast": 16.0, "beta_slow": 2.0, "mscale": 0.7,
        "mscale_all_dim": 1.2, "truncate": False,
    },
    "yarn-attention": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "attention_factor": 1.3},
    "longrope": {"rope_type": "longrope", "original_max_position_embeddings": 8, **FACTORS},
    "longrope-short": {"rope_type": "longrope", "original_max_position_embeddings": 64, "attention_factor": 1.2, **FACTORS},
    "longrope-magnitudes": {"rope_type": "longrope", "original_max_position_embeddings": 8, **FACTORS, "short_mscale": 1.1, "long_mscale": 1.3},
    "proportional": {"rope_type": "proportional", "partial_rotary_factor": 0.5},
    "default": {"rope_type": "default"},
    "unknown": {"rope_type": "other"},
}  # fmt: skip
# Legal words of keys that hold words, and values of keys whose silence is null.
WORDS: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("gelu", "relu", "gelu_pytorch_tanh"),
    "topk_method": ("greedy", "group_limited_greedy", "noaux_tc"),
    "dtype": ("bfloat16", "float32"),
    "torch_dtype": ("bfloat16", "float32"),
    "rope_type": tuple(ROPES),
}
SET: dict[str, tuple[Any, ...]] = {
    "sliding_window": (3, 5),
    "clip_qkv": (0.05,),
    "q_lora_rank": (12, 8),
    "n_group": (2, 4),
    "topk_group": (1, 2),
    "head_dim": (8, 4, 16),
    "num_key_value_heads": (1, 2, 4),
    "rotary_dim": (4, 8, 0, 3, 16, None),
    "layer_types": (
        ["sliding_attention", "full_attention"],
        ["sliding_attention"] * 2,
        ["full_attention"] * 2,
        ["chunked_attention", "full_attention"],
        ["linear_attention", "full_attention"],
    ),
    "mlp_only_layers": ([0], [1], [0, 1], []),
    "mlp_layer_types": (["sparse", "sparse"], ["dense", "dense"], ["sparse", "dense"]),
    "moe_layers": ([0], [0, 1]),
    "attention_dropout": (0.0, 0.5),
    "max_position_embeddings": (12, 256),
    "num_experts_per_tok": (1, 2, 3),
    "quantization_config": (
        {"quant_method": "fp8", "weight_block_size": [8, 8]},
        {"quant_method": "gptq", "bits": 4, "group_size": 8},
        {},
    ),
}
# Keys that configs on the hub have, or that transformers reads of any config, although its classes don't serialise them.
EXTRA: dict[str, tuple[Any, ...]] = {
    "rope_theta": (500.0,),
    "rope_scaling": (*ROPES.values(), None),
    "partial_rotary_factor": (0.5, 1.0, 0.25, None),
    "original_max_position_embeddings": (8, 64),
    "rotary_dim": (4, 8, 0, 16, None),
    "sliding_window": (3,),
    "use_sliding_window": (True, False),
    "max_window_layers": (1, 0),
    "layer_types": SET["layer_types"],
    "window_size": (3,),
    "attention_chunk_size": (4,),
    "attention_dropout": (0.5,),
    "hidden_dropout": (0.5,),
    "hidden_dropout_prob": (0.5,),
    "attention_probs_dropout_prob": (0.5,),
    "resid_pdrop": (0.5,),
    "embd_pdrop": (0.5,),
    "dropout": (0.5,),
    "attention_bias": (True, False),
    "mlp_bias": (True,),
    "qkv_bias": (True, False),
    "use_bias": (True,),
    "bias": (True,),
    "lm_head_bias": (True,),
    "qk_layernorm": (True,),
    "use_qk_norm": (True,),
    "clip_qkv": (0.05,),
    "head_dim": (8, 4, 16),
    "num_experts": (4, 8),
    "num_local_experts": (4, 8),
    "n_routed_experts": (4, 8),
    "num_experts_per_tok": (1, 2),
    "moe_topk": (1, 2),
    "mlp_only_layers": SET["mlp_only_layers"],
    "decoder_sparse_step": (1, 2),
    "moe_layer_freq": (2, [0, 1]),
    "first_k_dense_replace": (0, 1, 2),
    "num_nextn_predict_layers": (0, 1),
    "num_mtp_layers": (0, 1),
    "n_group": (2,),
    "topk_group": (1,),
    "scoring_func": ("sigmoid", "softmax"),
    "topk_method": ("noaux_tc", "greedy", "group_limited_greedy"),
    "norm_topk_prob": (True, False),
    "routed_scaling_factor": (2.5,),
    "router_jitter_noise": (0.3,),
    "input_jitter_noise": (0.3,),
    "router_aux_loss_coef": (0.5,),
    "router_z_loss_coef": (0.5,),
    "aux_loss_alpha": (0.5,),
    "seq_aux": (True,),
    "output_router_logits": (True,),
    "attn_logit_softcapping": (1.0,),
    "final_logit_softcapping": (1.0,),
    "logit_scale": (0.5,),
    "logits_scaling": (3.0,),
    "embedding_multiplier": (2.0,),
    "residual_multiplier": (0.5,),
    "attention_multiplier": (0.5,),
    "scale_emb": (2.0,),
    "query_pre_attn_scalar": (4,),
    "mup_width_multiplier": (2.0,),
    "logits_mup_width_multiplier": (2.0,),
    "unpadded_vocab_size": (50,),
    "layer_norm_eps": (0.1,),
    "rms_norm_eps": (0.1,),
    "norm_eps": (0.1,),
    "layernorm_epsilon": (0.1,),
    "hidden_activation": ("gelu",),
    "is_causal": (False, True),
    "use_bidirectional_attention": (True,),
    "is_decoder": (True,),
    "is_encoder_decoder": (True,),
    "add_cross_attention": (True,),
    "chunk_size_feed_forward": (4,),
    "per_layer_config": ({"full_attention": {"head_dim": 4}}, {"0": {"num_attention_heads": 2}}),
    "fusion_config": ({"fuse": True},),
    "distributed_config": ({"tp_size": 1},),
    "transformers_weights": ("other.safetensors",),
    "gradient_checkpointing": (True,),
    "pruned_heads": ({"0": [1]},),
    "tie_encoder_decoder": (True,),
    "tie_word_embeddings": (True, False),
    "output_attentions": (True,),
    "output_hidden_states": (True,),
    "return_dict": (False,),
    "use_return_dict": (False,),
    "torchscript": (True,),
    "use_cache": (False,),
    "pretraining_tp": (2,),
    "auto_map": ({"AutoConfig": "configuration_other.Config"},),
    "torch_dtype": ("bfloat16",),
    "dtype": ("bfloat16", "float32"),
    "quantization_config": SET["quantization_config"],
    "attn_implementation": ("eager", "sdpa"),
    "_attn_implementation": ("eager",),
    "experts_implementation": ("eager", "grouped_mm"),
    "_experts_implementation": ("eager",),
    "use_grouped_mm": (True,),
    "architectures": (["OtherForCausalLM"], None),
    "transformers_version": ("4.0.0", None),
    "name_or_path": ("other",),
    "_name_or_path": ("other",),
    "_commit_hash": ("0" * 40,),
    "id2label": ({"0": "a"},),
    "num_labels": (3,),
    "problem_type": ("regression",),
    "temperature": (0.5,),
    "max_length": (7,),
    "tokenizer_class": ("OtherTokenizer",),
    "bos_token_id": (3, None),
    "eos_token_id": (4, [4, 5], None),
    "pad_token_id": (5, None, 0),
    "mystery": (1, "a", None, [1], {"a": 1}),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Flip:
    """A config in which a key (nested: `outer.inner`) has another value; `value` is what it has now, in words."""

    key: str
    value: str
    config: dict[str, Any]


def flips(config: dict[str, Any], serialised: dict[str, Any], *, nested: bool = True) -> Iterator[Flip]:
    """Flip each key of a config.

    Args:
        config: as the base's folder has it.
        serialised: every key that transformers' class of the family serialises, with the base's values.
        nested: whether what is inside the rotary parameters is flipped too, for each kind of positions.

    Yields:
        A config for each value that each key may have besides, and one without the key.
    """
    for key in sorted({*config, *serialised, *EXTRA} - {"model_type"}):
        old = config.get(key, serialised.get(key))
        values = (
            [*_others(key, old), *SET.get(key, ()), *EXTRA.get(key, ())]
            if key in {*config, *serialised}
            else EXTRA[key]
        )
        for value in _unlike(values, config.get(key, _ABSENT)):
            yield Flip(key, _words(value), copy.deepcopy(config) | {key: copy.deepcopy(value)})
        if key in config:
            yield Flip(key, "absent", {k: copy.deepcopy(v) for k, v in config.items() if k != key})
    if nested:
        yield from _rope_flips(config)


def _rope_flips(config: dict[str, Any]) -> Iterator[Flip]:
    """Flip what is inside the rotary parameters, in the forms of transformers 4 and 5, for each kind of positions."""
    plain = {
        key: value for key, value in config.items() if key not in ("rope_parameters", "rope_scaling", "rope_theta")
    }
    for name, kind in ROPES.items():
        new = plain | {"rope_parameters": kind | {"rope_theta": 2e4}}
        old = plain | {"rope_scaling": kind, "rope_theta": 3e4}
        yield Flip("rope_parameters", name, copy.deepcopy(new))
        yield Flip("rope_scaling", name, copy.deepcopy(old))
        yield Flip(
            "original_max_position_embeddings",
            f"16 with {name}",
            copy.deepcopy(old) | {"original_max_position_embeddings": 16},
        )
        for key in sorted(
            {*kind, "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"} - {"rope_type", "type"}
        ):
            for value in (*_others(key, kind.get(key, 1.0))[:2], None):
                table = copy.deepcopy(new["rope_parameters"])
                yield Flip(
                    f"rope_parameters.{key}",
                    f"{_words(value)} of {name}",
                    new | {"rope_parameters": table | {key: value}},
                )
            table = {k: v for k, v in new["rope_parameters"].items() if k != key}
            yield Flip(f"rope_parameters.{key}", f"absent of {name}", copy.deepcopy(new | {"rope_parameters": table}))
    for theta in (500, 500.0):
        yield Flip("rope_theta", f"{theta!r}, no table", copy.deepcopy(plain) | {"rope_theta": theta})
    for key, value in (
        ("partial_rotary_factor", 0.5),
        ("partial_rotary_factor", None),
        ("rotary_dim", 4),
        ("rotary_dim", 0),
    ):
        # Without the table the base counts otherwise already: a key that nobody reads would be blamed for it.
        if key_states(FAMILIES[config["model_type"]]).get(key) != "honoured":
            continue
        yield Flip(key, f"{_words(value)}, no table", copy.deepcopy(plain) | {"rope_theta": 1e4, key: value})


def _others(key: str, old: Any) -> list[Any]:
    """Give other values of the same kind."""
    if key in WORDS:
        return list(WORDS[key])
    if isinstance(old, bool):
        return [not old, None]
    if isinstance(old, int):
        return [old + 1, old * 2, 0, 1, float(old), None]
    if isinstance(old, float):
        return [old * 2 + 0.25, 0.5, 0.0, 1, None]
    if isinstance(old, list):
        return [old[::-1], old[:-1], [*old, *old[-1:]], [], None]
    if isinstance(old, str):
        return [old + "x", None]
    if isinstance(old, dict):
        return [{}, None]
    return []


def _unlike(values: Any, old: Any) -> list[Any]:
    out: list[Any] = []
    for value in values:
        if not any(type(value) is type(seen) and value == seen for seen in (old, *out)):
            out.append(value)
    return out


def _words(value: Any) -> str:
    return str(value) if isinstance(value, float) else repr(value)[:60]
