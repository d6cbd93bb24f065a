"""What each key of a family's config.json is: honoured, knowingly without effect, or refused where it has another value than one.

What is honoured and refused follows from the family's data; what has no effect is listed here for all families, and in
`Family.harmless` for one. Other keys are unknown: transformers reads none of them either, so they are listed for the user to judge.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any, Literal

from moeconv.families.base import Family
from moeconv.families.compute import FIXED, Key
from moeconv.families.layers import pattern_keys
from moeconv.families.rope import ORIGINAL

State = Literal["honoured", "harmless", "refused"]

SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
DTYPE = ("dtype", "torch_dtype")
LAYER_TYPES = "layer_types"
NOISE = ("router_jitter_noise", "input_jitter_noise")  # factors on what experts or routers see, in training alone
AUX_LOSS = "router_aux_loss_coef"  # of a loss that transformers adds where it is asked to return router logits
QUANTISED = "quantization_config"  # converts where its parts are known; whoever computes refuses it
ROPE = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", ORIGINAL)
# Keys of all families that change nothing that a forward and a backward pass compute, by what they are about.
HARMLESS: Mapping[str, tuple[str, ...]] = {
    "names and versions": (
        *("architectures", "transformers_version", "auto_map", "tokenizer_class"),
        *("name_or_path", "_name_or_path", "_commit_hash"),
    ),
    "special tokens, which the data have": (*SPECIAL_TOKENS, "sep_token_id"),
    "what a call returns": (
        *("use_cache", "return_dict", "use_return_dict", "output_attentions", "output_hidden_states"),
        "output_router_logits",
    ),
    "kernels": (
        *("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation"),
        *("pretraining_tp", "gradient_checkpointing"),
    ),
    "the type of the weights, which the tensors have": DTYPE,
    "a loss that the trainer has a flag for (--moe-aux-loss-coeff)": (AUX_LOSS,),
    "other tasks": (
        *("id2label", "label2id", "num_labels", "problem_type", "is_encoder_decoder", "is_decoder"),
        *("add_cross_attention", "tie_encoder_decoder", "chunk_size_feed_forward"),
    ),
}  # fmt: skip


def key_states(family: Family) -> dict[str, State]:
    """Give the state of every key that is known in a family's config.json.

    Args:
        family: the family.

    Returns:
        Each key with what it is, by name: `refused` for those that whoever computes needs to have one value.
    """
    states: dict[str, State] = dict.fromkeys((key for keys in HARMLESS.values() for key in keys), "harmless")
    states |= dict.fromkeys(family.harmless, "harmless")
    states |= dict.fromkeys(
        (*FIXED, *family.compute.fixed, *family.compute.same, *family.compute.undescribed, QUANTISED), "refused"
    )
    return dict(sorted((states | dict.fromkeys(_honoured(family), "honoured")).items()))


def known_keys(family: Family) -> frozenset[str]:
    """Give the keys of a family's config that have a state."""
    return frozenset(key_states(family))


def unknown_keys(family: Family, config: Mapping[str, Any]) -> list[str]:
    """List the keys of a config.json that have no state: neither transformers nor this project reads them."""
    return sorted(set(family.language_config(config)) - known_keys(family))


def _honoured(family: Family) -> Iterator[str]:
    compute = family.compute
    yield "model_type"
    yield from ROPE
    yield from pattern_keys(family.dense_layers, family.linear_layers)
    for keys in family.sizes.values():
        yield from (keys,) if isinstance(keys, str) else keys
    yield from map(family.flag_key, family.flags)
    yield from family.mtp
    for rule in (compute, compute.window, compute.router, compute.gate):
        values = [getattr(rule, field.name) for field in fields(rule)] if rule is not None else []
        yield from (value.name for value in values if isinstance(value, Key))
    if compute.window is not None and compute.window.pattern != "all":
        yield LAYER_TYPES
    if compute.router is not None and compute.router.grouped is not None:
        yield compute.router.grouped[0].name
    rope = compute.rope
    yield from (
        key for key in (rope.turned, rope.interleaved[0] if isinstance(rope.interleaved, tuple) else None) if key
    )
