"""A mixture into a larger mixture: experts and router rows copied, with noise so that the copies can part."""

from __future__ import annotations

from moeconv.checkpoint import Checkpoint
from moeconv.errors import RecipeError
from moeconv.families.base import GlobalTensor, Model
from moeconv.families.names import fill
from moeconv.layout.rect import Rect
from moeconv.pieces import Piece
from moeconv.upcycling.build import Made
from moeconv.upcycling.neurons import part
from moeconv.upcycling.planned import Planned, assemble, check_source
from moeconv.upcycling.recipe import Recipe
from moeconv.upcycling.shapes import check_top_k
from moeconv.upcycling.steps import AddNoise, Step

_ROUTER_STD = 1e-3


def plan_expand(source: Checkpoint, recipe: Recipe) -> Planned:
    """Plan a mixture with a multiple of another's experts.

    Args:
        source: a mixture's Hugging Face folder.
        recipe: what to make; its method is `expand`.

    Returns:
        The mixture as a checkpoint.

    Raises:
        RecipeError: it can't be done as asked.
    """
    check_source(source, "a mixture of experts")
    sizes = source.model.sizes
    if "experts" not in sizes:
        raise RecipeError(f"{source.root}: {source.family.name} has no experts to copy; leave out --method expand")
    if recipe.carrier not in (None, source.family.model_type) or recipe.layers is not None:
        raise RecipeError(
            "--method expand keeps the source's architecture and layers; leave out --carrier and --layers"
        )
    before, experts = sizes["experts"], recipe.experts or 2 * sizes["experts"]
    if experts % before or experts == before:
        raise RecipeError(
            f"--experts {experts}: expand makes whole copies; give a multiple of {before}, from {2 * before} on"
        )
    top_k = recipe.top_k or sizes["top_k"]
    check_top_k(recipe, top_k, experts)
    config = source.config | {_key(source, "experts"): experts, _key(source, "top_k"): top_k}
    model = Model.from_config(source.family, config)
    made = {t.name: _make(source, recipe, t) for t in model.tensors.values() if _name(source, t) in source.tensors}
    return assemble(
        (source,),
        recipe,
        config,
        model,
        made,
        inexact=tuple(_why_inexact(recipe, source.model, top_k * before == sizes["top_k"] * experts)),
        lossless=True,
        notes=("optimizer state does not fit the copies: start it anew",),
    )


def _key(source: Checkpoint, size: str) -> str:
    keys = source.family.sizes[size]
    return keys if isinstance(keys, str) else next(key for key in keys if source.config.get(key) is not None)


def _name(source: Checkpoint, tensor: GlobalTensor) -> str:
    if tensor.expert is None:
        return tensor.name
    return fill(tensor.rule.name, tensor.layer, tensor.expert % source.model.sizes["experts"])


def _make(source: Checkpoint, recipe: Recipe, tensor: GlobalTensor) -> Made:
    name = _name(source, tensor)
    info = source.tensors[name]
    pieces = [part(source, name, Rect.whole(info.shape), tensor.name)]
    steps: tuple[Step, ...] = ()
    if tensor.rule.shape and tensor.rule.shape[0] == "experts":
        count = info.shape[0]
        inner = (0,) * (len(info.shape) - 1)
        pieces = [_moved(pieces[0], (begin, *inner)) for begin in range(0, tensor.shape[0], count)]
        std = recipe.router_std if recipe.router_std is not None else _ROUTER_STD
        if len(info.shape) == 2 and std:
            steps = (AddNoise(recipe.seed, tensor.name + " noise", std),)
    elif tensor.expert is not None and recipe.noise_std:
        steps = (AddNoise(recipe.seed, tensor.name + " noise", recipe.noise_std),)
    return Made(info.dtype, tuple(pieces), steps, (name,), "noised" if steps else "copied")


def _moved(piece: Piece, offsets: tuple[int, ...]) -> Piece:
    return Piece(piece.tensor, piece.dtype, piece.rect.shifted(offsets), piece.file, piece.begin, piece.strides)


def _why_inexact(recipe: Recipe, source: Model, proportional: bool) -> list[str]:
    out, router = [], source.compute.router
    assert router is not None
    if not proportional:
        out.append("a token's top experts are copies of fewer different ones, unless --top-k grows with --experts")
    if recipe.noise_std:
        out.append("noise changes the experts")
    if recipe.router_std != 0:
        out.append("noise on router rows changes the routing weights (give --router-std 0 for none)")
    if router.groups > 1 or (router.score == "sigmoid" and not router.normalise):
        out.append("groups of experts, or sigmoid weights that are not renormalised, count copies otherwise")
    return out
