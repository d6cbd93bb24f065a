"""The Hugging Face model that a checkpoint's arguments describe: its config.json, for the first family that can hold it."""

from __future__ import annotations

from typing import Any

from moeconv.errors import MappingError
from moeconv.families import FAMILIES
from moeconv.families.base import Model
from moeconv.families.compute import GROUP_BEST, Compute, Gate, Router, yarn_scale
from moeconv.families.inverse import Description, finish, write_config
from moeconv.families.rope import Rope
from moeconv.megatron.arg_positions import LATENT_SIZES, LLAMA3, LLAMA3_FACTOR, YARN_SETTINGS
from moeconv.megatron.arg_table import (
    DROPOUT,
    GATE_ALPHA,
    epsilon,
    groups,
    moe_layers,
    query_groups,
    score,
    windows,
)
from moeconv.megatron.args import RunArgs
from moeconv.megatron.model_args import check_args


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
    if args.flag("multi_latent_attention"):
        sizes |= {"kv_heads": heads, "q_rank": args.whole("q_lora_rank", 0, least=0)}
        sizes |= {name: args.whole(arg, default) for name, arg, default in LATENT_SIZES}
    else:
        sizes |= {"kv_heads": query_groups(args), "head_dim": args.whole("kv_channels", max(hidden // heads, 1))}
    moe, ffn = moe_layers(args), args.whole("ffn_hidden_size", 4 * hidden)
    widths = {"mlp": ffn}
    router = None
    if moe:
        sizes |= {"experts": args.num_experts, "top_k": args.whole("moe_router_topk", 2)}
        widths["expert"] = args.whole("moe_ffn_hidden_size", ffn)
        widths["shared"] = args.whole("moe_shared_expert_intermediate_size", 0, least=0)
        router = _describe_router(args, sizes)
    rope = _describe_rope(args, sizes["head_dim"])
    compute = Compute(
        norm_eps=epsilon(args),
        max_positions=args.whole("max_position_embeddings", args.whole("seq_length", 4096)),
        rope=rope,
        act="silu",
        init_std=args.number("init_method_std", 0.02, above=-1.0),
        windows=windows(args),
        router=router,
        gate=_describe_gate(args),
        attention_scale=yarn_scale(rope, sizes["nope_dim"] + sizes["head_dim"]) if "nope_dim" in sizes else None,
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
        group_best=top_k // chosen if number > 1 else GROUP_BEST,
        bias=args.flag("moe_router_enable_expert_bias"),
        linear_bias=args.flag("add_bias_linear"),
    )


def _describe_gate(args: RunArgs) -> Gate | None:
    if not args.flag("quick_geglu"):
        return None
    if args.get("activation_func_clamp_value") is None:
        raise args.wrong(
            "activation_func_clamp_value", "the largest gate, as 7.0, which models with a quick GeGLU have"
        )
    return Gate(alpha=GATE_ALPHA, limit=args.number("activation_func_clamp_value", 0.0))


def _describe_rope(args: RunArgs, head_dim: int) -> Rope:
    share, theta = args.number("rotary_percent", 1.0), args.number("rotary_base", 1e4)
    if share > 1:
        raise args.wrong("rotary_percent", "a share of each head")
    kind, parameters = "default", {}
    latent = args.flag("multi_latent_attention")
    kind_of = args.text("rope_type", "yarn") if latent else args.text("position_embedding_type", "rope")
    if kind_of == "yarn":
        kind, parameters = "yarn", _describe_yarn(args, latent)
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
    dim = int(head_dim * share)
    return Rope(theta=theta, dim=dim, share=share, kind=kind, parameters=parameters, interleaved=latent)


def _describe_yarn(args: RunArgs, latent: bool) -> dict[str, Any]:
    scale, scale_all = args.number("mscale", 1.0), args.number("mscale_all_dim", 0.0, above=-1.0)
    if not scale_all and scale != 1:
        raise args.wrong("mscale", "1.0 where mscale_all_dim is 0")
    return {
        "factor": args.number("rotary_scaling_factor", 1.0),
        **{
            name: getattr(args, kind)(name if latent else arg, default)
            for arg, (name, kind, _, default) in YARN_SETTINGS.items()
        },
        "truncate": latent or args.flag("yarn_correction_range_round_to_int", True),
        **({"mscale": scale, "mscale_all_dim": scale_all} if scale_all else {}),
    }


def _shapes(
    args: RunArgs, sizes: dict[str, int], widths: dict[str, int], moe: frozenset[int]
) -> dict[str, tuple[int, ...]]:
    """Give the tensors that a model of these arguments has, by role."""
    hidden, vocab = sizes["hidden"], sizes["vocab"]
    out: dict[str, tuple[int, ...]] = {"embedding": (vocab, hidden), "head": (vocab, hidden), "final_norm": (hidden,)}
    out |= {"attention_norm": (hidden,), "mlp_norm": (hidden,)}
    out |= _latent_shapes(sizes) if "kv_rank" in sizes else _attention_shapes(args, sizes)
    biased, turns = args.flag("add_bias_linear"), args.flag("quick_geglu")
    parts = [part for part in ("expert", "shared") if moe and widths[part]]
    parts += ["mlp"] if len(moe) < sizes["layers"] else []
    for part in parts:
        width = widths[part]
        if turns:  # the families with this activation hold gate and up in one matrix, and both transposed
            out |= {f"{part}.gate_up": (hidden, 2 * width), f"{part}.down": (width, hidden)}
            out |= {f"{part}.gate_up.bias": (2 * width,)} if biased else {}
        else:
            out |= {f"{part}.gate": (width, hidden), f"{part}.up": (width, hidden), f"{part}.down": (hidden, width)}
            out |= {f"{part}.gate.bias": (width,), f"{part}.up.bias": (width,)} if biased else {}
        out |= {f"{part}.down.bias": (hidden,)} if biased else {}
    if moe:
        out["router"] = (sizes["experts"], hidden)
        out |= {"router.linear.bias": (sizes["experts"],)} if biased else {}
        out |= {"router.bias": (sizes["experts"],)} if args.flag("moe_router_enable_expert_bias") else {}
        out |= {"shared.router": (1, hidden)} if args.flag("moe_shared_expert_gate") else {}
    return out


def _attention_shapes(args: RunArgs, sizes: dict[str, int]) -> dict[str, tuple[int, ...]]:
    hidden, head = sizes["hidden"], sizes["head_dim"]
    biased = args.flag("add_bias_linear")
    rows_of = {"q": sizes["heads"] * head, "k": sizes["kv_heads"] * head, "v": sizes["kv_heads"] * head}
    out: dict[str, tuple[int, ...]] = {f"attention.{name}": (count, hidden) for name, count in rows_of.items()}
    out["attention.o"] = (hidden, rows_of["q"])
    if biased or args.flag("add_qkv_bias"):
        out |= {f"attention.{name}.bias": (count,) for name, count in rows_of.items()}
    out |= {"attention.o.bias": (hidden,)} if biased else {}
    out |= {f"attention.{name}_norm": (head,) for name in "qk"} if args.flag("qk_layernorm") else {}
    return out | ({"attention.sinks": (sizes["heads"],)} if args.text("softmax_type", "vanilla") == "learnable" else {})


def _latent_shapes(sizes: dict[str, int]) -> dict[str, tuple[int, ...]]:
    hidden, heads, kv_rank, q_rank = sizes["hidden"], sizes["heads"], sizes["kv_rank"], sizes["q_rank"]
    queries = heads * (sizes["nope_dim"] + sizes["head_dim"])
    out: dict[str, tuple[int, ...]] = {
        "attention.kv_a": (kv_rank + sizes["head_dim"], hidden),
        "attention.kv_a_norm": (kv_rank,),
        "attention.kv_b": (heads * (sizes["nope_dim"] + sizes["v_dim"]), kv_rank),
        "attention.o": (hidden, heads * sizes["v_dim"]),
    }
    if not q_rank:
        return out | {"attention.q": (queries, hidden)}
    return out | {
        "attention.q_a": (q_rank, hidden),
        "attention.q_a_norm": (q_rank,),
        "attention.q_b": (queries, q_rank),
    }
