"""A model's arguments for Megatron, from the one table, and what they can't say."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import MISSING, fields
from typing import Any

from moeconv.errors import MappingError
from moeconv.families.base import Model
from moeconv.families.rope import Rope
from moeconv.megatron.arg_positions import LLAMA3, LLAMA3_FACTOR, YARN_SETTINGS, is_latent
from moeconv.megatron.arg_table import (
    DROPOUT,
    GATE_ALPHA,
    limited,
    rows,
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
    call = "gpt_builder hands this to no model; give its call of GPTModel"
    if rope.kind == "llama3" and rope.parameters["factor"] != LLAMA3_FACTOR:
        return f"Megatron-LM's {call} rope_scaling_factor={rope.parameters['factor']}"
    if rope.kind == "linear":
        return f"Megatron-LM's {call} seq_len_interpolation_factor={int(rope.parameters['factor'])}"
    if is_latent(model) and rope.kind == "yarn":
        said = {row.arg: row.say(model) for row in rows(model)}
        names = [(name, default) for name, _, _, default in YARN_SETTINGS.values() if said[name] != default]
        if names:
            settings = ", ".join(f"{name}={said[name]:g}" for name, _ in names)
            return f"Megatron-LM has no flag for this; give its call of MLATransformerConfig {settings}"
    return None


def _unsaid(model: Model) -> Iterable[str]:
    compute, latent = model.compute, is_latent(model)
    if compute.act != "silu":
        yield f"{model.family.compute.act.name} = {compute.act} in a gated feed-forward part (its --swiglu is silu)"
    yield from (f"{name} = {shown(value)}" for name, value in compute.others.items() if name != DROPOUT)
    said = {"gate", "attention_scale"} if latent else {"gate"}  # yarn's arguments say how latent attention is scaled
    for field in fields(compute):  # what most models compute alike has a default
        value = getattr(compute, field.name)
        if field.default is not MISSING and value != field.default and field.name not in said:
            yield f"{field.name.replace('_', ' ')}: {shown(value)}"
    if compute.gate is not None and model.family.compute.gate is not None and compute.gate.alpha != GATE_ALPHA:
        yield f"{model.family.compute.gate.alpha.name} = {compute.gate.alpha} (its --quick-geglu has {GATE_ALPHA})"
    yield from _unsaid_rope(model)
    for role in ("attention.q_norm", "attention.k_norm"):
        if model.has(role) and model.shape(model.rule(role)) != (model.sizes["head_dim"],):
            yield "norms of all query and key heads at once (its qk-norm is of each head)"
            break
    if latent and compute.latent_norm_eps != compute.norm_eps:
        key = model.family.compute.norm_eps.name
        yield f"{key} = {compute.norm_eps:g}, with {compute.latent_norm_eps:g} in the norms of latent vectors (it has one for all)"


def _unsaid_rope(model: Model) -> Iterable[str]:
    rope, latent = model.compute.rope, is_latent(model)
    if rope.interleaved and not latent:
        yield "rotary positions of neighbouring pairs"
    if latent and not rope.interleaved:
        yield "rotary positions of halves in latent attention (its are of neighbouring pairs)"
    if rope.kind not in ("default", "yarn", *(() if latent else ("linear", "llama3"))):
        yield f"rotary positions scaled by {rope.kind}" + (" in latent attention" if latent else "")
    if rope.kind == "llama3":
        yield from (
            f"{name} = {rope.parameters[name]} of the rotary positions (it is fixed to {value})"
            for name, value in LLAMA3.items()
            if rope.parameters[name] != value
        )
    if rope.kind == "linear" and not float(rope.parameters["factor"]).is_integer():
        yield f"a factor of {rope.parameters['factor']} on the rotary positions, which is no whole number"
    if rope.kind == "yarn":
        yield from _unsaid_yarn(rope, latent)


def _unsaid_yarn(rope: Rope, latent: bool) -> Iterable[str]:
    if rope.share != 1.0:
        yield f"yarn's rotary positions on {rope.share:g} of each head"
    if "attention_factor" in rope.parameters:
        yield "yarn's attention_factor (it is worked out from the factor)"
    if latent and not rope.parameters.get("truncate", True):
        yield "yarn's truncate = false in latent attention (its range of corrections is rounded)"
    if latent and rope.parameters.get("mscale_all_dim") and not rope.parameters.get("mscale"):
        yield "yarn's mscale_all_dim without mscale (it scales positions by both)"


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
