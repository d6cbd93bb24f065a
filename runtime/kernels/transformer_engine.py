"""Transformer Engine beside torch, in one process with one cuDNN."""

from __future__ import annotations

import ctypes
import functools
import importlib
import warnings
from pathlib import Path
from typing import Any

import torch

_MAPS = Path("/proc/self/maps")


@functools.cache
def import_transformer_engine() -> Any:
    """Import `transformer_engine.pytorch`.

    Its library asks for parts of cuDNN by their names, and the loader finds the machine's, where there are some, rather than those
    that came with torch; parts of two versions don't fit together. What is loaded already is taken, so torch's are loaded first.

    Raises:
        ImportError: it isn't installed.
        OSError: it is built for another torch or CUDA.
    """
    load_cudnn()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other frameworks that are installed, and for which it isn't built
        return importlib.import_module("transformer_engine.pytorch")


def load_cudnn() -> None:
    """Load all parts of the cuDNN that torch has, where whoever asks for them by name finds them."""
    for part in cudnn_parts():
        ctypes.CDLL(str(part), mode=ctypes.RTLD_GLOBAL)


def cudnn_parts() -> list[Path]:
    """Give the libraries beside the cuDNN that torch has loaded; none where it has none, or none of its own."""
    if torch.backends.cudnn.version() is None or not _MAPS.exists():  # type: ignore[no-untyped-call]
        return []
    loaded = (Path(line.split()[-1]) for line in _MAPS.read_text().splitlines() if "/libcudnn" in line)
    folder = next((path.parent for path in loaded), None)
    return [] if folder is None else sorted(folder.glob("libcudnn*.so.9"))
