"""Arrays as torch tensors, the types included that numpy lacks. Loads torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

# What ml_dtypes calls a type that torch has too -> an integer type of its size, under which the bytes pass.
_PASSES_AS = {"bfloat16": np.int16, "float8_e4m3fn": np.uint8, "float8_e5m2": np.uint8, "float8_e8m0fnu": np.uint8}


def to_tensor(array: npt.NDArray[Any]) -> torch.Tensor:
    """Give an array as a tensor of the same shape and type, on the CPU.

    Args:
        array: numbers of any type of a checkpoint, ml_dtypes' included; a writeable contiguous one is shared, others are copied.

    Returns:
        The tensor.
    """
    array = np.ascontiguousarray(array).reshape(array.shape)  # the former makes one dimension of none
    if not array.flags.writeable:
        array = array.copy()
    name = array.dtype.name
    if name in _PASSES_AS:
        dtype: torch.dtype = getattr(torch, name)
        return torch.from_numpy(array.view(_PASSES_AS[name])).view(dtype)
    return torch.from_numpy(array)
