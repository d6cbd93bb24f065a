"""What Llama-like decoders have in common: the rules of their embeddings, attention, norms and feed-forward parts, as data."""

from __future__ import annotations

from dataclasses import replace

from moeconv.families.base import Alias, Axis, Layers, Split, TensorRule
from moeconv.families.compute import Key, RouterRule

ATTENTION = "model.layers.{layer}.self_attn."
MLP = "model.layers.{layer}.mlp."

SIZES: dict[str, str | tuple[str, ...]] = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "vocab": "vocab_size",
}

# What transformers' Llama, Mistral and Mixtral take where a config names no special tokens.
BOS_EOS = {"bos_token_id": 1, "eos_token_id": 2}

ENDS = (
    TensorRule("embedding", "model.embed_tokens.weight", ("vocab", "hidden"), Split("tp", 0, rounded=True), "first"),
    TensorRule("final_norm", "model.norm.weight", ("hidden",), where="last"),
    TensorRule("head", "lm_head.weight", ("vocab", "hidden"), Split("tp", 0, rounded=True), "last", absent_if="tied"),
)
NORMS = (
    TensorRule("attention_norm", "model.layers.{layer}.input_layernorm.weight", ("hidden",)),
    TensorRule("mlp_norm", "model.layers.{layer}.post_attention_layernorm.weight", ("hidden",)),
)
PROJECTIONS = (
    TensorRule("attention.q", ATTENTION + "q_proj.weight", ("heads*head_dim", "hidden"), Split("tp", 0, "heads")),
    TensorRule("attention.k", ATTENTION + "k_proj.weight", ("kv_heads*head_dim", "hidden"), Split("tp", 0, "kv_heads")),
    TensorRule("attention.v", ATTENTION + "v_proj.weight", ("kv_heads*head_dim", "hidden"), Split("tp", 0, "kv_heads")),
    TensorRule("attention.o", ATTENTION + "o_proj.weight", ("hidden", "heads*head_dim"), Split("tp", 1, "heads")),
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
        TensorRule(
            "attention.q.bias", ATTENTION + "q_proj.bias", ("heads*head_dim",), Split("tp", 0, "heads"), only_if=flag
        ),
        TensorRule(
            "attention.k.bias",
            ATTENTION + "k_proj.bias",
            ("kv_heads*head_dim",),
            Split("tp", 0, "kv_heads"),
            only_if=flag,
        ),
        TensorRule(
            "attention.v.bias",
            ATTENTION + "v_proj.bias",
            ("kv_heads*head_dim",),
            Split("tp", 0, "kv_heads"),
            only_if=flag,
        ),
    )
    return (
        (*rules, TensorRule("attention.o.bias", ATTENTION + "o_proj.bias", ("hidden",), only_if=flag))
        if output
        else rules
    )


def head_norms(flag: str | None = None) -> tuple[TensorRule, ...]:
    """Give the norms of each query and key head; `flag` as for `biases`."""
    return tuple(
        TensorRule(f"attention.{name}_norm", ATTENTION + f"{name}_norm.weight", ("head_dim",), only_if=flag)
        for name in "qk"
    )


def wide_head_norms() -> tuple[TensorRule, ...]:
    """Give the norms over all query heads together, and over all key heads."""
    return tuple(
        TensorRule(f"attention.{q}_norm", ATTENTION + f"{q}_norm.weight", (f"{heads}*head_dim",), Split("tp", 0, heads))
        for q, heads in (("q", "heads"), ("k", "kv_heads"))
    )


def only(layers: Layers, rules: tuple[TensorRule, ...]) -> tuple[TensorRule, ...]:
    """Give rules for layers of one kind."""
    return tuple(replace(rule, layers=layers) for rule in rules)


def feed_forward_biases(part: str, prefix: str, size: str, *, flag: str, layers: Layers) -> tuple[TensorRule, ...]:
    """Give the biases of a gated feed-forward part; arguments as of `feed_forward`, `flag` as of `biases`."""
    split = Split("tp", 0)
    return (
        TensorRule(f"{part}.gate.bias", f"{prefix}gate_proj.bias", (size,), split, only_if=flag, layers=layers),
        TensorRule(f"{part}.up.bias", f"{prefix}up_proj.bias", (size,), split, only_if=flag, layers=layers),
        TensorRule(f"{part}.down.bias", f"{prefix}down_proj.bias", ("hidden",), only_if=flag, layers=layers),
    )


def feed_forward(
    part: str,
    prefix: str,
    size: str,
    *,
    layers: Layers = "all",
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
) -> tuple[TensorRule, ...]:
    """Give the three matrices of a gated feed-forward part.

    Args:
        part: what it is: `mlp`, `expert` or `shared`, the first half of its roles.
        prefix: what their names begin with.
        size: the name of the part's width.
        layers: which layers have it, as `TensorRule.layers`.
        names: what the gate, up and down projections are called.

    Returns:
        Their rules.
    """
    axis: Axis = "etp" if part == "expert" else "tp"
    shapes = ((size, "hidden"), (size, "hidden"), ("hidden", size))
    return tuple(
        TensorRule(f"{part}.{role}", f"{prefix}{name}.weight", shape, Split(axis, dim), layers=layers)
        for role, name, shape, dim in zip(("gate", "up", "down"), names, shapes, (0, 0, 1), strict=True)
    )


def router(name: str, *, bias: str | None = None, layers: Layers = "all") -> tuple[TensorRule, ...]:
    """Give the router's matrix, and the stored bias of its choice where it has one; `layers` as `TensorRule.layers`."""
    matrix = TensorRule("router", name, ("experts", "hidden"), layers=layers)
    if bias is None:
        return (matrix,)
    return (matrix, TensorRule("router.bias", bias, ("experts",), layers=layers, buffer=True))


def group_limited(*, normalise: bool, scale: float = 1.0, groups: int = 1, group_top_k: int = 1) -> RouterRule:
    """Give the router of DeepSeek-V3 and its kin: sigmoids, chosen by groups, scaled; the arguments are what a silent config means."""
    return RouterRule(
        score="sigmoid",
        normalise=Key("norm_topk_prob", normalise),
        scale=Key("routed_scaling_factor", scale),
        groups=Key("n_group", groups),
        group_top_k=Key("topk_group", group_top_k),
    )


def fused_experts(
    fused: tuple[str, str] = (MLP + "experts.gate_up_proj", MLP + "experts.down_proj"),
    prefix: str = MLP + "experts.{expert}.",
    names: tuple[str, str, str] = ("gate_proj.weight", "up_proj.weight", "down_proj.weight"),
    *,
    hub: bool = False,
    dim: int = 0,
) -> tuple[Alias, ...]:
    """Give the stacks of all experts' matrices, the form that transformers 5 keeps in memory and writes with save_original_format=False.

    Args:
        fused: their names: gate and up together, and down.
        prefix: what the names of one expert's matrices begin with.
        names: what its gate, up and down projections are called.
        hub: whether checkpoints are published so.
        dim: the dimension of a matrix along which gate and up follow each other.

    Returns:
        The stored forms.
    """
    gate, up, down = (prefix + name for name in names)
    return (
        Alias(fused[0], (gate, up), stack=True, dim=dim, hub=hub),
        Alias(fused[1], (down,), stack=True, hub=hub),
    )


FUSED_EXPERTS = fused_experts()
# Mixtral and its kin call experts w1, w3 and w2, and transformers 5 keeps them under other names.
SPARSE = "model.layers.{layer}.block_sparse_moe."
W132 = ("w1", "w3", "w2")
FUSED_W132 = fused_experts(prefix=SPARSE + "experts.{expert}.", names=("w1.weight", "w3.weight", "w2.weight"))
