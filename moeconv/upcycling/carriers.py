"""Carriers: the families of mixtures that can hold a dense model's layers, what each can't hold, and their config.json.

All of it follows from the roles of two families' tensors and from what they compute.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from moeconv.errors import RecipeError
from moeconv.families import FAMILIES
from moeconv.families.base import Family, Model
from moeconv.families.compute import Router
from moeconv.families.inverse import CARRIED, Description, shapes_of, write_config
from moeconv.families.key_states import unknown_keys

# In the order of preference.
CARRIERS = {name: family for name, family in FAMILIES.items() if family.compute.router is not None}
SOURCES = {name: family for name, family in FAMILIES.items() if family.compute.router is None}


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """The sizes of the mixture: routed experts of a layer, those a token uses, shared ones, their common width, the layers that have them."""

    experts: int
    top_k: int
    granularity: int
    shared: int
    width: int
    layers: frozenset[int]
    renormalize: bool = True


def describe_mixture(carrier: Family, source: Model, shape: Shape) -> Description:
    """Say what a carrier has to hold.

    Args:
        carrier: the carrier, whose own score function is taken: routing weights that sum to 1 do so with either.
        source: the dense model.
        shape: the mixture that is asked for.

    Returns:
        The mixture. What is made with zeros (a bias of the router, a gate on shared experts, of which the down projection makes up) may be there or not.
    """
    assert carrier.compute.router is not None
    hidden, width, shared = source.sizes["hidden"], shape.width, shape.shared * shape.width
    router = Router(
        experts=shape.experts,
        top_k=shape.top_k,
        score=carrier.compute.router.score,
        normalise=shape.renormalize,
        bias=carrier.template("router.bias") is not None,
    )
    shapes = shapes_of(source)
    whole = len(shape.layers) == source.sizes["layers"]
    shapes = {role: size for role, size in shapes.items() if not (whole and role in ("mlp.gate", "mlp.up", "mlp.down"))}
    shapes["router"] = (shape.experts, hidden)
    for part, size in (("expert", width), ("shared", shared)):
        if size:
            shapes |= {f"{part}.gate": (size, hidden), f"{part}.up": (size, hidden), f"{part}.down": (hidden, size)}
    return Description(
        sizes=source.sizes | {"experts": shape.experts, "top_k": shape.top_k},
        widths={"mlp": source.width("mlp"), "expert": width, "shared": shared},
        shapes=shapes,
        moe_layers=shape.layers,
        tied=source.tied,
        compute=replace(source.compute, router=router),
        free=frozenset(("router.bias", "shared.router")),
    )


def fit(carrier: Family, source: Model, shape: Shape) -> tuple[dict[str, Any], list[str]]:
    """Write a carrier's config of a mixture.

    Args:
        carrier: the carrier.
        source: the dense model.
        shape: the mixture that is asked for.

    Returns:
        The config, in which whatever transformers would fill in otherwise is stated; and in words what the carrier can't hold, empty where it holds all.
    """
    written, problems = write_config(carrier, describe_mixture(carrier, source, shape))
    assert carrier.compute.router is not None
    if not shape.renormalize and carrier.compute.router.score != "softmax":
        problems.append("routing weights that are not renormalised")
    tokens = dict.fromkeys(carrier.tokens) | dict(source.family.tokens)
    carried = {key: source.config[key] for key in CARRIED if key in source.config}
    return written | tokens | carried, list(dict.fromkeys(problems))


def choose(name: str | None, source: Model, shape: Shape) -> tuple[Family, dict[str, Any]]:
    """Choose the carrier.

    Args:
        name: its model_type, or None for the first one that holds the source.
        source: the dense model.
        shape: the mixture that is asked for.

    Returns:
        A carrier that holds everything, and its config.json.

    Raises:
        RecipeError: the named carrier, or every one, can't; the message says what, and which carrier can.
    """
    if name is not None and name not in CARRIERS:
        raise RecipeError(f"--carrier {name}: is unknown; carriers are {', '.join(CARRIERS)}")
    found = {key: fit(carrier, source, shape) for key, carrier in CARRIERS.items()}
    able = [key for key, (_, missing) in found.items() if not missing]
    if name is not None and found[name][1]:
        who = f"{', '.join(able)} can" if able else "no carrier can"
        raise RecipeError(
            f"--carrier {name}: can't hold {'; '.join(found[name][1])}; {who} hold this {source.family.name}"
        )
    if not able:
        each = "; ".join(f"{key}: {', '.join(missing)}" for key, (_, missing) in found.items())
        raise RecipeError(f"no carrier can hold this {source.family.name} model so. What each can't hold: {each}")
    chosen = name or able[0]
    return CARRIERS[chosen], found[chosen][0]


def left_out(source: Model) -> list[str]:
    """List the keys of a dense config.json that are in no carrier's, so that their effect, if any, is lost."""
    return unknown_keys(source.family, source.config)
