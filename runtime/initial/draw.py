"""A checkpoint that is on no disk: each rectangle of a tensor is drawn when it is read, the same whoever reads it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moeconv.checkpoint import Checkpoint
from moeconv.dtypes import numpy_dtype
from moeconv.errors import SourceError
from moeconv.families.base import GlobalTensor, Model
from moeconv.io.hf_folder import CONFIG
from moeconv.layout.rect import Rect
from moeconv.pieces import TensorInfo
from moeconv.upcycling.draws import normal
from runtime.initial.config import InitConfig

# Columns that are drawn as a matrix of their own, so that whoever holds some columns draws few others. Part of what a seed means.
_TILE = 1024
# Rows that are drawn at a time, so that memory stays bounded whatever a tensor's size; a multiple of the draws' own blocks.
_ROWS = 1024
# Output projections into the residual stream.
_SCALED = frozenset(("attention.o", "mlp.down", "expert.down", "shared.down"))
_DTYPES = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclass(frozen=True, slots=True)
class Spread:
    """How the elements of a tensor are drawn: all of them `mean`, or normal around it."""

    mean: float
    std: float


def spread_of(tensor: GlobalTensor, model: Model, init: InitConfig) -> Spread:
    """Say how a tensor begins.

    Args:
        tensor: the tensor.
        model: its model.
        init: the settings; the deviation of most weights stands in the model's config.

    Returns:
        Norms are 1 and biases 0, but for that of a router's projection; everything else is normal, gpt-oss' sinks included.

    Source:
        https://github.com/NVIDIA/Megatron-LM/blob/core_v0.16.1/megatron/core/transformer/transformer_config.py (init_method,
        output_layer_init_method, embedding_init_method), .../core/utils.py (scaled_init_method_normal),
        .../core/transformer/moe/router.py (reset_parameters) and .../core/transformer/dot_product_attention.py
        (softmax_offset). https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/models/gpt_oss/modeling_gpt_oss.py
        (_init_weights) draws sinks and the router's bias so, too.
    """
    role = tensor.rule.role
    if role.endswith("norm"):
        return Spread(1.0, 0.0)
    if role.endswith(".bias") and role != "router.linear.bias":
        return Spread(0.0, 0.0)
    std = model.compute.init_std
    if role == "embedding" and init.embedding_init_method_std is not None:
        std = init.embedding_init_method_std
    if role in _SCALED and init.use_scaled_init_method:
        std /= math.sqrt(2 * model.sizes["layers"])
    return Spread(0.0, std)


@dataclass(frozen=True)
class DrawnCheckpoint(Checkpoint):
    """A checkpoint whose tensors are drawn: an element depends on the seed, its tensor's name and its place there alone."""

    seed: int = 0
    init: InitConfig = field(default_factory=InitConfig)

    def read(self, name: str, rect: Rect | None = None) -> np.ndarray[Any, Any]:
        """Draw a part of a tensor; may be called by several threads.

        Args:
            name: the tensor's hub name.
            rect: the part; by default the whole tensor.

        Returns:
            An array of the part's shape in the tensor's own dtype.

        Raises:
            SourceError: there is no such tensor.
        """
        if name not in self.tensors:
            raise SourceError(f"{self.root}: the model to be drawn has no tensor {name}")
        info = self.tensors[name]
        rect = rect or Rect.whole(info.shape)
        spread = spread_of(self.model.tensors[name], self.model, self.init)
        dtype = numpy_dtype(info.dtype)
        if spread.std == 0:
            return np.full(rect.shape, spread.mean, dtype)
        std = np.float32(spread.std)
        # A vector is a matrix of one column.
        columns = info.shape[1] if len(info.shape) > 1 else 1
        left, width = (rect.offsets[1], rect.shape[1]) if len(info.shape) > 1 else (0, 1)
        out = np.empty((rect.shape[0], width), dtype)
        for begin in range(left // _TILE * _TILE, left + width, _TILE):
            tile = min(_TILE, columns - begin)
            low, high = max(begin, left), min(begin + tile, left + width)
            for row in range(0, rect.shape[0], _ROWS):
                count = min(_ROWS, rect.shape[0] - row)
                drawn = normal(self.seed, f"{name}\0{begin}", rect.offsets[0] + row, count, tile)
                out[row : row + count, low - left : high - left] = drawn[:, low - begin : high - begin] * std
        return out.reshape(rect.shape)


def drawn_checkpoint(
    root: Path, model: Model, dtype: str, seed: int, init: InitConfig, files: dict[str, bytes]
) -> DrawnCheckpoint:
    """Make the checkpoint that a model without one begins with.

    Args:
        root: what messages call it.
        model: the model.
        dtype: torch's name of the weights' type.
        seed: of the draws.
        init: how weights are drawn.
        files: what every checkpoint of the run carries besides weights: config.json, tokenizer files, ...

    Returns:
        The checkpoint; nothing has been drawn.
    """
    tensors = {
        tensor.name: TensorInfo(tensor.name, "F32" if tensor.rule.buffer else _DTYPES[dtype], tensor.shape)
        for tensor in model.tensors.values()
        if not model.optional(tensor)
    }
    assert CONFIG in files
    return DrawnCheckpoint(
        root=root,
        kind="planned",
        config=dict(model.config),
        model=model,
        tensors=tensors,
        pieces={},
        checksums={},
        carried=(),
        rewritten=files,
        seed=seed,
        init=init,
    )
