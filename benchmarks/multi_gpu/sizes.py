"""What is measured: the model's sizes, the layouts of each number of GPUs, and how many layers fit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from moeconv.families import FAMILIES
from moeconv.families.base import Model
from runtime.data.batch import Batch
from runtime.model.dtypes import DtypeName
from runtime.parallel.degrees import ParallelConfig

MIXTRAL_LAYERS = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """A Mixtral's shape without its depth, and how long each measurement is."""

    hidden: int
    ffn: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab: int
    dtype: DtypeName
    positions: int
    sequences_per_rank: int
    """Of a step; strong scaling takes twice as many for all ranks together, so at least 4 for 8 ranks."""
    warmup: int
    steps: int
    checkpoint_layers: int
    raw_bytes: int
    """Of the largest message, and of what each rank writes to the disk to find its speed."""
    num_experts: int = 8
    topk: int = 2

    def model(self, num_layers: int) -> Model:
        """The architecture with so many layers."""
        return Model.from_config(FAMILIES["mixtral"], self.hub_config(num_layers))

    def hub_config(self, num_layers: int) -> dict[str, Any]:
        """The same as a config.json of the hub."""
        return {
            "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "hidden_size": self.hidden,
            "intermediate_size": self.ffn, "num_hidden_layers": num_layers, "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads, "head_dim": self.head_dim, "vocab_size": self.vocab,
            "num_local_experts": self.num_experts, "num_experts_per_tok": self.topk, "torch_dtype": self.dtype,
        }  # fmt: skip


FULL = Sizes(
    hidden=4096, ffn=14336, num_heads=32, num_kv_heads=8, head_dim=128, vocab=32000, dtype="bfloat16", positions=4096,
    sequences_per_rank=8, warmup=4, steps=4, checkpoint_layers=2, raw_bytes=2**28,
)  # fmt: skip
QWEN3 = replace(FULL, hidden=2048, ffn=768, num_kv_heads=4, vocab=151936, num_experts=128, topk=8)
"""Qwen3-30B-A3B's layers, without the norms of heads."""
QUICK = Sizes(
    hidden=32, ffn=48, num_heads=4, num_kv_heads=2, head_dim=8, vocab=64, dtype="float32", positions=16,
    sequences_per_rank=4, warmup=1, steps=1, checkpoint_layers=2, raw_bytes=2**20,
)  # fmt: skip

SIZES = {"mixtral": FULL, "qwen3": QWEN3, "quick": QUICK}


def layouts(world: int) -> dict[str, dict[str, Any]]:
    """What a user would choose between on so many GPUs of one machine.

    Args:
        world: 1, 2, 4 or 8.

    Returns:
        Name -> fields of `ParallelConfig`, the most usual layout first.
    """
    half = world // 2
    shared = {"use_distributed_optimizer": True}
    if world == 1:
        return {"one GPU": {}}
    with_ep = f" ep{half}" if half > 1 else ""
    return {
        f"ep{world}": {"ep": world} | shared,
        f"tp2{with_ep}": {"tp": 2, "sp": True, "ep": half, "etp": 1 if half > 1 else 2} | shared,
        f"pp2{with_ep}": {"pp": 2, "ep": half} | shared,
        f"dp{world}": shared,
    }


def num_parameters(sizes: Sizes, num_layers: int) -> int:
    """Weights of the whole model."""
    dense, experts, ends = _weights(sizes)
    return num_layers * (dense + experts) + 2 * ends + sizes.hidden


def _weights(sizes: Sizes) -> tuple[int, int, int]:
    """Dense weights and experts of a layer, and the embedding."""
    attention = sizes.hidden * sizes.head_dim * 2 * (sizes.num_heads + sizes.num_kv_heads)
    dense = attention + sizes.hidden * (sizes.num_experts + 2)
    return dense, 3 * sizes.num_experts * sizes.hidden * sizes.ffn, sizes.vocab * sizes.hidden


def state_bytes(sizes: Sizes, num_layers: int, parallel: ParallelConfig, world: int) -> float:
    """Count what one GPU holds between steps, the fullest stage's.

    Args:
        sizes: the model's shape.
        num_layers: its depth.
        parallel: the layout.
        world: number of ranks.

    Returns:
        Bytes of weights, fp32 gradients, masters where they are kept apart, and moments.
    """
    dense, experts, ends = _weights(sizes)
    itemsize: int = getattr(torch, sizes.dtype).itemsize
    whole, shared = itemsize + 4, 12 if itemsize < 4 else 8
    if not parallel.use_distributed_optimizer:
        whole, shared = whole + shared, 0
    expert_ways = parallel.pp * parallel.ep * parallel.etp
    expert_bytes = num_layers * experts / expert_ways * (whole + shared * expert_ways / world)
    dense_ways = parallel.pp * parallel.tp * parallel.cp
    held = (num_layers * dense / parallel.pp + ends * (2 if parallel.pp == 1 else 1)) / parallel.tp
    return expert_bytes + held * (whole + shared * dense_ways / world)


def bytes_needed(sizes: Sizes, num_layers: int, parallel: ParallelConfig, world: int) -> float:
    """Estimate what one GPU must hold in a step of micro-batches of one sequence.

    Arguments as of `state_bytes`; the activations that the backward pass needs come on top of it.
    """
    # Kept of a layer: some 16 vectors a token around attention; of each choice its row and gate and up, one rank
    # having a quarter more of them than the mean. A stage keeps as many micro-batches as there are stages.
    kept = 2 * (16 * sizes.hidden + 1.25 * sizes.topk * (2 * sizes.ffn + 3 * sizes.hidden))
    tokens = sizes.positions / parallel.tp
    return state_bytes(sizes, num_layers, parallel, world) + tokens * (num_layers * kept + 10 * sizes.vocab)


def layers_that_fit(sizes: Sizes, parallel: ParallelConfig, world: int, memory: float) -> int:
    """Find the depth that fills a GPU.

    Args:
        sizes: the model's shape.
        parallel: the layout.
        world: number of ranks.
        memory: bytes that may be filled.

    Returns:
        The largest number of layers that fits, a multiple of the stages and at most Mixtral's; at least one a stage.
    """
    step = parallel.pp
    fitting = [n for n in range(step, MIXTRAL_LAYERS + 1, step) if bytes_needed(sizes, n, parallel, world) <= memory]
    return max(fitting, default=step)


def common_layers(sizes: Sizes, world: int, memory: float) -> int:
    """The depth that fits under each layout of so many GPUs; even, for two stages, where there are several."""
    least = min(layers_that_fit(sizes, ParallelConfig(**p), world, memory) for p in layouts(world).values())
    return least if world == 1 else max(2, least // 2 * 2)


def global_batch(sizes: Sizes, num_sequences: int, step: int) -> list[Batch]:
    """Micro-batches of one sequence of random tokens; the same on every rank."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(sizes.vocab, (num_sequences, 1, sizes.positions + 1), generator=generator)
    return [Batch(tokens=t[:, :-1].contiguous(), labels=t[:, 1:].contiguous()) for t in tokens]
