"""The values that adapters start with: PEFT's distributions, drawn by name, so that every layout starts with the same bits.

Source: https://github.com/huggingface/peft/blob/v0.21.0/src/peft/tuners/lora/layer.py (reset_lora_parameters)
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from moeconv.families.adapted import LORA_A, AdaptedModel
from moeconv.layout.rect import Rect
from moeconv.upcycling.draws import Floats, generator


def initial_adapters(model: AdaptedModel, seed: int) -> Callable[[str, Rect], Floats]:
    """Give a reader of adapters that nobody has trained: A uniform in +-1/sqrt(in), B zero, so that they add nothing.

    Args:
        model: has the adapters.
        seed: of the run.

    Returns:
        A function of a matrix's name and a rectangle of it, fp32.
    """

    def read(name: str, rect: Rect) -> Floats:
        tensor = model.tensors[name]
        if not tensor.rule.role.endswith(LORA_A):
            return np.zeros(rect.shape, np.float32)
        drawn = generator(seed, name).random(tensor.shape, np.float32)
        out: Floats = (drawn[rect.slices()] * 2 - 1) / np.float32(np.sqrt(tensor.shape[1]))
        return out

    return read
