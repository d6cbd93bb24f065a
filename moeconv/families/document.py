"""`python -m moeconv.families.document`: what every family is, as the page docs/families.md."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

from moeconv.families import FAMILIES
from moeconv.families.base import Family, TensorRule
from moeconv.families.compute import FIXED, Key
from moeconv.families.key_states import HARMLESS, QUANTISED, key_states
from moeconv.families.wrapped import WRAPPED

HEAD = """# Families

Made from the data in `moeconv/families/` by `python -m moeconv.families.document`; a test holds them equal. To add a family, write its
data file and list it in `families/__init__.py`: the converter, the trainer, upcycling and Megatron's formats ask it by role.
"""


_DENSE = {
    "none": "",
    "listed": "listed",
    "first": "the first ones",
    "types": "listed by kind",
    "between": "outside a range",
    "every": "all but every few",
    "period": "all but every few",
}


def page() -> str:
    """Give the page's text."""
    return "\n".join(
        [
            HEAD,
            *_overview(),
            *_wrapped(),
            *_shared_keys(),
            *(line for family in FAMILIES.values() for line in _family(family)),
        ]
    )


def _overview() -> Iterator[str]:
    yield "| family | `model_type` | attention | experts | router | beside the experts | layers without experts |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for family in FAMILIES.values():
        cells = (family.name, f"`{family.model_type}`", _attention(family), *_experts(family))
        yield f"| {' | '.join(cells)} |"
    yield ""


def _wrapped() -> Iterator[str]:
    yield "## Inside models of several parts"
    yield ""
    yield "Their language models convert like the families above; the other parts go along unread, and the trainer refuses them by name."
    yield ""
    yield "| model | `model_type` | its layers' names | carried |"
    yield "| --- | --- | --- | --- |"
    for family in WRAPPED:
        carried = ", ".join(f"`{name}`" for name in family.carried)
        yield f"| {family.name} | `{family.model_type}` | `{family.template('attention_norm')}` ... | {carried} |"
    yield ""


def _shared_keys() -> Iterator[str]:
    yield "## Keys of config.json"
    yield ""
    yield (
        "Each key is honoured, has knowingly no effect, or is refused by name; a value of the wrong type, names of one size that disagree, and "
        "a layer with a window that has no size are refused too. What a family honours and refuses stands with it below. "
        "`python -m tests.fuzz.config_keys` flips every key of every family and compares with transformers."
    )
    yield ""
    yield f"- Refused in every family, by whoever computes (the trainer, upcycling, export-megatron): {_fixed(FIXED)}; `{QUANTISED}`."
    for what, keys in HARMLESS.items():
        yield f"- Without effect, {what}: {', '.join(f'`{key}`' for key in keys)}."
    yield "- Of the padding token transformers leaves the embedding untrained; the trainer trains every row that the data use."
    yield "- Keys that are not known are read by nobody here, and not by transformers; `moeconv inspect` lists them."
    yield ""


def _fixed(fixed: Mapping[str, object]) -> str:
    return ", ".join(f"`{key}` other than `{json.dumps(value)}`" for key, value in fixed.items())


def _family_keys(family: Family) -> Iterator[str]:
    states = key_states(family)
    yield f"Honoured: {', '.join(f'`{key}`' for key, state in states.items() if state == 'honoured')}."
    compute = family.compute
    refused = [_fixed(compute.fixed)] if compute.fixed else []
    refused += [f"`{key}` other than `{family.key_of(size)}`" for key, size in compute.same.items()]
    if compute.undescribed:
        refused.append(f"whatever {', '.join(f'`{key}`' for key in compute.undescribed)} say")
    if refused:
        yield f"Refused by whoever computes: {', '.join(refused)}."
    if family.harmless:
        yield f"Without effect: {', '.join(f'`{key}`' for key in family.harmless)}."
    yield ""


def _attention(family: Family) -> str:
    roles = {rule.role: rule for rule in family.rules}
    words = ["latent" if "attention.kv_b" in roles else "grouped queries"]
    if any(role.startswith("linear.") for role in roles):
        words.append("linear or state-space attention in most layers")
    if "attention.sinks" in roles:
        words.append("sinks")
    if "attention.q.bias" in roles:
        words.append(_maybe(roles["attention.q.bias"], "biases"))
    norm = roles.get("attention.q_norm")
    if norm is not None:
        words.append(_maybe(norm, "norm of each head" if norm.shape == ("head_dim",) else "norm of all heads together"))
    if family.compute.rope.share not in (None, 1.0):
        words.append("part of each head turned")
    window = family.compute.window
    if window is not None:
        words.append({"all": "window on all layers"}.get(window.pattern, "window by layer") + " (option)")
    return ", ".join(words)


def _maybe(rule: TensorRule, words: str) -> str:
    return words if rule.only_if is None else f"{words} (option)"


def _experts(family: Family) -> tuple[str, str, str, str]:
    rule = family.compute.router
    if rule is None:
        return ("dense", "", "", "")
    stored = family.template("expert.gate") or family.template("expert.gate_up") or ""
    hub = next((alias.name.rsplit(".experts.", 1)[-1] for alias in family.aliases if alias.hub and alias.stack), None)
    words = [rule.score, _choice(rule.normalise, "weights sum to 1", "weights as they are")]
    if isinstance(rule.groups, Key):
        words.append("groups of experts (option)")
    if family.template("router.bias") is not None:
        words.append("stored bias of the choice")
    shared = ""
    if family.template("shared.gate") is not None:
        shared = "shared expert" + (" with a gate" if family.template("shared.router") is not None else "")
    layers = _DENSE[family.dense_layers]
    experts = f"`{hub}` ..., stacked" if hub is not None else f"`{stored.rsplit('{expert}.', 1)[-1]}` ..."
    return (experts, ", ".join(words), shared, layers)


def _choice(value: Key | bool, yes: str, no: str) -> str:
    if isinstance(value, Key):
        return f"{yes if value.silent else no} (option)"
    return yes if value else no


def _family(family: Family) -> Iterator[str]:
    yield f"## {family.name}"
    yield f"`{family.architecture}`; read at {family.source}"
    yield ""
    yield "| role | tensor | shape | split |"
    yield "| --- | --- | --- | --- |"
    for rule in family.rules:
        yield f"| {rule.role} | `{rule.name}` | {' x '.join(rule.shape)} | {_split(rule)}{_condition(family, rule)} |"
    yield ""
    yield "| it computes with | config.json | where it is silent |"
    yield "| --- | --- | --- |"
    for what, key in _keys(family):
        yield f"| {what} | `{key.name}` | {key.silent} |"
    yield f"| rotary base | `rope_theta` | {family.compute.rope.theta:g} |"
    if family.compute.lacks is not None:
        yield f"| what the trainer doesn't compute: {family.compute.lacks} | | |"
    if family.compute.rope.share is not None:
        yield f"| turned share of a head | `partial_rotary_factor` | {family.compute.rope.share:g} |"
    yield ""
    yield from _family_keys(family)


_LAYERS = {
    "moe": "layers with experts",
    "dense": "layers without experts",
    "linear": "layers with linear or state-space attention",
    "full": "layers with softmax attention",
}


def _split(rule: TensorRule) -> str:
    if rule.split is None:
        return "whole on every rank"
    how = f" by {rule.split.units}" if rule.split.units else ", rounded up" if rule.split.rounded else ""
    return f"dim {rule.split.dim} over {rule.split.axis}{how}"


def _condition(family: Family, rule: TensorRule) -> str:
    def key(flag: str) -> str:
        found = family.flags.get(flag) or family.sizes[flag]
        return found if isinstance(found, str) else found[0]

    words = []
    for term in (rule.only_if or "").split("&") if rule.only_if else ():
        words.append(f"only {'without' if term.startswith('!') else 'with'} `{key(term.removeprefix('!'))}`")
    if rule.absent_if is not None:
        words.append(f"may be missing with `{key(rule.absent_if)}`")
    if rule.layers != "all":
        words.append(_LAYERS[rule.layers])
    return f"; {', '.join(words)}" if words else ""


def _keys(family: Family) -> Iterator[tuple[str, Key]]:
    compute = family.compute
    yield "epsilon of the norms", compute.norm_eps
    yield "longest sequence", compute.max_positions
    yield "activation", compute.act
    if compute.window is not None:
        yield "sliding window", compute.window.size
        if compute.window.switch is not None:
            yield "whether there is a window", compute.window.switch
        if compute.window.bound is not None:
            yield "bound of the layers with a window", compute.window.bound
    if compute.router is not None:
        names = ("routing weights sum to 1", "factor on routing weights", "groups of experts", "groups a token")
        values = (compute.router.normalise, compute.router.scale, compute.router.groups, compute.router.group_top_k)
        for name, value in zip(names, values, strict=True):
            if isinstance(value, Key):
                yield name, value
    scales = (
        ("factor on queries times keys", compute.attention_scale),
        ("factor on embeddings", compute.embedding_scale),
        ("factor on what is added to the residual", compute.residual_scale),
        ("divisor of logits", compute.logits_divisor),
    )
    for name, scale in scales:
        if isinstance(scale, Key):
            yield name, scale
    if compute.gate is not None:
        yield "steepness of the experts' gate", compute.gate.alpha
        yield "bound of the experts' gate and up projection", compute.gate.limit


if __name__ == "__main__":
    print(page(), end="")
