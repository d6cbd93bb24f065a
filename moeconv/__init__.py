"""Mixture-of-experts checkpoints between Hugging Face, sharded and Megatron-Core layouts, bit for bit.

    >>> import moeconv
    >>> moeconv.import_hf("mistralai/Mixtral-8x7B-v0.1", "ckpt", moeconv.Degrees(tp=4, ep=4))
    >>> moeconv.open("ckpt").read("model.layers.0.input_layernorm.weight")
    >>> moeconv.export_hf("ckpt", "mixtral-again")

Names are resolved when they are first used, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moeconv.api import export_hf, import_hf, open, reshard, verify
    from moeconv.checkpoint import Checkpoint
    from moeconv.convert import Options
    from moeconv.errors import MoeconvError
    from moeconv.layout.degrees import Degrees

__all__ = [
    "Checkpoint",
    "Degrees",
    "MoeconvError",
    "Options",
    "export_hf",
    "import_hf",
    "open",
    "reshard",
    "verify",
]
_WHERE = {
    "Checkpoint": "moeconv.checkpoint",
    "Degrees": "moeconv.layout.degrees",
    "MoeconvError": "moeconv.errors",
    "Options": "moeconv.convert",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE.get(name, "moeconv.api")), name)
