"""Engines of tiny models in sizes that a GPU's kernels take, and batches for them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from runtime.data.batch import Batch
from runtime.engine import Engine
from runtime.fp8.config import Fp8Config
from runtime.model.context import TORCH_DTYPES
from runtime.model.lora import LoraConfig
from runtime.model.recompute import RecomputeConfig
from runtime.model.targets import adapt
from runtime.moe.config import MoEConfig
from runtime.optim.config import OptimConfig
from runtime.parallel.degrees import ParallelConfig
from runtime.parallel.mesh import ParallelMesh
from runtime.parity.case import initial_reader
from tests.support.configs import tiny_config, tiny_model

# Each config takes those that its family reads.
WIDE = {
    "num_hidden_layers": 3, "hidden_size": 128, "head_dim": 64, "intermediate_size": 128, "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 128, "vocab_size": 256, "q_lora_rank": 64, "kv_lora_rank": 64,
    "qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 32,
}  # fmt: skip


def make_engine(
    dtype: Any,
    device: str,
    granularity: Any = "none",
    family: str = "mixtral",
    lora: LoraConfig | None = None,
    fp8: Fp8Config | None = None,
    *,
    lr: float = 1e-3,
    captures: bool = False,
    **moe: Any,
) -> Engine:
    """Build an engine with initial weights."""
    model = tiny_model(family, **{key: value for key, value in WIDE.items() if key in tiny_config(family)})
    model = adapt(model, lora or LoraConfig())
    options = None
    if model.compute.router is not None:
        losses: dict[str, Any] = {"aux_loss_coeff": (0.02,), "z_loss_coeff": 1e-3}
        options = MoEConfig(router=model.compute.router, **(losses | moe))
    parallel, optim, recompute = ParallelConfig(), OptimConfig(lr=lr), RecomputeConfig(granularity=granularity)
    settings = (TORCH_DTYPES[dtype], parallel, options, optim, recompute, ParallelMesh(parallel), torch.device(device))
    engine = Engine(model, *settings, lora=lora, fp8=fp8, captures=captures)
    engine.load_state(initial_reader(model))
    return engine


def batch(step: int) -> Batch:
    """Rows of one document each."""
    tokens = torch.randint(32, (4, 129), generator=torch.Generator().manual_seed(step))
    return Batch(tokens=tokens[:, :-1].contiguous(), labels=tokens[:, 1:].contiguous())


def packed(step: int) -> Batch:
    """The same rows, cut into documents."""
    plain = batch(step)
    begins = torch.rand(plain.tokens.shape, generator=torch.Generator().manual_seed(step)) < 0.05
    begins[:, 0] = False
    places = torch.arange(begins.shape[1]).expand_as(begins)
    positions = places - torch.where(begins, places, 0).cummax(1).values
    return replace(plain, position_ids=positions, document_ids=begins.cumsum(1, dtype=torch.int32))
