"""Which weights get low-rank adapters: from globs on their Hugging Face names to a model with adapters."""

from __future__ import annotations

from collections.abc import Iterable

from moeconv.families.adapted import ADAPTABLE, AdaptedModel
from moeconv.families.base import CARRIED, GlobalTensor, Model
from runtime.errors import ConfigError, require
from runtime.model.lora import LoraConfig
from runtime.optim.groups import matching, nearest


def adapt(model: Model, config: LoraConfig) -> Model:
    """Put adapters beside a model's weights.

    Args:
        model: the base.
        config: which weights, and of what rank.

    Returns:
        The model with adapters; the model itself where none are asked for.

    Raises:
        ConfigError: a glob fits no weight that can have one, or only some experts of a layer.
    """
    if not config.rank:
        return model
    tensors = {name: t for name, t in model.tensors.items() if t.size and t.rule.role != CARRIED and not t.rule.buffer}
    fit = {name: tensor for name, tensor in tensors.items() if tensor.rule.role in ADAPTABLE}
    if config.targets:
        adapted = {name for pattern in config.targets for name in _targets(pattern, fit, tensors)}
    else:
        adapted = {name for name, tensor in fit.items() if tensor.rule.role.startswith("attention.")}
    whole = {name for pattern in config.also_train for name in _named("--lora-also-train", pattern, tensors)}
    both = sorted(adapted & whole)
    require(
        not both,
        f"--lora-also-train trains {both[0] if both else ''} whole, and --lora-targets gives it an adapter: leave it out of one",
    )
    check_experts(model, adapted, "--lora-targets")
    return AdaptedModel.of(model, config.rank, adapted, whole)


def describe_adapters(model: Model, config: LoraConfig) -> list[str]:
    """Say which weights have adapters, and how many parameters are trained; no line where none have."""
    if not isinstance(model, AdaptedModel):
        return []
    size = sum(tensor.size for name, tensor in model.tensors.items() if name in model.own)
    rest = sum(tensor.size for name, tensor in model.tensors.items() if name not in model.own)
    counts: dict[str, int] = {}
    for name in model.adapted:
        role = model.tensors[name].rule.role
        counts[role] = counts.get(role, 0) + 1
    kinds = ", ".join(f"{count} {role}" for role, count in sorted(counts.items()))
    whole = f"; {len(model.whole)} weights trained whole" if model.whole else ""
    return [
        f"adapters: rank {config.rank}, scale {config.scale:g}, on {len(model.adapted)} weights ({kinds}){whole}; "
        f"{size / 1e6:.3f} M parameters trained, {rest / 1e6:.1f} M frozen"
    ]


def _targets(pattern: str, fit: dict[str, GlobalTensor], tensors: dict[str, GlobalTensor]) -> list[str]:
    found = matching(pattern, fit)
    if not found and (others := matching(pattern, tensors)):
        raise ConfigError(
            f"--lora-targets {pattern}: fits {others[0]}, which can't have an adapter: matrices of attention, dense layers "
            "and experts can. Train it whole with --lora-also-train"
        )
    return found or _named("--lora-targets", pattern, fit)


def _named(flag_: str, pattern: str, names: Iterable[str]) -> list[str]:
    found = matching(pattern, names)
    require(
        bool(found), f"{flag_} {pattern}: no weight of the model has such a name; nearest: {nearest(pattern, names)}"
    )
    return found


def check_experts(model: Model, adapted: set[str], named: str) -> None:
    """Refuse adapters on some experts of a layer: all are one grouped product.

    Args:
        model: the base.
        adapted: names of the adapted weights.
        named: the flag that names them.

    Raises:
        ConfigError: a layer has some; names it.
    """
    counts: dict[tuple[int, str], int] = {}
    for name in adapted:
        tensor = model.tensors[name]
        if tensor.expert is not None and tensor.layer is not None:
            key = (tensor.layer, tensor.rule.role)
            counts[key] = counts.get(key, 0) + 1
    for (layer, role), count in sorted(counts.items()):
        require(
            count == model.sizes["experts"],
            f"{named}: fits {role} of {count} of the {model.sizes['experts']} experts of layer {layer}; adapters go "
            "on all experts of a layer or none. Freeze some with --freeze",
        )
