"""The rows of the table of arguments that say rotary positions, and the sizes of latent attention.

Source: https://github.com/NVIDIA/Megatron-LM/blob/d98e8a64/megatron/training/argument_utils.py (_apply_yarn_config_from_args),
megatron/core/transformer/transformer_config.py (MLATransformerConfig) and
.../core/models/common/embeddings/rotary_pos_embedding.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from moeconv.families.base import Model
from moeconv.families.rope import Rope
from moeconv.megatron.arg_row import Row, flagged, given

# What Megatron's rope scaling is fixed to, as a rule of llama3; the factor is an argument.
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
LLAMA3_FACTOR = 8.0


def is_latent(model: Model) -> bool:
    """Say whether a model's attention is multi-head latent attention."""
    return model.has("attention.kv_a")


def _whole_if_it_is(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value


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
        lambda m: "yarn" if m.compute.rope.kind == "yarn" and not is_latent(m) else "rope",
        lambda args: args.text("position_embedding_type", "learned_absolute"),
    ),
    Row("rotary_base", lambda m: _whole_if_it_is(m.compute.rope.theta), lambda args: args.number("rotary_base", 1e4)),
    Row("rotary_percent", lambda m: m.compute.rope.share, lambda args: args.number("rotary_percent", 1.0)),
    Row(
        "rotary_seq_len_interpolation_factor",
        _say_interpolation,
        lambda args: args.number("rotary_seq_len_interpolation_factor", 1.0),
        given("--rotary-seq-len-interpolation-factor"),
    ),
    Row(
        "use_rope_scaling",
        lambda m: m.compute.rope.kind == "llama3",
        lambda args: args.flag("use_rope_scaling"),
        flagged("--use-rope-scaling"),
    ),
    Row(
        "rope_scaling_factor",
        lambda m: m.compute.rope.parameters["factor"] if m.compute.rope.kind == "llama3" else LLAMA3_FACTOR,
        lambda args: args.number("rope_scaling_factor", LLAMA3_FACTOR) if args.flag("use_rope_scaling") else None,
        given("--rope-scaling-factor", LLAMA3_FACTOR),
    ),
)


def mscales(model: Model) -> tuple[float, float]:
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
        given("--rotary-scaling-factor", 1.0),
    ),
    Row("mscale", lambda m: mscales(m)[0], lambda args: args.number("mscale", 1.0), given("--mscale", 1.0)),
    Row(
        "mscale_all_dim",
        lambda m: mscales(m)[1],
        lambda args: args.number("mscale_all_dim", 0.0, above=-1.0),
        given("--mscale-all-dim", 0.0),
    ),
)
# Without latent attention these are arguments; with it they are settings under other names, which no flag reaches.
YARN_SETTINGS: Mapping[str, tuple[str, str, float | None, float]] = {
    "yarn_original_max_position_embeddings": ("original_max_position_embeddings", "whole", None, 4096),
    "yarn_beta_fast": ("beta_fast", "number", 32.0, 32.0),
    "yarn_beta_slow": ("beta_slow", "number", 1.0, 1.0),
}


def _yarn_setting(arg: str, *, latent: bool) -> Row:
    parameter, kind, silent, default = YARN_SETTINGS[arg]
    name = parameter if latent else arg
    flag = given(f"--{arg.replace('_', '-')}", default) if not latent else lambda value: None
    return Row(name, _yarn(parameter, silent), lambda args: getattr(args, kind)(name, default), flag)


YARN_PLAIN: tuple[Row, ...] = (
    *(_yarn_setting(arg, latent=False) for arg in YARN_SETTINGS),
    Row(
        "yarn_correction_range_round_to_int",
        _yarn("truncate", True),
        lambda args: args.flag("yarn_correction_range_round_to_int", True),
        lambda value: None if value else "--no-yarn-correction-range-round-to-int",
    ),
)
YARN_LATENT: tuple[Row, ...] = tuple(_yarn_setting(arg, latent=True) for arg in YARN_SETTINGS)


# The sizes of latent attention, with the arguments and their defaults.
LATENT_SIZES = (
    ("kv_rank", "kv_lora_rank", 32),
    ("nope_dim", "qk_head_dim", 128),
    ("head_dim", "qk_pos_emb_head_dim", 64),
    ("v_dim", "v_head_dim", 128),
)


def _latent_size(name: str, arg: str, default: int) -> Row:
    """An argument of latent attention's sizes, which Megatron reads back from no checkpoint."""
    return Row(arg, lambda m: m.sizes[name], lambda args: args.whole(arg, default), given(f"--{arg.replace('_', '-')}"))


LATENT: tuple[Row, ...] = (
    Row(
        "q_lora_rank",
        lambda m: m.sizes["q_rank"] or None,
        lambda args: args.whole("q_lora_rank", 0, least=0),
        given("--q-lora-rank"),
    ),
    *(_latent_size(*size) for size in LATENT_SIZES),
    Row(
        "rope_type",
        lambda m: "yarn" if m.compute.rope.kind == "yarn" else "rope",
        lambda args: args.text("rope_type", "yarn"),
        given("--rope-type", "yarn"),
    ),
)
