"""A model's arguments for Megatron, and the model that arguments describe: both from the one table."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import MISSING, fields
from typing import Any

from moeconv.errors import MappingError
from moeconv.families import FAMILIES
from moeconv.families.base import Model
from moeconv.families.compute import Compute, Router
from moeconv.families.inverse import Description, finish, write_config
from moeconv.families.rope import Rope
from moeconv.megatron.arg_table import (
    DROPOUT,
    LLAMA3,
    LLAMA3_FACTOR,
    epsilon,
    groups,
    limited,
    moe_layers,
    query_groups,
    rows,
    score,
    windows,
)
from moeconv.megatron.args import RunArgs, shown


def model_args(model: Model) -> dict[str, Any]:
    """Write the arguments that say what a model is.

    Args:
        model: the model.

    Returns:
        Arguments by name.

    Raises:
        MappingError: the model computes something that no argument says; names each thing.
    """
    wrong = [*_unsaid(model), *(_unsaid_router(model) if model.compute.router is not None else ())]
    if wrong:
        raise MappingError(f"{model.family.name}: Megatron's args can't say {'; '.join(wrong)}")
    said = {row.arg: row.say(model) for row in rows(model)}
    return said | {row.also: said[row.arg] for row in rows(model) if row.also is not None}


def flags(model: Model) -> list[str]:
    """List the flags that Megatron needs besides --use-checkpoint-args: it does not read these arguments back."""
    found = [row.flag(row.say(model)) for row in rows(model)]
    return [flag for flag in found if flag]


def builder_note(model: Model) -> str | None:
    """Say what the arguments say and Megatron-LM's own builder of models leaves out; None where there is nothing."""
    rope = model.compute.rope
    if rope.kind == "llama3" and rope.parameters["factor"] != LLAMA3_FACTOR:
        return f"rope_scaling_factor={rope.parameters['factor']}"
    if rope.kind == "linear":
        return f"seq_len_interpolation_factor={int(rope.parameters['factor'])}"
    return None


def _unsaid(model: Model) -> Iterable[str]:
    compute = model.compute
    if compute.act != "silu":
        yield f"{model.family.compute.act.name} = {compute.act} in a gated feed-forward part (its --swiglu is silu)"
    yield from (f"{name} = {shown(value)}" for name, value in compute.others.items() if name != DROPOUT)
    for field in fields(compute):  # what most models compute alike has a default
        if field.default is not MISSING and getattr(compute, field.name) != field.default:
            yield f"{field.name.replace('_', ' ')}: {shown(getattr(compute, field.name))}"
    rope = compute.rope
    if rope.interleaved:
        yield "rotary positions of neighbouring pairs"
    if rope.kind not in ("default", "linear", "llama3", "yarn"):
        yield f"rotary positions scaled by {rope.kind}"
    if rope.kind == "llama3":
        yield from (
            f"{name} = {rope.parameters[name]} of the rotary positions (it is fixed to {value})"
            for name, value in LLAMA3.items()
            if rope.parameters[name] != value
        )
    if rope.kind == "linear" and not float(rope.parameters["factor"]).is_integer():
        yield f"a factor of {rope.parameters['factor']} on the rotary positions, which is no whole number"
    if rope.kind == "yarn" and rope.share != 1.0:
        yield f"yarn's rotary positions on {rope.share:g} of each head"
    if rope.kind == "yarn" and "attention_factor" in rope.parameters:
        yield "yarn's attention_factor (it is worked out from the factor)"
    for role in ("attention.q_norm", "attention.k_norm"):
        if model.has(role) and model.shape(model.rule(role)) != (model.sizes["head_dim"],):
            yield "norms of all query and key heads at once (its qk-norm is of each head)"
            break


def _unsaid_router(model: Model) -> Iterable[str]:
    router = model.compute.router
    assert router is not None
    if router.experts > 1 and router.top_k == 1 and router.normalise and router.score != "sparsemixer":
        yield f"{model.family.key_of('top_k')} = 1: one expert a token with a routing weight of 1 (it weighs the expert by its score)"
    if router.score == "sigmoid" and router.top_k > 1 and not router.normalise:
        yield "sigmoid routing weights that don't sum to 1"
    if router.score not in ("softmax", "sigmoid"):
        yield f"a router that scores by {router.score}"
    if router.score != "sigmoid" and router.bias:
        yield "a bias of the choice of a router without sigmoids"
    if limited(router) and router.top_k // router.group_top_k != router.group_best:
        taken = router.top_k // router.group_top_k
        yield f"groups of experts valued by their {router.group_best} best (it takes {taken})"
    if limited(router) and router.score == "softmax" and router.normalise:
        yield "groups of experts valued by a softmax over all (it takes the logits)"


def check_args(args: RunArgs, model: Model) -> None:
    """Check that a checkpoint's arguments describe the model of a config.json.

    Raises:
        MappingError: names each argument that says otherwise, with both values.
    """
    written = RunArgs(model_args(model))
    bad = []
    for row in rows(model):
        if row.checked and not args.values.keys().isdisjoint((row.arg, row.also)):
            found, expected = row.read(args), row.read(written)
            if found != expected:
                name = row.arg if row.arg in args.values else row.also
                bad.append(f"{name} {shown(args.values[str(name)])} in args, {shown(row.say(model))} in config.json")
    if bad:
        raise MappingError(
            f"config.json is of another model than the checkpoint: {'; '.join(bad)}. If the args are wrong, pass the "
            "right config.json with --hf-config and --ignore-args"
        )


def config_from_args(args: RunArgs, dtype: str) -> dict[str, Any]:
    """Make the config.json of the Hugging Face model that a checkpoint's arguments describe.

    Args:
        args: the run's arguments.
        dtype: the name of the weights' torch dtype.

    Returns:
        The config of the first family that holds exactly this model.

    Raises:
        MappingError: an argument is missing or means nothing, or no family holds the model.
    """
    config, refused = find_config(args, dtype)
    if config is None:
        raise MappingError(
            f"no family holds the model that the checkpoint's args describe. What each can't hold: {'; '.join(refused)}. "
            "If the args are wrong, pass the right config.json with --hf-config and --ignore-args"
        )
    return config


def find_config(args: RunArgs, dtype: str) -> tuple[dict[str, Any] | None, list[str]]:
    """Find a family for the model that arguments describe.

    Args:
        args: the arguments.
        dtype: the name of the weights' torch dtype.

    Returns:
        The config of the first family that holds exactly this model, None where none does; and in words what each family
        before it can't hold.

    Raises:
        MappingError: an argument is missing or means nothing.
    """
    wanted = _describe(args)
    refused: list[str] = []
    for family in FAMILIES.values():
        if (family.compute.router is not None) == bool(wanted.moe_layers):
            config, problems = write_config(family, wanted)
            if not problems:
                config = finish(family, config, dtype)
                check_args(args, Model.from_config(family, config))
                return config, refused
            refused.append(f"{family.name}: {', '.join(problems)}")
    return None, refused


def _describe(args: RunArgs) -> Description:
    sizes = {
        "layers": args.num_layers,
        "hidden": args.whole("hidden_size"),
        "heads": args.whole("num_attention_heads"),
        "vocab": args.whole("vocab_size"),
    }
    hidden, heads = sizes["hidden"], sizes["heads"]
    sizes |= {"kv_heads": query_groups(args), "head_dim": args.whole("kv_channels", max(hidden // heads, 1))}
    moe, ffn = moe_layers(args), args.whole("ffn_hidden_size", 4 * hidden)
    widths = {"mlp": ffn}
    router = None
    if moe:
        sizes |= {"experts": args.num_experts, "top_k": args.whole("moe_router_topk", 2)}
        widths["expert"] = args.whole("moe_ffn_hidden_size", ffn)
        widths["shared"] = args.whole("moe_shared_expert_intermediate_size", 0, least=0)
        router = _describe_router(args, sizes)
    compute = Compute(
        norm_eps=epsilon(args),
        max_positions=args.whole("max_position_embeddings", args.whole("seq_length", 4096)),
        rope=_describe_rope(args, sizes["head_dim"]),
        act="silu",
        init_std=args.number("init_method_std", 0.02, above=-1.0),
        windows=windows(args),
        router=router,
        others={DROPOUT: dropout} if (dropout := args.number(DROPOUT, 0.0, above=-1.0)) else {},
    )
    shapes = _shapes(args, sizes, widths, moe)
    tied = not args.flag("untie_embeddings_and_output_weights")
    return Description(sizes=sizes, widths=widths, shapes=shapes, moe_layers=moe, tied=tied, compute=compute)


def _describe_router(args: RunArgs, sizes: dict[str, int]) -> Router:
    kind, top_k = score(args), sizes["top_k"]
    if kind not in ("softmax", "sigmoid"):
        raise args.wrong("moe_router_score_function", "softmax or sigmoid")
    number, chosen = groups(args)
    return Router(
        experts=sizes["experts"],
        top_k=top_k,
        score="sigmoid" if kind == "sigmoid" else "softmax",
        normalise=top_k > 1 if kind == "sigmoid" else not args.flag("moe_router_pre_softmax"),
        scale=args.number("moe_router_topk_scaling_factor", 1.0),
        groups=number,
        group_top_k=chosen,
        group_best=top_k // chosen if number > 1 else 2,
        bias=args.flag("moe_router_enable_expert_bias"),
    )


def _describe_rope(args: RunArgs, head_dim: int) -> Rope:
    share, theta = args.number("rotary_percent", 1.0), args.number("rotary_base", 1e4)
    if share > 1:
        raise args.wrong("rotary_percent", "a share of each head")
    kind, parameters = "default", {}
    if args.text("position_embedding_type", "rope") == "yarn":
        kind, parameters = "yarn", _describe_yarn(args)
    elif args.flag("use_rope_scaling"):
        kind, parameters = "llama3", {"factor": args.number("rope_scaling_factor", LLAMA3_FACTOR), **LLAMA3}
    if kind == "llama3" and parameters["factor"] != LLAMA3_FACTOR:
        raise args.wrong(
            "rope_scaling_factor", f"{LLAMA3_FACTOR}, which Megatron-LM's builder takes whatever its flag says"
        )
    if args.number("rotary_seq_len_interpolation_factor", 1.0) != 1:
        raise args.wrong(
            "rotary_seq_len_interpolation_factor", "none: Megatron-LM's builders differ in whether they use it"
        )
    return Rope(theta=theta, dim=int(head_dim * share), share=share, kind=kind, parameters=parameters)


def _describe_yarn(args: RunArgs) -> dict[str, Any]:
    scale, scale_all = args.number("mscale", 1.0), args.number("mscale_all_dim", 0.0, above=-1.0)
    if not scale_all and scale != 1:
        raise args.wrong("mscale", "1.0 where mscale_all_dim is 0")
    return {
        "factor": args.number("rotary_scaling_factor", 1.0),
        "original_max_position_embeddings": args.whole("yarn_original_max_position_embeddings", 4096),
        "beta_fast": args.number("yarn_beta_fast", 32.0),
        "beta_slow": args.number("yarn_beta_slow", 1.0),
        "truncate": args.flag("yarn_correction_range_round_to_int", True),
        **({"mscale": scale, "mscale_all_dim": scale_all} if scale_all else {}),
    }


def _shapes(
    args: RunArgs, sizes: dict[str, int], widths: dict[str, int], moe: frozenset[int]
) -> dict[str, tuple[int, ...]]:
    """Give the tensors that a model of these arguments has, by role."""
    hidden, head, vocab = sizes["hidden"], sizes["head_dim"], sizes["vocab"]
    rows_of = {"q": sizes["heads"] * head, "k": sizes["kv_heads"] * head, "v": sizes["kv_heads"] * head}
    out: dict[str, tuple[int, ...]] = {"embedding": (vocab, hidden), "head": (vocab, hidden), "final_norm": (hidden,)}
    out |= {"attention_norm": (hidden,), "mlp_norm": (hidden,), "attention.o": (hidden, rows_of["q"])}
    out |= {f"attention.{name}": (count, hidden) for name, count in rows_of.items()}
    if args.flag("add_qkv_bias"):
        out |= {f"attention.{name}.bias": (count,) for name, count in rows_of.items()}
    if args.flag("qk_layernorm"):
        out |= {f"attention.{name}_norm": (head,) for name in "qk"}
    parts = [part for part in ("expert", "shared") if moe and widths[part]]
    parts += ["mlp"] if len(moe) < sizes["layers"] else []
    for part in parts:
        width = widths[part]
        out |= {f"{part}.gate": (width, hidden), f"{part}.up": (width, hidden), f"{part}.down": (hidden, width)}
    if moe:
        out["router"] = (sizes["experts"], hidden)
        out |= {"router.bias": (sizes["experts"],)} if args.flag("moe_router_enable_expert_bias") else {}
        out |= {"shared.router": (1, hidden)} if args.flag("moe_shared_expert_gate") else {}
    return out
