"""Mixture-of-experts checkpoints between Hugging Face, sharded and Megatron-Core layouts, bit for bit.

    import moeconv

    moeconv.import_hf("mistralai/Mixtral-8x7B-v0.1", "ckpt", moeconv.Degrees(tp=4, ep=4))
    checkpoint = moeconv.open("ckpt")
    checkpoint.tensor("model.norm.weight").numpy()
    checkpoint.rank(tp=1, ep=0)                     # what a rank holds, unread
    checkpoint.load_into(module, rank={"tp": 1})    # into a trainer of your own
    moeconv.export_hf("ckpt", "mixtral-again")

Functions are called as the commands. Planning a training run (`moeconv plan`) is the trainer's: `runtime.estimate`.
Names are resolved when they are first used, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moeconv.api.conversions import export_hf, export_megatron, import_hf, import_megatron, open, reshard
    from moeconv.api.looking import Differences, Verified, diff, inspect, verify
    from moeconv.api.models import export_adapter, merge, upcycle
    from moeconv.api.written import Written
    from moeconv.checkpoint import Checkpoint
    from moeconv.convert import Options
    from moeconv.errors import MoeconvError
    from moeconv.layout.degrees import Degrees
    from moeconv.lazy import LazyTensor
    from moeconv.upcycling.recipe import Recipe

__all__ = [
    "Checkpoint",
    "Degrees",
    "Differences",
    "LazyTensor",
    "MoeconvError",
    "Options",
    "Recipe",
    "Verified",
    "Written",
    "diff",
    "export_adapter",
    "export_hf",
    "export_megatron",
    "import_hf",
    "import_megatron",
    "inspect",
    "merge",
    "open",
    "reshard",
    "upcycle",
    "verify",
]
_WHERE = {
    "moeconv.api.conversions": ("export_hf", "export_megatron", "import_hf", "import_megatron", "open", "reshard"),
    "moeconv.api.looking": ("Differences", "Verified", "diff", "inspect", "verify"),
    "moeconv.api.models": ("export_adapter", "merge", "upcycle"),
    "moeconv.api.written": ("Written",),
    "moeconv.checkpoint": ("Checkpoint",),
    "moeconv.convert": ("Options",),
    "moeconv.errors": ("MoeconvError",),
    "moeconv.layout.degrees": ("Degrees",),
    "moeconv.lazy": ("LazyTensor",),
    "moeconv.upcycling.recipe": ("Recipe",),
}


def __getattr__(name: str) -> Any:
    for module, names in _WHERE.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
