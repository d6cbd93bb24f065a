"""Megatron's `args`, the namespace of a run's arguments in its checkpoints, from and to a Hugging Face config.

Source: https://github.com/NVIDIA/Megatron-LM/blob/d98e8a64/megatron/training/checkpointing.py
(load_args_from_checkpoint, check_checkpoint_args: what is read back) and .../megatron/training/arguments.py (meanings).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from moeconv.errors import MappingError
from moeconv.families.base import Model
from moeconv.io.pickling import Instance
from moeconv.io.unpickle import TORCH_DTYPES, Opaque, Symbol
from moeconv.layout.degrees import Degrees
from moeconv.megatron.names import Experts, Spec
from moeconv.megatron.tensors import padded_vocab

_TORCH_NAMES = {kind: name for name, kind in TORCH_DTYPES.items()}
# Arguments under which a model computes something that no supported Hugging Face family does: name -> allowed values.
_REQUIRED: dict[str, tuple[Any, ...]] = {
    "normalization": ("RMSNorm",),
    "swiglu": (True,),
    "add_bias_linear": (False,),
    "position_embedding_type": ("rope",),
    "rotary_percent": (1.0,),
    "rotary_interleaved": (False, None),
    "rotary_seq_len_interpolation_factor": (None, 1, 1.0),
    "use_rope_scaling": (False, None),
    "apply_layernorm_1p": (False, None),
    "layernorm_zero_centered_gamma": (False, None),
    "qk_layernorm": (False, None),
    "multi_latent_attention": (False, None),
    "mtp_num_layers": (None, 0),
    "moe_layer_freq": (None, 1),
    "moe_router_pre_softmax": (False, None),
    "moe_router_score_function": ("softmax", None),
    "moe_router_topk_scaling_factor": (None, 1.0),
    "moe_router_enable_expert_bias": (False, None),
    "moe_shared_expert_intermediate_size": (None, 0),
    "moe_latent_size": (None,),
    "heterogeneous_layers_config_path": (None,),
    "heterogeneous_layers_config_encoded_json": (None, ""),
    "linear_attention_freq": (None,),
}


def make_args(
    model: Model, config: Mapping[str, Any], degrees: Degrees, spec: Spec, experts: Experts, dtype: str, fmt: str
) -> Instance:
    """Make the `args` of an exported checkpoint: all that `--use-checkpoint-args` and the loader's checks read.

    Args:
        model: the model.
        config: its config.json.
        degrees: the degrees of the exported checkpoint.
        spec: the layer spec.
        experts: the expert implementation.
        dtype: the safetensors dtype of the weights.
        fmt: `torch` or `torch_dist`.

    Returns:
        An argparse.Namespace to be pickled.
    """
    return Instance(
        Symbol("argparse", "Namespace"),
        {
            **_size_args(model, config, degrees),
            **_architecture_args(model, config, spec, dtype),
            **_moe_args(model, config, experts),
            **_run_args(model.sizes["layers"], degrees, fmt),
        },
    )


def _size_args(model: Model, config: Mapping[str, Any], degrees: Degrees) -> dict[str, Any]:
    sizes, positions = model.sizes, int(config.get("max_position_embeddings") or 4096)
    return {
        "num_layers": sizes["layers"],
        "encoder_num_layers": sizes["layers"],
        "hidden_size": sizes["hidden"],
        "ffn_hidden_size": sizes["ffn"],
        "seq_length": positions,
        "encoder_seq_length": positions,
        "max_position_embeddings": positions,
        "num_attention_heads": sizes["heads"],
        "group_query_attention": sizes["kv_heads"] != sizes["heads"],
        "num_query_groups": sizes["kv_heads"],
        "kv_channels": sizes["head_dim"],
        "vocab_size": sizes["vocab"],
        "padded_vocab_size": padded_vocab(sizes["vocab"], degrees.tp),
        "make_vocab_size_divisible_by": 128,
    }


def _architecture_args(model: Model, config: Mapping[str, Any], spec: Spec, dtype: str) -> dict[str, Any]:
    theta, window = rope_theta(config), config.get("sliding_window")
    return {
        "position_embedding_type": "rope",
        "use_rotary_position_embeddings": True,
        # Genuine rope checkpoints hold True, the argument's default, and the loader compares it.
        "add_position_embedding": True,
        "rotary_base": int(theta) if float(theta).is_integer() else theta,
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        "normalization": "RMSNorm",
        "norm_epsilon": float(config.get("rms_norm_eps", 1e-5)),
        "layernorm_epsilon": float(config.get("rms_norm_eps", 1e-5)),
        "apply_layernorm_1p": False,
        "layernorm_zero_centered_gamma": False,
        "swiglu": True,
        "squared_relu": False,
        "add_bias_linear": False,
        "add_qkv_bias": "model.layers.0.self_attn.q_proj.bias" in model.tensors,
        "qk_layernorm": False,
        "multi_latent_attention": False,
        "apply_query_key_layer_scaling": False,
        "attention_dropout": float(config.get("attention_dropout") or 0.0),
        "hidden_dropout": 0.0,
        "init_method_std": float(config.get("initializer_range", 0.02)),
        "untie_embeddings_and_output_weights": not model.flags.get("tied", False),
        "window_size": (int(window) - 1, 0) if window else None,
        "transformer_impl": "transformer_engine" if spec == "te" else "local",
        "params_dtype": Symbol("torch", _TORCH_NAMES[dtype]),
        "bf16": dtype == "BF16",
        "fp16": dtype == "F16",
    }


def _moe_args(model: Model, config: Mapping[str, Any], experts: Experts) -> dict[str, Any]:
    if "experts" not in model.sizes:
        return {"num_experts": None, "moe_grouped_gemm": False}
    return {
        "num_experts": model.sizes["experts"],
        "moe_ffn_hidden_size": model.sizes["ffn"],
        "moe_layer_freq": 1,
        "moe_router_topk": model.sizes["top_k"],
        # Softmax over the chosen logits is softmax over all, renormalised, which is what Mixtral computes.
        "moe_router_pre_softmax": False,
        "moe_router_score_function": "softmax",
        "moe_router_topk_scaling_factor": None,
        "moe_router_enable_expert_bias": False,
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": float(config.get("router_aux_loss_coef", 0.0)),
        "moe_z_loss_coeff": None,
        "moe_grouped_gemm": experts == "grouped",
        "moe_use_legacy_grouped_gemm": False,
        "moe_token_dispatcher_type": "alltoall",
        "moe_shared_expert_intermediate_size": None,
        "moe_latent_size": None,
    }


def _run_args(num_layers: int, degrees: Degrees, fmt: str) -> dict[str, Any]:
    """The arguments of a run without history: nothing was trained; the checkpoint holds no optimizer or RNG state."""
    return {
        "tensor_model_parallel_size": degrees.tp,
        "pipeline_model_parallel_size": degrees.pp,
        "transformer_pipeline_model_parallel_size": degrees.pp,
        "virtual_pipeline_model_parallel_size": degrees.vpp if degrees.vpp > 1 else None,
        "num_layers_per_virtual_pipeline_stage": num_layers // (degrees.pp * degrees.vpp) if degrees.vpp > 1 else None,
        "num_virtual_stages_per_pipeline_rank": None,
        "expert_model_parallel_size": degrees.ep,
        "expert_tensor_parallel_size": degrees.etp,
        "context_parallel_size": 1,
        "sequence_parallel": False,
        "data_parallel_size": 1,
        "world_size": world_size(degrees),
        "iteration": 0,
        "consumed_train_samples": 0,
        "skipped_train_samples": 0,
        "consumed_valid_samples": 0,
        "no_save_optim": True,
        "no_save_rng": True,
        "use_distributed_optimizer": False,
        "ckpt_format": fmt,
        "use_dist_ckpt": fmt == "torch_dist",
        "dist_ckpt_format_deprecated": None,
        "data_parallel_random_init": False,
        "spec": None,
        "mtp_num_layers": None,
        "tokenizer_type": None,
        "tokenizer_model": None,
    }


def world_size(degrees: Degrees) -> int:
    """Give the smallest number of ranks that these degrees need."""
    attention, experts = degrees.tp, degrees.ep * degrees.etp
    stage = attention
    while stage % experts:
        stage += attention
    return stage * degrees.pp


def rope_theta(config: Mapping[str, Any]) -> float:
    """Give the rotary base of a config of transformers 4 (`rope_theta`) or 5 (`rope_parameters`).

    Raises:
        MappingError: the positions are scaled in a way that Megatron's arguments can't say.
    """
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind != "default":
        raise MappingError(f"config.json scales rotary positions ({kind}), which can't be written into Megatron's args")
    return float(parameters.get("rope_theta", config.get("rope_theta", 10000.0)))


class RunArgs:
    """The `args` of a checkpoint that was read, as plain values; absent arguments are None."""

    def __init__(self, args: Any) -> None:
        state = args.state if isinstance(args, Opaque) else args
        self.values: dict[str, Any] = state if isinstance(state, dict) else {}

    def __bool__(self) -> bool:
        return bool(self.values)

    def get(self, name: str, default: Any = None) -> Any:
        """Give an argument's value, or the default where it is absent or None."""
        value = self.values.get(name)
        return default if value is None else value

    def degree(self, name: str) -> int:
        """Give a degree of parallelism, 1 where it is absent."""
        value = self.get(name, 1)
        return value if isinstance(value, int) and value >= 1 else 1


def config_from_args(args: RunArgs, dtype: str) -> dict[str, Any]:
    """Make the config.json of the Hugging Face model that these arguments describe.

    Args:
        args: the run's arguments.
        dtype: the safetensors dtype of the weights.

    Returns:
        The config of a Mixtral (or, without experts, of a Llama) in the hub's form.

    Raises:
        MappingError: an argument is missing, or says something that the family can't.
    """
    check_expressible(args)
    missing = [k for k in ("num_layers", "hidden_size", "num_attention_heads", "vocab_size") if not args.get(k)]
    if missing:
        raise MappingError(
            f"the checkpoint's args lack {', '.join(missing)}; give the model's own config.json with --hf-config"
        )
    heads, hidden = int(args.get("num_attention_heads")), int(args.get("hidden_size"))
    grouped = args.get("group_query_attention", False)
    ffn = args.get("moe_ffn_hidden_size") or args.get("ffn_hidden_size") or 4 * hidden
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "attention_dropout": args.get("attention_dropout", 0.0),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "head_dim": int(args.get("kv_channels", hidden // heads)),
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": args.get("init_method_std", 0.02),
        "intermediate_size": int(ffn),
        "max_position_embeddings": int(args.get("max_position_embeddings", args.get("seq_length", 4096))),
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": int(args.get("num_layers")),
        "num_key_value_heads": int(args.get("num_query_groups", heads)) if grouped else heads,
        "rms_norm_eps": float(args.get("norm_epsilon", args.get("layernorm_epsilon", 1e-5))),
        "rope_theta": float(args.get("rotary_base", 10000)),
        "tie_word_embeddings": not args.get("untie_embeddings_and_output_weights", False),
        "torch_dtype": _TORCH_NAMES[dtype],
        "use_cache": True,
        "vocab_size": int(args.get("vocab_size")),
    }
    if args.get("num_experts"):
        window = args.get("window_size")
        config |= {
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "num_experts_per_tok": int(args.get("moe_router_topk", 2)),
            "num_local_experts": int(args.get("num_experts")),
            "output_router_logits": False,
            "router_aux_loss_coef": float(_first(args.get("moe_aux_loss_coeff", 0.0))),
            "sliding_window": int(window[0]) + 1 if window else None,
        }
    return dict(sorted(config.items()))


def check_expressible(args: RunArgs) -> None:
    """Refuse arguments under which the weights mean another model than a Hugging Face family.

    Raises:
        MappingError: names each such argument with its value.
    """
    bad = [
        f"{name}={args.values[name]!r} (expected {' or '.join(map(repr, allowed))})"
        for name, allowed in _REQUIRED.items()
        if name in args.values and not any(_same(args.values[name], value) for value in allowed)
    ]
    if bad:
        raise MappingError(
            f"the checkpoint's args say {'; '.join(bad)}: no supported Hugging Face model computes that. If the args "
            "are wrong, pass the right config.json with --hf-config and --ignore-args"
        )


def check_config(args: RunArgs, model: Model, config: Mapping[str, Any]) -> None:
    """Check that a config.json agrees with a checkpoint's arguments.

    Raises:
        MappingError: names each field that differs, with both values.
    """
    sizes = model.sizes
    said: list[tuple[str, Callable[[], Any], Any]] = [
        ("num_layers", lambda: args.get("num_layers"), sizes["layers"]),
        ("hidden_size", lambda: args.get("hidden_size"), sizes["hidden"]),
        ("num_attention_heads", lambda: args.get("num_attention_heads"), sizes["heads"]),
        ("kv_channels", lambda: args.get("kv_channels"), sizes["head_dim"]),
        ("num_experts", lambda: args.get("num_experts"), sizes.get("experts")),
        (
            "moe_router_topk",
            lambda: args.get("moe_router_topk") if args.get("num_experts") else None,
            sizes.get("top_k"),
        ),
        ("rotary_base", lambda: args.get("rotary_base"), rope_theta(config)),
        ("norm_epsilon", lambda: args.get("norm_epsilon", args.get("layernorm_epsilon")), config.get("rms_norm_eps")),
    ]
    bad = []
    for name, read, expected in said:
        value = read()
        if value is not None and expected is not None and float(value) != float(expected):
            bad.append(f"{name} {value} in args, {expected} in config.json")
    if bad:
        raise MappingError(f"config.json is of another model than the checkpoint: {'; '.join(bad)}")


def _same(value: Any, allowed: Any) -> bool:
    if isinstance(allowed, str) or allowed is None or isinstance(allowed, bool):
        return value is allowed or (isinstance(allowed, str) and value == allowed)
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == allowed


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, list) and value else value
