"""The work that the systems of `benchmarks.train_step --peers` do: slices of models, and how ranks share them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

POSITIONS = 4096
Step = Callable[[], object]
MakeStep = Callable[[int], Step]
"""From a number of micro-batches to what does a step of them."""


@dataclass(frozen=True)
class Slice:
    """Some layers of a model."""

    layers: int
    hidden: int
    ffn: int
    experts: int
    """0: the layers are dense."""
    topk: int
    """1 for dense layers."""
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    def flops(self, tokens: int) -> float:
        """Forward and backward: 6 for each active weight but the embedding's, and causal attention."""
        attention = self.heads * self.head_dim
        layer = self.topk * 3 * self.hidden * self.ffn + 2 * self.hidden * attention + self.experts * self.hidden
        layer += 2 * self.hidden * self.kv_heads * self.head_dim
        weights = self.layers * layer + self.hidden * self.vocab
        return 6.0 * weights * tokens + self.layers * 6.0 * tokens * POSITIONS * attention


@dataclass(frozen=True)
class Layout:
    """How ranks share the work; tensor parallelism is sequence-parallel, and leaves experts whole."""

    tp: int = 1
    ep: int = 1
    sequences: int = 2
    """Of a micro-batch."""

    @property
    def world(self) -> int:
        """Ranks of this launch."""
        return int(os.environ.get("WORLD_SIZE", "1"))

    @property
    def data_ranks(self) -> int:
        """Ranks with data of their own."""
        return self.world // self.tp

    @property
    def data_rank(self) -> int:
        """Which of them this one is."""
        return int(os.environ.get("RANK", "0")) // self.tp


MODELS = {
    "mixtral": Slice(2, 4096, 14336, 8, 2, 32, 8, 128, 32000),
    "qwen3": Slice(4, 2048, 768, 128, 8, 32, 4, 128, 151936),
    # Llama 2's 70B, dense: with tensor parallelism its products are large enough to hide what travels.
    "llama": Slice(2, 8192, 28672, 0, 1, 64, 8, 128, 32000),
}


def join_ranks() -> None:
    """Let the ranks of a launch meet; one alone meets itself, since Megatron-Core wants process groups."""
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    for name, value in alone.items():
        os.environ.setdefault(name, value)
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl")
