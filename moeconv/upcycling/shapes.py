"""The mixture that a recipe asks for: its sizes, whether it keeps the dense model's function, and what is worth saying about it."""

from __future__ import annotations

from math import frexp

from moeconv.errors import RecipeError
from moeconv.families.base import Model
from moeconv.layout.shard import divisors
from moeconv.upcycling.carriers import Shape
from moeconv.upcycling.recipe import Recipe

# What a method does, for the report: f neurons, E copies, G parts a copy, N = E*G experts, T of them for a token.
FORMULAS = {
    "copy": "each expert is the dense feed-forward part",
    "virtual-group": "expert i is part i mod G of the dense feed-forward part; the G experts of a copy share a router row",
    "drop": "each expert is a copy with floor(r*f) neurons drawn anew from N(mean, std) of what they replace",
    "noise": "each expert is a copy plus normal noise",
    "split": "the neurons of the dense feed-forward part, dealt out to experts",
    "mix": "expert e is the feed-forward part of checkpoint e",
    "expand": "expert e is expert e mod N of the source; router rows likewise, plus noise",
}


def dense_shape(recipe: Recipe, source: Model) -> Shape:
    """Work out the sizes of a mixture that is made of a dense model.

    Args:
        recipe: what is asked for.
        source: the dense model.

    Returns:
        The sizes, with the method's defaults filled in.

    Raises:
        RecipeError: they don't fit each other or the model; the message says what does.
    """
    f, num_layers = source.width("mlp"), source.sizes["layers"]
    granularity, method = recipe.granularity, recipe.method
    default = 1 + len(recipe.branches) if method == "mix" else 8 * granularity
    experts = recipe.experts or default
    if experts % granularity:
        raise RecipeError(f"--experts {experts}: must be a multiple of --granularity {granularity}")
    usual = granularity if granularity > 1 else min(experts, max(2, experts // 4 if method == "split" else 2))
    top_k = recipe.top_k or usual
    check_top_k(recipe, top_k, experts)
    parts = experts if method == "split" else granularity + recipe.shared_experts
    if f % parts:
        what = "--experts" if method == "split" else "--granularity plus --shared-experts"
        fits = ", ".join(map(str, divisors(f)[:16]))
        raise RecipeError(
            f"{what} {parts}: {f} neurons can't be cut into {parts} equal parts; numbers that fit: {fits}"
        )
    layers = range(num_layers) if recipe.layers is None else recipe.layers
    for layer in layers:
        if not isinstance(layer, int) or not 0 <= layer < num_layers:
            raise RecipeError(f"--layers: {layer!r} is no layer; the model has layers 0 to {num_layers - 1}")
    if not layers:
        raise RecipeError("--layers: names no layer, so nothing would become a mixture")
    return Shape(
        experts=experts,
        top_k=top_k,
        granularity=granularity,
        shared=recipe.shared_experts,
        width=f // parts,
        layers=frozenset(layers),
        renormalize=recipe.renormalize,
    )


def check_top_k(recipe: Recipe, top_k: int, experts: int) -> None:
    """Refuse a top-k that the experts don't allow, or under which the router never trains.

    Raises:
        RecipeError: it is so.
    """
    if top_k > experts:
        raise RecipeError(f"--top-k {top_k}: there are {experts} experts")
    if top_k == 1 and experts > 1 and recipe.renormalize and not recipe.force:
        raise RecipeError(
            "--top-k 1 with renormalised routing weights: the one weight is always 1, so the language model's loss never trains the router. "
            "Give --top-k 2 or more, --no-renormalize, or --force"
        )


def why_inexact(recipe: Recipe, shape: Shape, factors: dict[str, float]) -> list[str]:
    """List why the mixture does not compute what the dense model computes; empty where it does.

    Args:
        recipe: what is asked for.
        shape: its sizes.
        factors: the factor on each matrix.

    Returns:
        The reasons, in words.
    """
    out = []
    if recipe.method == "drop" and int(recipe.drop_ratio * shape.width + 1e-9):
        out.append(f"drop draws {recipe.drop_ratio:.0%} of each expert's neurons anew")
    if recipe.method == "noise" and recipe.noise_std != 0:
        out.append("noise changes the experts")
    if recipe.method == "mix":
        out.append("mix joins several models")
    if recipe.method == "split" and shape.top_k < shape.experts:
        out.append(f"split leaves out the neurons of {shape.experts - shape.top_k} of {shape.experts} experts")
    elif recipe.method == "split" and recipe.router_std != 0:
        out.append("the router weighs the parts unevenly (give --router-std 0 for an even one)")
    if recipe.method != "split" and shape.top_k % shape.granularity:
        out.append(
            f"--top-k {shape.top_k} is no multiple of --granularity {shape.granularity}: some parts of the feed-forward part count twice"
        )
    if not shape.renormalize:
        out.append(
            "without renormalisation the routing weights' sum varies from token to token; the factor holds for an even router"
        )
    total = shape.experts if recipe.method == "split" else shape.granularity
    if recipe.scale_placement == "none" and total > 1:
        out.append(f"unscaled: each part counts for 1/{total} of what it does in the dense model")
    if factors["gate"] != 1:
        out.append("a factor before the activation function is no factor after it (--scale-placement all)")
    return out


def lossless(factors: dict[str, float]) -> bool:
    """Say whether the factors change nothing but exponents, so that they are exact in any floating type."""
    return all(frexp(factor)[0] == 0.5 for factor in factors.values())


def advice(recipe: Recipe, shape: Shape, exact: bool) -> list[str]:
    """List what the papers and measurements teach about such a mixture.

    Args:
        recipe: what is asked for.
        shape: its sizes.
        exact: whether it keeps the dense model's function.

    Returns:
        Sentences for the user.
    """
    out = []
    if exact and recipe.method in ("copy", "virtual-group") and shape.renormalize:
        what = "experts" if shape.granularity == 1 else "copies"
        out.append(
            f"the {what} that a token can choose between are identical, so the language model's loss gives the router no gradient between {what} "
            "at first, and more as they drift apart; --method noise or drop makes them differ from the start"
        )
    if shape.granularity > 1:
        out.append(
            "training moves the router rows of a copy apart, after which a token may mix parts of several copies; "
            "compute router logits in fp32: in bf16 ties make some 0.4% of tokens do so from the start"
        )
    if recipe.method == "split":
        out.append("split shares out the dense model's capacity: it saves compute and needs training to recover")
    return out
