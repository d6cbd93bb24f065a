"""What Llama-like decoders have in common: the rules of their embeddings, attention, norms and feed-forward parts, as data."""

from __future__ import annotations

from moeconv.families.base import EXPERT, Alias, Axis, Layers, Split, TensorRule

ATTENTION = "model.layers.{layer}.self_attn."
MLP = "model.layers.{layer}.mlp."

SIZES: dict[str, str | tuple[str, ...]] = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "heads": "num_attention_heads",
    "kv_heads": ("num_key_value_heads", "num_attention_heads"),
    "head_dim": "head_dim",
    "vocab": "vocab_size",
}

ENDS = (
    TensorRule("model.embed_tokens.weight", ("vocab", "hidden"), Split("tp", 0, rounded=True), "first"),
    TensorRule("model.norm.weight", ("hidden",), where="last"),
    TensorRule("lm_head.weight", ("vocab", "hidden"), Split("tp", 0, rounded=True), "last", absent_if="tied"),
)
NORMS = (
    TensorRule("model.layers.{layer}.input_layernorm.weight", ("hidden",)),
    TensorRule("model.layers.{layer}.post_attention_layernorm.weight", ("hidden",)),
)
MLP_BIASES = (
    TensorRule(MLP + "gate_proj.bias", ("ffn",), Split("tp", 0), only_if="mlp_bias"),
    TensorRule(MLP + "up_proj.bias", ("ffn",), Split("tp", 0), only_if="mlp_bias"),
    TensorRule(MLP + "down_proj.bias", ("hidden",), only_if="mlp_bias"),
)
PROJECTIONS = (
    TensorRule(ATTENTION + "q_proj.weight", ("heads*head_dim", "hidden"), Split("tp", 0, "heads")),
    TensorRule(ATTENTION + "k_proj.weight", ("kv_heads*head_dim", "hidden"), Split("tp", 0, "kv_heads")),
    TensorRule(ATTENTION + "v_proj.weight", ("kv_heads*head_dim", "hidden"), Split("tp", 0, "kv_heads")),
    TensorRule(ATTENTION + "o_proj.weight", ("hidden", "heads*head_dim"), Split("tp", 1, "heads")),
)


def biases(flag: str | None, *, output: bool = False) -> tuple[TensorRule, ...]:
    """Give the biases of the query, key and value projections, and of the output projection.

    Args:
        flag: the family's flag under which they exist; None: always.
        output: whether the output projection has one too.

    Returns:
        Their rules.
    """
    rules = (
        TensorRule(ATTENTION + "q_proj.bias", ("heads*head_dim",), Split("tp", 0, "heads"), only_if=flag),
        TensorRule(ATTENTION + "k_proj.bias", ("kv_heads*head_dim",), Split("tp", 0, "kv_heads"), only_if=flag),
        TensorRule(ATTENTION + "v_proj.bias", ("kv_heads*head_dim",), Split("tp", 0, "kv_heads"), only_if=flag),
    )
    return (*rules, TensorRule(ATTENTION + "o_proj.bias", ("hidden",), only_if=flag)) if output else rules


def head_norms(flag: str | None = None) -> tuple[TensorRule, ...]:
    """Give the norms of each query and key head; `flag` as for `biases`."""
    return tuple(TensorRule(ATTENTION + f"{name}_norm.weight", ("head_dim",), only_if=flag) for name in "qk")


def feed_forward(prefix: str, size: str, *, layers: Layers = "all") -> tuple[TensorRule, ...]:
    """Give the three matrices of a gated feed-forward part.

    Args:
        prefix: what their names begin with; `{expert}` in it makes them an expert's.
        size: the name of the part's width.
        layers: which layers have it, as `TensorRule.layers`.

    Returns:
        Their rules.
    """
    axis: Axis = "etp" if EXPERT in prefix else "tp"

    def rule(name: str, shape: tuple[str, str], dim: int) -> TensorRule:
        return TensorRule(f"{prefix}{name}_proj.weight", shape, Split(axis, dim), layers=layers)

    return (rule("gate", (size, "hidden"), 0), rule("up", (size, "hidden"), 0), rule("down", ("hidden", size), 1))


def roles(**prefixes: str) -> dict[str, str]:
    """Name the three matrices of feed-forward parts by what they do: `mlp="a.b."` gives `mlp.gate` -> `a.b.gate_proj.weight` and so on."""
    return {
        f"{part}.{name}": f"{prefix}{name}_proj.weight"
        for part, prefix in prefixes.items()
        for name in ("gate", "up", "down")
    }


# The form that transformers 5 keeps in memory and writes with save_original_format=False.
FUSED_EXPERTS = (
    Alias(
        MLP + "experts.gate_up_proj",
        (MLP + "experts.{expert}.gate_proj.weight", MLP + "experts.{expert}.up_proj.weight"),
        stack=True,
    ),
    Alias(MLP + "experts.down_proj", (MLP + "experts.{expert}.down_proj.weight",), stack=True),
)
