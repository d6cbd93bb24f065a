"""PEFT's adapter_config.json: what is read of it, and what is refused by name."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeconv.errors import SourceError
from moeconv.io.decode import brief, parse_json
from moeconv.io.paths import read_inside

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
# Other things than W + scale * B A.
_VARIANTS = (
    *(
        "use_dora",
        "use_qalora",
        "use_bdlora",
        "fan_in_fan_out",
        "lora_bias",
        "layer_replication",
        "trainable_token_indices",
    ),
    *(
        "alora_invocation_tokens",
        "arrow_config",
        "velora_config",
        "kasa_config",
        "monteclora_config",
        "megatron_config",
    ),
)
# Ways to begin that change the base's weights, too.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True, slots=True)
class PeftConfig:
    """The fields that say what a LoRA adapter adds."""

    where: str
    rank: int
    alpha: float
    rslora: bool
    rank_pattern: Mapping[str, Any]
    alpha_pattern: Mapping[str, Any]
    target_parameters: tuple[str, ...]

    def scale(self, name: str, rank: int) -> float:
        """Give the factor on what the adapter of a module or parameter adds.

        Args:
            name: the module's name, or the parameter's.
            rank: that of its matrices.

        Raises:
            SourceError: the config says another rank.
        """
        expected = self._pattern(self.rank_pattern, name, self.rank)
        if rank != expected:
            raise SourceError(f"{self.where}: says rank {brief(expected)} of {name}, whose matrices have rank {rank}")
        alpha = self._pattern(self.alpha_pattern, name, self.alpha)
        return float(alpha / (math.sqrt(rank) if self.rslora else rank))

    def targets(self, parameter: str) -> bool:
        """Say whether a parameter is among `target_parameters`."""
        return any(parameter == target or parameter.endswith(f".{target}") for target in self.target_parameters)

    def _pattern(self, patterns: Mapping[str, Any], name: str, silent: Any) -> Any:
        for pattern, value in patterns.items():
            try:
                found = re.match(rf"(.*\.)?({pattern})$", name)
            except re.error as error:
                raise SourceError(f"{self.where}: {brief(pattern)} is no pattern: {error}") from None
            if found:
                return value
        return silent


def read_config(root: Path) -> PeftConfig:
    """Read the config of a PEFT folder.

    Args:
        root: the folder.

    Returns:
        What it says.

    Raises:
        SourceError: it is malformed, or of another kind of adapter than plain LoRA; names the field.
    """
    where = str(root / CONFIG_FILE)
    value = parse_json(read_inside(root, CONFIG_FILE), where)
    if value.get("peft_type") != "LORA":
        raise SourceError(f"{where}: peft_type is {brief(value.get('peft_type'))}; LORA is what can be merged")
    for key in _VARIANTS:
        if value.get(key):
            raise SourceError(
                f"{where}: {key} is {brief(value[key])}: such an adapter is more than W + scale * B A; merge it with peft"
            )
    begun = str(value.get("init_lora_weights", True))
    if begun.startswith(_CHANGES_BASE):
        raise SourceError(
            f"{where}: init_lora_weights is {brief(begun)}, which changed the model's own weights too; save the adapter with "
            "path_initial_model_for_weight_conversion, which makes plain LoRA of it"
        )
    rank, alpha = value.get("r"), value.get("lora_alpha")
    if type(rank) is not int or rank < 1 or not isinstance(alpha, int | float):
        raise SourceError(f"{where}: r is {brief(rank)} and lora_alpha {brief(alpha)}; expected numbers")
    ranks, alphas = value.get("rank_pattern") or {}, value.get("alpha_pattern") or {}
    parameters = value.get("target_parameters") or []
    numbers = all(
        isinstance(p, dict) and all(type(n) in (int, float) and n > 0 for n in p.values()) for p in (ranks, alphas)
    )
    if not numbers or not isinstance(parameters, list) or not all(isinstance(name, str) for name in parameters):
        raise SourceError(f"{where}: rank_pattern, alpha_pattern or target_parameters is malformed")
    rslora = bool(value.get("use_rslora"))
    return PeftConfig(where, rank, float(alpha), rslora, ranks, alphas, tuple(parameters))
