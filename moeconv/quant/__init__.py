"""Casts between quantised and plain weights, and who can't take quantised ones."""

from __future__ import annotations

from moeconv.errors import MappingError
from moeconv.families.base import Model

# What `--dtype` takes: its name in config.json, and the safetensors dtype of the weights.
PLAIN = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
FP8 = "fp8"


def require_plain(model: Model, where: object, doing: str, instead: str = "") -> None:
    """Refuse a checkpoint with quantised weights.

    Args:
        model: its model.
        where: the checkpoint, for the message.
        doing: what can't be done with it, as `upcycling`.
        instead: what can be done with it as it is, behind the remedy.

    Raises:
        MappingError: it has some.
    """
    if model.quantised:
        name = model.scheme.name if model.scheme is not None else "quantised"
        raise MappingError(
            f"{where}: holds {len(model.quantised)} weights as {name}; {doing} needs plain ones: make them with "
            f"`moeconv import-hf SRC OUT --dtype bfloat16`{instead}"
        )
