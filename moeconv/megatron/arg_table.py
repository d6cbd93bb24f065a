"""The one table between what a model computes and the arguments that say it to Megatron.

A row says what an export writes, and what an argument that was read means, in a form that can be compared. Every
argument that a checkpoint's `args` hold is read so and compared with what an export of the model would write; so
arguments under which the weights mean another model are refused by the same table.

Source: https://github.com/NVIDIA/Megatron-LM/blob/d98e8a64/megatron/training/arguments.py (meanings),
.../training/checkpointing.py (load_args_from_checkpoint: what is read back), .../training/argument_utils.py
(_apply_yarn_config_from_args), megatron/core/transformer/moe/moe_utils.py (topk_routing_with_score_function,
group_limited_topk) and .../core/models/common/embeddings/rotary_pos_embedding.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moeconv.families.base import Model
from moeconv.families.compute import Router
from moeconv.families.rope import Rope
from moeconv.megatron.args import RunArgs

# What Megatron's rope scaling is fixed to, as a rule of llama3; the factor is an argument.
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
LLAMA3_FACTOR = 8.0
DROPOUT = "attention_dropout"


@dataclass(frozen=True, slots=True)
class Row:
    """An argument: what a model says, what a value means, and whether Megatron needs its flag.

    Megatron does not read every argument back from a checkpoint; `flag` gives the words to call it with for a value, None
    where its default is right or the argument is read back. `also` is another name of the argument. Rows that are not
    `checked` are a run's own choice, or follow from the tensors' shapes.
    """

    arg: str
    say: Callable[[Model], Any]
    read: Callable[[RunArgs], Any]
    flag: Callable[[Any], str | None] = lambda value: None
    also: str | None = None
    checked: bool = True


def fixed(arg: str, value: Any, *others: Any) -> Row:
    """Make a row of an argument that one value alone is converted for; `others` mean the same."""

    def read(args: RunArgs) -> Any:
        found = args.values.get(arg)
        alike = any(found is same or (type(found) is type(same) and found == same) for same in (value, *others, None))
        return value if alike else found

    return Row(arg, lambda model: value, read)


def _size(arg: str, name: str) -> Row:
    return Row(arg, lambda model: model.sizes[name], lambda args: args.whole(arg))


def _flagged(name: str) -> Callable[[Any], str | None]:
    return lambda value: name if value else None


def _given(name: str, default: Any = None) -> Callable[[Any], str | None]:
    return lambda value: None if value in (default, None) else f"{name} {value}"


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


def _listed(name: str) -> Callable[[Any], str | None]:
    return lambda value: None if value is None else f"{name} '[{','.join(map(str, value))}]'"


def _whole_if_it_is(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value


def _router(model: Model) -> Router:
    assert model.compute.router is not None
    return model.compute.router


def limited(router: Router) -> bool:
    """Say whether a token's experts are confined to some of the groups."""
    return router.group_top_k < router.groups


MODEL: tuple[Row, ...] = (
    _size("num_layers", "layers"),
    _size("hidden_size", "hidden"),
    _size("num_attention_heads", "heads"),
    Row("num_query_groups", lambda m: m.sizes["kv_heads"], query_groups),
    Row("group_query_attention", lambda m: m.sizes["kv_heads"] != m.sizes["heads"], query_groups),
    _size("kv_channels", "head_dim"),
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
        _given("--norm-epsilon", 1e-5),
        also="layernorm_epsilon",
    ),
    Row("add_qkv_bias", lambda m: m.has("attention.q.bias"), lambda args: args.flag("add_qkv_bias")),
    Row(
        "qk_layernorm",
        lambda m: m.has("attention.q_norm"),
        lambda args: args.flag("qk_layernorm"),
        _flagged("--qk-layernorm"),
    ),
    Row("window_size", _say_window, windows, lambda v: v and f"--window-size {v[0]},{v[1]}"),
    Row("window_attn_skip_freq", _say_skip, windows, _listed("--window-attn-skip-freq")),
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
    fixed("swiglu", True),
    fixed("squared_relu", False),
    fixed("quick_geglu", False),
    fixed("add_bias_linear", False),
    fixed("rotary_interleaved", False),
    fixed("apply_layernorm_1p", False),
    fixed("layernorm_zero_centered_gamma", False),
    fixed("apply_query_key_layer_scaling", False),
    fixed("multi_latent_attention", False),
    fixed("qk_l2_norm", False),
    fixed("mtp_num_layers", None, 0),
    fixed("heterogeneous_layers_config_path", None),
    fixed("heterogeneous_layers_config_encoded_json", None, ""),
    fixed("linear_attention_freq", None),
    fixed("no_rope_freq", None),
    fixed("softmax_type", "vanilla"),
    fixed("attention_output_gate", False),
)


def _say_interpolation(model: Model) -> int | None:
    rope = model.compute.rope
    return int(rope.parameters["factor"]) if rope.kind == "linear" else None


def yarn_factor(rope: Rope, max_positions: int) -> float:
    """Give yarn's factor; where a config has none it is the ratio of the lengths."""
    original = rope.parameters["original_max_position_embeddings"]
    return float(rope.parameters.get("factor", max_positions / original))


ROPE: tuple[Row, ...] = (
    Row(
        "position_embedding_type",
        lambda m: "yarn" if m.compute.rope.kind == "yarn" else "rope",
        lambda args: args.text("position_embedding_type", "learned_absolute"),
    ),
    Row("rotary_base", lambda m: _whole_if_it_is(m.compute.rope.theta), lambda args: args.number("rotary_base", 1e4)),
    Row("rotary_percent", lambda m: m.compute.rope.share, lambda args: args.number("rotary_percent", 1.0)),
    Row(
        "rotary_seq_len_interpolation_factor",
        _say_interpolation,
        lambda args: args.number("rotary_seq_len_interpolation_factor", 1.0),
        _given("--rotary-seq-len-interpolation-factor"),
    ),
    Row(
        "use_rope_scaling",
        lambda m: m.compute.rope.kind == "llama3",
        lambda args: args.flag("use_rope_scaling"),
        _flagged("--use-rope-scaling"),
    ),
    Row(
        "rope_scaling_factor",
        lambda m: m.compute.rope.parameters["factor"] if m.compute.rope.kind == "llama3" else LLAMA3_FACTOR,
        lambda args: args.number("rope_scaling_factor", LLAMA3_FACTOR) if args.flag("use_rope_scaling") else None,
        _given("--rope-scaling-factor", LLAMA3_FACTOR),
    ),
)


def _mscales(model: Model) -> tuple[float, float]:
    """Give yarn's two scales of the attention; transformers heeds them only where both are set."""
    both = [model.compute.rope.parameters.get(name) for name in ("mscale", "mscale_all_dim")]
    return (float(both[0]), float(both[1])) if both[0] and both[1] else (1.0, 0.0)


def _yarn(name: str, silent: Any) -> Callable[[Model], Any]:
    return lambda model: model.compute.rope.parameters.get(name, silent)


YARN: tuple[Row, ...] = (
    Row(
        "rotary_scaling_factor",
        lambda m: yarn_factor(m.compute.rope, m.compute.max_positions),
        lambda args: args.number("rotary_scaling_factor", 1.0),
        _given("--rotary-scaling-factor", 1.0),
    ),
    Row(
        "yarn_original_max_position_embeddings",
        _yarn("original_max_position_embeddings", None),
        lambda args: args.whole("yarn_original_max_position_embeddings", 4096),
        _given("--yarn-original-max-position-embeddings", 4096),
    ),
    Row(
        "yarn_beta_fast",
        _yarn("beta_fast", 32.0),
        lambda args: args.number("yarn_beta_fast", 32.0),
        _given("--yarn-beta-fast", 32.0),
    ),
    Row(
        "yarn_beta_slow",
        _yarn("beta_slow", 1.0),
        lambda args: args.number("yarn_beta_slow", 1.0),
        _given("--yarn-beta-slow", 1.0),
    ),
    Row("mscale", lambda m: _mscales(m)[0], lambda args: args.number("mscale", 1.0), _given("--mscale", 1.0)),
    Row(
        "mscale_all_dim",
        lambda m: _mscales(m)[1],
        lambda args: args.number("mscale_all_dim", 0.0, above=-1.0),
        _given("--mscale-all-dim", 0.0),
    ),
    Row(
        "yarn_correction_range_round_to_int",
        _yarn("truncate", True),
        lambda args: args.flag("yarn_correction_range_round_to_int", True),
        lambda value: None if value else "--no-yarn-correction-range-round-to-int",
    ),
)
MOE: tuple[Row, ...] = (
    Row("moe_layer_freq", _say_layers, moe_layers),
    Row(
        "moe_ffn_hidden_size",
        lambda m: m.width("expert"),
        lambda args: args.whole("moe_ffn_hidden_size", args.whole("ffn_hidden_size")),
    ),
    _size("moe_router_topk", "top_k"),
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
        _given("--moe-router-num-groups"),
    ),
    Row(
        "moe_router_group_topk",
        lambda m: _router(m).group_top_k if limited(_router(m)) else None,
        lambda args: groups(args)[1],
        _given("--moe-router-group-topk"),
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
        _flagged("--moe-shared-expert-gate"),
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
    yarn = YARN if model.compute.rope.kind == "yarn" else ()
    return (*MODEL, *ROPE, *yarn, EXPERTS, *(MOE if model.compute.router is not None else ()))
