"""The one table between what a model computes and the arguments that say it to Megatron.

A row says what an export writes, and what an argument that was read means, in a form that can be compared. Every
argument that a checkpoint's `args` hold is read so and compared with what an export of the model would write; so
arguments under which the weights mean another model are refused by the same table.

Source: https://github.com/NVIDIA/Megatron-LM/blob/d98e8a64/megatron/training/arguments.py (meanings),
.../training/checkpointing.py (load_args_from_checkpoint: what is read back) and megatron/core/transformer/moe/moe_utils.py
(topk_routing_with_score_function, group_limited_topk).
"""

from __future__ import annotations

from collections.abc import Callable

from moeconv.families.base import Model
from moeconv.families.compute import Router
from moeconv.megatron.arg_positions import LATENT, ROPE, YARN, YARN_LATENT, YARN_PLAIN, is_latent
from moeconv.megatron.arg_row import Row, fixed, flagged, given, listed, size_row
from moeconv.megatron.args import RunArgs
from moeconv.megatron.tensors import biased

DROPOUT = "attention_dropout"
# Its quick GeGLU: gate * sigmoid(1.702 * gate) * (up + offset).
GATE_ALPHA, GATE_OFFSET = 1.702, 1.0


def query_groups(args: RunArgs) -> int:
    """Give the number of key and value heads."""
    heads = args.whole("num_attention_heads")
    return args.whole("num_query_groups", heads) if args.flag("group_query_attention") else heads


def epsilon(args: RunArgs) -> float:
    """Give the norms' epsilon; newer runs keep it under the configuration's name."""
    return args.number("norm_epsilon", args.number("layernorm_epsilon", 1e-5), above=-1.0)


def windows(args: RunArgs) -> tuple[int | None, ...]:
    """Give the sliding window of each layer, the token's own position included.

    Raises:
        MappingError: the arguments say no window that a causal model has.
    """
    layers, size = args.num_layers, args.wholes("window_size", 2)
    if size is None or size[0] < 0:
        return (None,) * layers
    if size[1] != 0:
        raise args.wrong("window_size", "a window that ends at the token itself, as (4095, 0)")
    skip = args.get("window_attn_skip_freq")
    has = _pattern(args, "window_attn_skip_freq", layers, lambda i, n: (i + 1) % n != 0) if skip is not None else None
    return tuple(size[0] + 1 if has is None or has[i] else None for i in range(layers))


def moe_layers(args: RunArgs) -> frozenset[int]:
    """Give the layers with experts."""
    if not args.num_experts:
        return frozenset()
    has = _pattern(args, "moe_layer_freq", args.num_layers, lambda layer, n: layer % n == 0)
    return frozenset(layer for layer, moe in enumerate(has) if moe)


def _pattern(args: RunArgs, name: str, layers: int, rule: Callable[[int, int], bool]) -> list[bool]:
    """Read a list of 0 and 1 for each layer, or a frequency."""
    if isinstance(args.get(name, 1), int):
        number = args.whole(name, 1)
        return [rule(i, number) for i in range(layers)]
    found = args.wholes(name, layers) or ()
    if not set(found) <= {0, 1}:
        raise args.wrong(name, f"{layers} of 0 and 1")
    return [value == 1 for value in found]


def score(args: RunArgs) -> str:
    """Give the router's score function."""
    return args.text("moe_router_score_function", "softmax")


def groups(args: RunArgs) -> tuple[int, int]:
    """Give the number of groups of experts and how many of them a token may choose from: one of one where nothing is limited."""
    if args.get("moe_router_group_topk") is None:
        return 1, 1
    number, chosen = args.whole("moe_router_num_groups"), args.whole("moe_router_group_topk")
    return (number, chosen) if chosen < number else (1, 1)


def _say_window(model: Model) -> tuple[int, int] | None:
    sizes = [size for size in model.compute.windows if size is not None]
    return (sizes[0] - 1, 0) if sizes else None


def _say_skip(model: Model) -> list[int] | None:
    has = [int(size is not None) for size in model.compute.windows]
    return has if 0 < sum(has) < len(has) else None


def _say_layers(model: Model) -> int | list[int]:
    layers = range(model.sizes["layers"])
    return 1 if len(model.moe_layers) == len(layers) else [int(layer in model.moe_layers) for layer in layers]


def _router(model: Model) -> Router:
    assert model.compute.router is not None
    return model.compute.router


def limited(router: Router) -> bool:
    """Say whether a token's experts are confined to some of the groups."""
    return router.group_top_k < router.groups


MODEL: tuple[Row, ...] = (
    size_row("num_layers", "layers"),
    size_row("hidden_size", "hidden"),
    size_row("num_attention_heads", "heads"),
    Row("num_query_groups", lambda m: m.sizes["kv_heads"], query_groups),
    Row("group_query_attention", lambda m: m.sizes["kv_heads"] != m.sizes["heads"], query_groups),
    Row(
        "kv_channels",
        lambda m: m.sizes["v_dim" if is_latent(m) else "head_dim"],
        lambda args: None if args.flag("multi_latent_attention") else args.whole("kv_channels"),
    ),
    Row(
        "ffn_hidden_size",
        lambda m: m.width("mlp") or m.width("expert"),
        lambda args: args.whole("ffn_hidden_size", 4 * args.whole("hidden_size")),
        checked=False,
    ),
    Row("vocab_size", lambda m: m.sizes["vocab"], lambda args: args.whole("vocab_size"), checked=False),
    Row(
        "max_position_embeddings",
        lambda m: m.compute.max_positions,
        lambda args: args.whole("max_position_embeddings", args.whole("seq_length", 4096)),
        checked=False,
    ),
    Row(
        "norm_epsilon",
        lambda m: m.compute.norm_eps,
        epsilon,
        given("--norm-epsilon", 1e-5),
        also="layernorm_epsilon",
    ),
    Row("add_qkv_bias", lambda m: m.has("attention.q.bias"), lambda args: args.flag("add_qkv_bias")),
    Row(
        "qk_layernorm",
        lambda m: m.has("attention.q_norm") or is_latent(m),
        lambda args: args.flag("qk_layernorm"),
        flagged("--qk-layernorm"),
    ),
    Row("window_size", _say_window, windows, lambda v: v and f"--window-size {v[0]},{v[1]}"),
    Row("window_attn_skip_freq", _say_skip, windows, listed("--window-attn-skip-freq")),
    Row(
        "untie_embeddings_and_output_weights",
        lambda m: not m.tied,
        lambda args: args.flag("untie_embeddings_and_output_weights"),
    ),
    Row(
        "init_method_std",
        lambda m: m.compute.init_std,
        lambda args: args.number("init_method_std", 0.02, above=-1.0),
        checked=False,
    ),
    Row(
        DROPOUT,
        lambda m: float(m.compute.others.get(DROPOUT, 0.0)),
        lambda args: args.number(DROPOUT, 0.0, above=-1.0),
        checked=False,
    ),
    fixed("normalization", "RMSNorm"),
    Row("swiglu", lambda m: m.compute.gate is None, lambda args: args.flag("swiglu", True)),
    fixed("squared_relu", False),
    Row(
        "quick_geglu",
        lambda m: m.compute.gate is not None,
        lambda args: args.flag("quick_geglu"),
        flagged("--quick-geglu"),
    ),
    Row(
        "glu_linear_offset",
        lambda m: 0.0 if m.compute.gate is None else GATE_OFFSET,
        lambda args: args.number("glu_linear_offset", 0.0, above=-1.0),
        given("--glu-linear-offset", 0.0),
    ),
    Row(
        "activation_func_clamp_value",
        lambda m: m.compute.gate.limit if m.compute.gate is not None else None,
        lambda args: args.get("activation_func_clamp_value") and args.number("activation_func_clamp_value", 0.0),
        given("--activation-func-clamp-value"),
    ),
    Row("add_bias_linear", biased, lambda args: args.flag("add_bias_linear")),
    Row(
        "softmax_type",
        lambda m: "learnable" if m.has("attention.sinks") else "vanilla",
        lambda args: args.text("softmax_type", "vanilla"),
        given("--softmax-type", "vanilla"),
    ),
    fixed("rotary_interleaved", False),
    fixed("apply_layernorm_1p", False),
    fixed("layernorm_zero_centered_gamma", False),
    fixed("apply_query_key_layer_scaling", False),
    Row(
        "multi_latent_attention",
        is_latent,
        lambda args: args.flag("multi_latent_attention"),
        flagged("--multi-latent-attention"),
    ),
    fixed("qk_l2_norm", False),
    fixed("mtp_num_layers", None, 0),
    fixed("heterogeneous_layers_config_path", None),
    fixed("heterogeneous_layers_config_encoded_json", None, ""),
    fixed("linear_attention_freq", None),
    fixed("no_rope_freq", None),
    fixed("attention_output_gate", False),
)


MOE: tuple[Row, ...] = (
    Row("moe_layer_freq", _say_layers, moe_layers),
    Row(
        "moe_ffn_hidden_size",
        lambda m: m.width("expert"),
        lambda args: args.whole("moe_ffn_hidden_size", args.whole("ffn_hidden_size")),
    ),
    size_row("moe_router_topk", "top_k"),
    # Softmax over the chosen logits is softmax over all, renormalised.
    Row(
        "moe_router_pre_softmax",
        lambda m: _router(m).score == "softmax" and not _router(m).normalise,
        lambda args: args.flag("moe_router_pre_softmax") and score(args) == "softmax",
    ),
    Row("moe_router_score_function", lambda m: _router(m).score, score),
    Row(
        "moe_router_topk_scaling_factor",
        lambda m: None if _router(m).scale == 1 else _router(m).scale,
        lambda args: args.number("moe_router_topk_scaling_factor", 1.0),
    ),
    Row(
        "moe_router_num_groups",
        lambda m: _router(m).groups if limited(_router(m)) else None,
        lambda args: groups(args)[0],
        given("--moe-router-num-groups"),
    ),
    Row(
        "moe_router_group_topk",
        lambda m: _router(m).group_top_k if limited(_router(m)) else None,
        lambda args: groups(args)[1],
        given("--moe-router-group-topk"),
    ),
    Row(
        "moe_router_enable_expert_bias",
        lambda m: _router(m).bias,
        lambda args: args.flag("moe_router_enable_expert_bias"),
    ),
    Row(
        "moe_shared_expert_intermediate_size",
        lambda m: m.width("shared") or None,
        lambda args: args.whole("moe_shared_expert_intermediate_size", 0, least=0),
    ),
    Row(
        "moe_shared_expert_gate",
        lambda m: m.has("shared.router"),
        lambda args: args.flag("moe_shared_expert_gate"),
        flagged("--moe-shared-expert-gate"),
    ),
    fixed("moe_latent_size", None),
    fixed("moe_apply_probs_on_input", False),
)
EXPERTS = Row(
    "num_experts",
    lambda m: m.sizes.get("experts"),
    lambda args: args.num_experts,
)


def rows(model: Model) -> tuple[Row, ...]:
    """Give the rows that a model has arguments of."""
    latent = is_latent(model)
    yarn: tuple[Row, ...] = ()
    if model.compute.rope.kind == "yarn":
        yarn = (*YARN, *(YARN_LATENT if latent else YARN_PLAIN))
    moe = MOE if model.compute.router is not None else ()
    return (*MODEL, *ROPE, *(LATENT if latent else ()), *yarn, EXPERTS, *moe)
