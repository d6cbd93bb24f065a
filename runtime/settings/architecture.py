"""What a run's flags say of the model, one row a flag: compared with the checkpoint that it comes from, or what is drawn."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeconv.families.base import Model
from runtime.errors import ConfigError, require


@dataclass(frozen=True, slots=True)
class Fact:
    """A flag that states something of the model."""

    flag: str
    kind: type
    """int, float, str, or bool for a flag without a value."""
    of_model: Callable[[Model], Any]
    """What the checkpoint says of it; None where it says nothing."""
    help: str
    says: Any = True
    """For a flag without a value: what it states."""
    needed: bool = False
    """Without it, flags don't describe a model that could be drawn."""

    def parse(self, text: str) -> Any:
        """Read the flag's value.

        Raises:
            ConfigError: the word is no such value.
        """
        try:
            return self.kind(text)
        except ValueError:
            what = "a whole number" if self.kind is int else "a number"
            raise ConfigError(f"{self.flag} is {text!r}; expected {what}") from None


def _moe_layers(model: Model) -> tuple[int, ...]:
    return tuple(int(layer in model.moe_layers) for layer in range(model.sizes["layers"]))


def _width(role: str, size: str = "") -> Callable[[Model], int]:
    """Give the inner width of a feed-forward part; of another size where the model lacks the part, 0 where it has none."""
    return lambda m: m.shape(m.rule(role))[0] if m.has(role) else m.sizes.get(size, 0)


def _router(name: str) -> Callable[[Model], Any]:
    """Give what the router computes; None for a dense model."""
    return lambda m: getattr(m.compute.router, name) if m.compute.router is not None else None


def _linear_bias(model: Model) -> bool:
    return any(model.has(f"{role}.bias") for role in ("attention.o", "mlp.gate", "mlp.down"))


# The one place that says which property of the model a flag states.
FACTS = (
    Fact("--num-layers", int, lambda m: m.sizes["layers"], "Decoder layers", needed=True),
    Fact("--hidden-size", int, lambda m: m.sizes["hidden"], "Width of the residual stream", needed=True),
    Fact("--ffn-hidden-size", int, _width("mlp.gate", "ffn"), "Inner width of the feed-forward layer, or an expert"),
    Fact("--moe-ffn-hidden-size", int, lambda m: m.sizes["ffn"], "Inner width of an expert"),
    Fact("--num-attention-heads", int, lambda m: m.sizes["heads"], "Attention heads", needed=True),
    Fact(
        "--group-query-attention",
        bool,
        lambda m: m.sizes["kv_heads"] < m.sizes["heads"],
        "Query heads share key/value heads",
    ),
    Fact("--num-query-groups", int, lambda m: m.sizes["kv_heads"], "Key/value heads"),
    Fact("--kv-channels", int, lambda m: m.sizes["head_dim"], "Width of a head"),
    Fact("--vocab-size", int, lambda m: m.sizes["vocab"], "Tokens of the vocabulary, without padding"),
    Fact("--max-position-embeddings", int, lambda m: m.compute.max_positions or None, "Longest sequence", needed=True),
    Fact("--num-experts", int, lambda m: m.sizes.get("experts", 0), "Experts of a MoE layer"),
    Fact("--moe-router-topk", int, lambda m: m.sizes.get("top_k", 0), "Experts that each token is routed to"),
    Fact("--moe-router-score-function", str, _router("score"), "How the router's logits become scores"),
    Fact(
        "--moe-router-pre-softmax",
        bool,
        lambda m: (
            m.compute.router is not None and m.compute.router.score == "softmax" and not m.compute.router.normalise
        ),
        "Routing weights are a softmax over all experts, and don't sum to 1",
    ),
    Fact("--moe-router-topk-scaling-factor", float, _router("scale"), "Factor on the routing weights"),
    Fact("--moe-router-num-groups", int, _router("groups"), "Groups of experts that a token chooses from first"),
    Fact("--moe-router-group-topk", int, _router("group_top_k"), "Groups that a token may use"),
    Fact("--moe-layer-freq", str, _moe_layers, "Which layers have experts: every N-th, or a pattern as [0]*1+[1]*26"),
    Fact(
        "--moe-shared-expert-intermediate-size", int, _width("shared.gate"), "Width of the expert that sees every token"
    ),
    Fact("--moe-shared-expert-gate", bool, lambda m: m.has("shared.router"), "The shared expert has a gate"),
    Fact("--rotary-base", float, lambda m: m.compute.rope.theta, "Base of the rotary frequencies"),
    Fact("--rotary-percent", float, lambda m: m.compute.rope.share, "Share of each head that is turned"),
    Fact("--norm-epsilon", float, lambda m: m.compute.norm_eps, "Epsilon of the norms"),
    Fact("--swiglu", bool, lambda m: m.compute.act == "silu", "The feed-forward layers are SwiGLU"),
    Fact(
        "--disable-bias-linear",
        bool,
        _linear_bias,
        "Linear layers have no bias (query, key, value aside)",
        says=False,
    ),
    Fact("--add-qkv-bias", bool, lambda m: m.has("attention.q.bias"), "Query, key and value have biases"),
    Fact("--qk-layernorm", bool, lambda m: m.has("attention.q_norm"), "Query and key heads are normalised"),
    Fact(
        "--untie-embeddings-and-output-weights",
        bool,
        lambda m: m.tied,
        "The output head is no copy of the embedding",
        says=False,
    ),
)


def check_architecture(stated: Mapping[str, Any], model: Model, where: Path) -> None:
    """Compare what the flags say of the model with the checkpoint.

    Args:
        stated: flag -> its value, for the flags that were given.
        model: the checkpoint's architecture.
        where: the checkpoint, for messages.

    Raises:
        ConfigError: they disagree; names the flag and both values.
    """
    for fact in FACTS:
        if fact.flag not in stated:
            continue
        given, found = stated[fact.flag], fact.of_model(model)
        if fact.kind is bool:
            require(
                found is None or given is not True or found == fact.says,
                f"{fact.flag}: {fact.help[0].lower()}{fact.help[1:]}; in the checkpoint {where} it is not so: "
                "leave the flag out",
            )
            continue
        if fact.flag == "--moe-layer-freq":
            given = _layer_pattern(str(given), len(found))
        require(
            found is None or given == found,
            f"{fact.flag} is {_short(given)}; the checkpoint {where} has {_short(found)}: "
            "give that, or leave the flag out",
        )


def as_arguments(stated: Mapping[str, Any]) -> dict[str, Any]:
    """Give what the flags say of the model as Megatron's arguments.

    Args:
        stated: flag -> its value, for the flags that were given.

    Returns:
        Argument -> value.

    Raises:
        ConfigError: a pattern of layers means nothing.
    """
    said = {fact.flag: stated[fact.flag] for fact in FACTS if fact.flag in stated}
    if "--moe-layer-freq" in said:
        text, layers = str(said["--moe-layer-freq"]), int(said.get("--num-layers", 0))
        said["--moe-layer-freq"] = list(_layer_pattern(text, layers))
    return {flag[2:].replace("-", "_"): value for flag, value in said.items()}


def missing_facts(stated: Mapping[str, Any]) -> list[str]:
    """List the flags without which no model is described."""
    missing = [fact.flag for fact in FACTS if fact.needed and fact.flag not in stated]
    # Megatron takes a single group where only the switch is given, which nobody means.
    alone = "--group-query-attention" in stated and "--num-query-groups" not in stated
    return missing + (["--num-query-groups"] if alone else [])


def _layer_pattern(text: str, num_layers: int) -> tuple[int, ...]:
    """Read Megatron's pattern of layers with experts: a number N for every N-th, or a sum of lists times numbers.

    Source:
        https://github.com/NVIDIA/Megatron-LM/blob/d98e8a6/megatron/training/arguments.py (moe_freq_type) and
        .../megatron/core/models/gpt/gpt_layer_specs.py (moe_layer_freq: layer i has experts where i % N == 0).
    """
    if re.fullmatch(r"[1-9]\d*", text.strip()):
        return tuple(int(layer % int(text) == 0) for layer in range(num_layers))
    pattern: list[int] = []
    for term in text.strip().strip("()").split("+"):
        match = re.fullmatch(r"\(?\[([01](?:,[01])*)\]\)?(?:\*(\d+))?\)?", re.sub(r"\s", "", term))
        if match is None:
            raise ConfigError(f"--moe-layer-freq is {text!r}; expected a number, or a pattern such as [0]*1+[1]*26")
        pattern += [int(bit) for bit in match[1].split(",")] * int(match[2] or 1)
    return tuple(pattern)


def _short(value: Any) -> Any:
    return "".join(map(str, value)) if isinstance(value, tuple) else value
