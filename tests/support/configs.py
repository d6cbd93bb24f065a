"""The families that the trainer computes; with the tiny configs, of every family, that the parity proof takes."""

from __future__ import annotations

from pathlib import Path

from moeconv.families import FAMILIES
from runtime.errors import ConfigError
from runtime.model.support import check_supported
from runtime.parity.configs import tiny_config, tiny_model

__all__ = ["tiny_config", "tiny_model", "trained_families"]


def trained_families() -> list[str]:
    """Give the families that the trainer computes."""
    return [name for name in FAMILIES if _is_trained(name)]


def _is_trained(name: str) -> bool:
    try:
        check_supported(tiny_model(name), Path(name))
    except ConfigError:
        return False
    return True
