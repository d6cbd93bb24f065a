"""The bytes that a plan counts are those of the engine's own tensors, for random layouts of every family."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from moeconv.errors import MoeconvError
from moeconv.families import FAMILIES
from moeconv.families.base import Model
from moeconv.placement import Placement
from runtime.engine import Engine
from runtime.estimate.finetuned import is_quantised, workspace_bytes
from runtime.estimate.setup import Setup
from runtime.estimate.state import State, checkpoint_bytes, rank_state
from runtime.model.context import TORCH_DTYPES
from runtime.model.lora import LoraConfig
from runtime.model.recompute import RecomputeConfig
from runtime.model.targets import adapt
from runtime.moe.config import MoEConfig
from runtime.optim.config import OptimConfig
from runtime.optim.groups import resolve_groups
from runtime.parallel.degrees import ParallelConfig
from runtime.parallel.mesh import ParallelMesh
from runtime.parallel.shards import Shard
from runtime.settings.check import check_combinations, check_degrees, check_optimizer, check_types, check_world
from tests.support.configs import tiny_model, trained_families

NUM_LAYOUTS = 50
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"vocab_size": 61},
    {"tie_word_embeddings": True, "vocab_size": 67},
    {"num_key_value_heads": 1},
    {"attention_bias": True, "use_bias": True, "mlp_bias": True},
    {"num_hidden_layers": 8, "first_k_dense_replace": 3},
)
TRAINED: tuple[dict[str, Any], ...] = (
    {},
    {},
    {"freeze": ("*embed_tokens*", "*.layers.0.*")},
    {"no_weight_decay": ("*k_proj*", "*kv_*"), "decoupled_lr": 1e-3},
    {"ema_decay": 0.99, "freeze": ("*norm*",)},
    {"optimizer": "muon"},
    {"freeze": ("*attn*",), "lr_scale": ("*.layers.1.*=0.1",)},
)
HOST: tuple[dict[str, Any], ...] = (
    {},
    {},
    {"optimizer_cpu_offload": True},
    {"optimizer_cpu_offload": True, "optimizer_offload_fraction": 0.4},
)
LORA: tuple[dict[str, Any], ...] = (
    {},
    {},
    {},
    {"rank": 4},
    {"rank": 3, "targets": ("*_proj*", "*w[123].weight"), "also_train": ("*norm.weight",)},
    {"rank": 2, "targets": ("*layers.1*up_proj*", "*v_proj*", "*w3*")},
    {"rank": 2, "quantize_base": "nf4"},
    {"rank": 2, "targets": ("*_proj*", "*w[123].weight"), "quantize_base": "nf4", "double_quant": True},
    {"rank": 4, "also_train": ("*layers.1*up_proj*", "*layers.0*w1*"), "quantize_base": "fp8"},
)


def draw(random_: random.Random) -> Setup:
    """Draw a setup that the trainer accepts."""
    while True:
        model = tiny_model(random_.choice(trained_families()), **random_.choice(OPTIONS))
        world, pp = random_.choice((1, 2, 4, 8, 16, 32)), random_.choice((1, 1, 2, 4))
        parallel = ParallelConfig(
            tp=random_.choice((1, 2, 4)),
            sp=random_.random() < 0.7,
            pp=pp,
            vpp=random_.choice((1, 2)) if pp > 1 else 1,
            ep=random_.choice((1, 2, 4, 8)),
            etp=random_.choice((0, 1, 2)),
            cp=random_.choice((1, 1, 2)),
            use_distributed_optimizer=random_.random() < 0.6,
            fully_shard=random_.random() < 0.3,
        )
        lora = LoraConfig(**random_.choice(LORA))
        if lora.quantize_base is not None and parallel.fully_shard:
            continue
        try:
            model = adapt(model, lora)
        except MoeconvError:
            continue
        router = model.compute.router
        setup = Setup(
            model=model,
            world_size=world,
            parallel=parallel,
            moe=MoEConfig(router=router) if router is not None else None,
            optim=OptimConfig(
                moments_dtype=random_.choice(("float32", "bfloat16")),
                master_weights=random_.choice(("fp32", "remainder")),
                main_grads_dtype=random_.choice(("fp32", "fp32", "bf16")),
                **random_.choice(TRAINED),
                **random_.choice(HOST),
            ),
            recompute=RecomputeConfig(),
            dtype=random_.choice(("bfloat16", "bfloat16", "float32", "float64")),
            seq_length=16,
            micro_batch_size=1,
            num_microbatches=1,
            lora=lora,
        )
        try:
            check_world(parallel, world)
            check_degrees(parallel, model)
            check_combinations(parallel, setup.moe)
            check_optimizer(setup.optim, parallel)
            check_types(setup.optim, setup.dtype)
            resolve_groups(setup.optim, model)
        except MoeconvError:
            continue
        return setup


@pytest.fixture
def connect() -> Iterator[Any]:
    """Be one rank of a job whose others don't exist: torch's fake process group takes part in every collective alone."""

    def begin(world: int, rank: int) -> None:
        dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())

    yield begin
    dist.destroy_process_group()


def build(setup: Setup, device: str = "cpu") -> tuple[Engine, ParallelMesh]:
    mesh = ParallelMesh(setup.parallel)
    dtype = TORCH_DTYPES[setup.dtype]
    args = (setup.model, dtype, setup.parallel, setup.moe, setup.optim, setup.recompute, mesh, torch.device(device))
    return Engine(*args, lora=setup.lora), mesh


def memory_of(engine: Engine) -> State:
    """Count the bytes behind the engine's tensors."""

    def size(tensor: Tensor) -> int:
        return tensor.numel() * tensor.element_size()

    def master(shard: Shard) -> int:
        # FSDP keeps rows that it has none of as padding.
        return shard.master.untyped_storage().nbytes() if not hasattr(shard, "grads") else size(shard.master)

    shards, trained = engine.store.shards, engine.trained
    bucketed = [shard for shard in shards if hasattr(shard, "grads")]
    weights = sum(size(shard.weights) for shard in bucketed)  # type: ignore[attr-defined]
    weights += sum(master(shard) for shard in shards if shard not in bucketed and shard not in trained)
    weights += engine.quantised.nbytes if engine.quantised is not None else 0
    gradients = sum(size(shard.grads) for shard in bucketed)  # type: ignore[attr-defined]
    gradients += sum(master(shard) for shard in trained if shard not in bucketed)
    away = [shard for shard in trained if shard.offloaded]
    masters = sum(master(s) for s in trained if s not in bucketed or (s.separate_master and s not in away))
    host = sum(size(s.master) for s in away if s in bucketed and s.separate_master)
    states = {id(s): sum(size(engine.optimizer.state(s, n)) for n in engine.optimizer.states(s)) for s in trained}
    host += sum(states[id(s)] for s in away)
    return State(weights, gradients, masters, sum(states[id(s)] for s in trained if s not in away), host)


@pytest.mark.parametrize("seed", range(NUM_LAYOUTS))
def test_state_is_the_engines(seed: int, connect: Any) -> None:
    random_ = random.Random(seed)
    setup = draw(random_)
    rank = random_.randrange(setup.world_size)
    connect(setup.world_size, rank)
    engine, mesh = build(setup)
    expected, counted = memory_of(engine), rank_state(setup.parameters.stage(mesh.rank("pp")), setup)
    if setup.parallel.fully_shard:  # the last ranks may have fewer rows, of which moments have no padding
        mine, most = (x.moments + x.host for x in (expected, counted))
        assert mine <= most
        if mine < most:
            expected = replace(expected, moments=counted.moments, host=counted.host)
    assert counted == expected
    named = [tuple(p.shape) for p in engine.module.parameters()]
    if not setup.parallel.fully_shard:
        listed = setup.parameters.stage(mesh.rank("pp"))
        assert [p.shape for p in listed if not is_quantised(setup, p)] == named
        workspace = engine.quantised.workspace_bytes if engine.quantised is not None else 0
        assert workspace_bytes(setup, mesh.rank("pp")) == workspace


@pytest.mark.parametrize(
    "parallel",
    [
        {"ep": 8, "use_distributed_optimizer": True},
        {"tp": 2, "sp": True, "pp": 4, "ep": 8, "etp": 1, "use_distributed_optimizer": True},
        {"pp": 2, "vpp": 4, "ep": 2, "use_distributed_optimizer": True},
        {"tp": 8, "sp": True},
    ],
)
def test_state_of_a_large_model_is_the_engines(parallel: dict[str, Any], connect: Any) -> None:
    """Mixtral 8x7B as it is, with many buckets, on the device that has no memory."""
    config = {
        "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000, "num_local_experts": 8,
        "num_experts_per_tok": 2,
    }  # fmt: skip
    model = Model.from_config(FAMILIES["mixtral"], config)
    router = model.compute.router
    assert router is not None
    setup = Setup(
        model=model, world_size=64, parallel=ParallelConfig(**parallel), moe=MoEConfig(router=router),
        optim=OptimConfig(), recompute=RecomputeConfig(), dtype="bfloat16", seq_length=4096, micro_batch_size=1,
        num_microbatches=1,
    )  # fmt: skip
    connect(64, 37)
    engine, mesh = build(setup, "meta")
    assert len(engine.store.shards) > 10
    assert rank_state(setup.parameters.stage(mesh.rank("pp")), setup) == memory_of(engine)


@pytest.mark.parametrize("seed", range(12))
def test_state_is_the_rectangles_and_padding(seed: int) -> None:
    """Without the padding, a rank has exactly the elements that the layout gives it."""
    setup = draw(random.Random(1000 + seed))
    placement = Placement(setup.model, setup.parallel.layout)
    for pp in range(setup.parallel.pp):
        # Of a tied head, which a checkpoint may hold too, the trainer has the embedding alone.
        held = [(t, rect) for t, rect in placement.held(pp=pp) if not t.rule.buffer and not setup.model.optional(t)]
        rects = [rect for _, rect in held]
        listed = sum(parameter.size for parameter in setup.parameters.stage(pp))
        padding = sum(p.size for p in setup.parameters.stage(pp) if p.part in ("embedding", "head"))
        elements = sum(rect.size for rect in rects)
        assert elements <= listed <= elements + padding
        if setup.model.sizes["vocab"] == 64 and setup.parallel.tp * 8 <= 64:
            assert listed == elements


def test_checkpoint_bytes_are_the_written_ones(connect: Any) -> None:
    setup = draw(random.Random(7))
    connect(1, 0)
    alone = Setup(**(_fields(setup) | {"world_size": 1, "parallel": ParallelConfig()}))
    engine, _ = build(alone)
    written = sum(x.tensor.numel() * x.tensor.element_size() for x in engine.state(with_optimizer=True))
    assert checkpoint_bytes(alone) == written


def _fields(setup: Setup) -> dict[str, Any]:
    return {name: getattr(setup, name) for name in Setup.__dataclass_fields__}
