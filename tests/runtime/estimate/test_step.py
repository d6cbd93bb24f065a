"""Every family and layout can be planned, and numbers move as they must when one thing changes."""

from __future__ import annotations

import dataclasses
import json
import random
from typing import Any

import pytest
import torch

from moeconv.families import FAMILIES
from moeconv.families.base import Model
from runtime.data.batch import Batch
from runtime.engine import Engine
from runtime.errors import ConfigError
from runtime.estimate.activations import layer_activations
from runtime.estimate.describe import as_json, lines
from runtime.estimate.fp8 import COPIES, copied_elements
from runtime.estimate.launches import DENSE, MOE
from runtime.estimate.local import local_sizes
from runtime.estimate.machine import find_machine
from runtime.estimate.scaling import scaling
from runtime.estimate.setup import Setup
from runtime.estimate.step import Estimate
from runtime.fp8.config import Fp8Config
from runtime.fp8.linear import Fp8Linears
from runtime.fp8.scaling import Scaling
from runtime.log.flops import training_flops
from runtime.model.recompute import RecomputeConfig
from runtime.model.tensor_maps import ColumnMaps, RowMap
from runtime.moe.config import MoEConfig
from runtime.moe.fp8_experts import Fp8Experts
from runtime.moe.layer import MoELayer
from runtime.moe.tail import TAIL
from runtime.optim.config import OptimConfig
from runtime.parallel.degrees import ParallelConfig
from runtime.parallel.mesh import ParallelMesh
from tests.runtime.estimate.test_state import draw
from tests.support.configs import tiny_model, trained_families
from tests.support.saved import saved_tensors

H100 = find_machine("h100")
MIXTRAL = Model.from_config(
    FAMILIES["mixtral"],
    {
        "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000, "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
)  # fmt: skip


def mixtral(world: int = 16, count: int = 16, **parallel: Any) -> Setup:
    router = MIXTRAL.compute.router
    assert router is not None
    shared: dict[str, Any] = {"use_distributed_optimizer": not parallel.get("fully_shard")}
    return Setup(
        model=MIXTRAL, world_size=world, parallel=ParallelConfig(**shared | parallel), moe=MoEConfig(router=router),
        optim=OptimConfig(), recompute=RecomputeConfig(), dtype="bfloat16", seq_length=4096, micro_batch_size=1,
        num_microbatches=count,
    )  # fmt: skip


@pytest.mark.parametrize("family", trained_families())
def test_every_family_is_planned(family: str) -> None:
    model = tiny_model(family)
    router = model.compute.router
    for granularity in ("none", "selective", "full"):
        setup = Setup(
            model=model, world_size=2, parallel=ParallelConfig(tp=2, sp=True),
            moe=MoEConfig(router=router) if router is not None else None, optim=OptimConfig(),
            recompute=RecomputeConfig(granularity=granularity), dtype="bfloat16", seq_length=64, micro_batch_size=1,
            num_microbatches=2,
        )  # fmt: skip
        estimate = Estimate(setup, H100)
        found = json.loads(json.dumps(as_json(estimate), allow_nan=False))
        assert found["step"]["seconds"] > 0
        assert estimate.peak > max(memory.state.total for memory in estimate.memory)
        assert list(lines(estimate))


@pytest.mark.parametrize("seed", range(30))
def test_every_layout_is_planned(seed: int) -> None:
    setup = draw(random.Random(500 + seed))
    setup = dataclasses.replace(setup, num_microbatches=4 * setup.parallel.pp, seq_length=128)
    estimate = Estimate(setup, H100)
    json.dumps(as_json(estimate), allow_nan=False)
    assert estimate.seconds >= max(found[-1].end for found in estimate.passes) > 0
    assert 0 <= estimate.bubble < 1


def test_what_a_save_takes_of_a_machine_is_said() -> None:
    setup = mixtral(ep=8)
    copy = f"{14 * sum(t.size for t in MIXTRAL.tensors.values()) / 2 / 1e9:.1f} GB more of a machine's memory"  # bf16, masters, two moments; of two
    assert any(copy in line and "--no-async-save" in line for line in lines(Estimate(setup, H100)))
    away = dataclasses.replace(setup, optim=OptimConfig(optimizer_cpu_offload=True))
    assert any("training waits; the save takes no more" in line for line in lines(Estimate(away, H100)))


def test_flops_are_the_logs() -> None:
    estimate = Estimate(mixtral(ep=8), H100)
    assert estimate.flops == training_flops(MIXTRAL, 4096) * 16 * 16 * 4096
    assert estimate.tflops == pytest.approx(estimate.flops / estimate.seconds / 16 / 1e12)


FP8_KINDS = [Fp8Config(), *(Fp8Config(format="hybrid", recipe=recipe) for recipe in ("tensorwise", "blockwise"))]  # type: ignore[arg-type]


@pytest.mark.parametrize("fp8", FP8_KINDS, ids=["plain", "tensorwise", "blockwise"])
def test_the_kept_experts_are_what_the_layer_saves(fp8: Fp8Config) -> None:
    """Of a MoE layer alone, bytes that autograd holds between its passes."""
    model = tiny_model(**{"hidden_size": 128, "intermediate_size": 256} if fp8.recipe == "blockwise" else {})
    router = model.compute.router
    assert router is not None
    setup = Setup(
        model=model, world_size=1, parallel=ParallelConfig(), moe=MoEConfig(router=router), optim=OptimConfig(),
        recompute=RecomputeConfig(), dtype="float32", seq_length=96, micro_batch_size=2, num_microbatches=1, fp8=fp8,
    )  # fmt: skip
    config = MoEConfig(router=router, gemm_backend="loop")
    scaling = Scaling(fp8, torch.device("cpu")) if fp8.format else None
    layer = MoELayer(config, hidden_size=model.sizes["hidden"], ffn_hidden_size=model.sizes["ffn"], fp8=scaling)
    x = torch.randn(192, model.sizes["hidden"], requires_grad=True)
    wide = saved_tensors(layer, x, 192 * router.experts)
    machine = dataclasses.replace(H100, row_alignment=128 if fp8.recipe == "blockwise" else 1)
    kept = layer_activations(setup, local_sizes(setup, machine), 0)
    assert sum(t.untyped_storage().nbytes() for t in wide) == kept.parts["experts"]


def test_copies_in_8_bits_are_the_engines() -> None:
    model = Model.from_config(
        FAMILIES["mixtral"],
        {
            "model_type": "mixtral", "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 64,
            "num_attention_heads": 4, "num_key_value_heads": 1, "vocab_size": 64, "num_local_experts": 2,
            "num_experts_per_tok": 2,
        },
    )  # fmt: skip
    router = model.compute.router
    assert router is not None
    setup = Setup(
        model=model, world_size=1, parallel=ParallelConfig(), moe=MoEConfig(router=router), optim=OptimConfig(),
        recompute=RecomputeConfig(), dtype="float32", seq_length=8, micro_batch_size=1, num_microbatches=1,
        fp8=Fp8Config(format="e4m3"),
    )  # fmt: skip
    assert setup.moe is not None
    mesh, cpu = ParallelMesh(setup.parallel), torch.device("cpu")
    engine = Engine(
        model, torch.float32, setup.parallel, setup.moe, setup.optim, setup.recompute, mesh, cpu, fp8=setup.fp8
    )
    tokens = torch.arange(8).view(1, 8)
    engine.train_step([Batch(tokens=tokens, labels=tokens)])
    made = [value for part in engine.module.modules() for value in vars(part).values()]
    edges = [value._maps for value in made if isinstance(value, (ColumnMaps, RowMap))]
    held = [maps.weights for maps in edges if isinstance(maps, Fp8Linears)]
    held += [weights for experts in made if isinstance(experts, Fp8Experts) for weights in (experts.w13, experts.w2)]
    copies = [made for weights in held if (found := weights._made) is not None for made in (found.rows, found.columns)]
    assert sum(made.bits.nbytes for made in copies if made is not None) == COPIES * copied_elements(setup, 0)
    plain = Estimate(dataclasses.replace(setup, fp8=Fp8Config()), H100)
    more = Estimate(setup, H100).memory[0].buffers - plain.memory[0].buffers
    assert more == COPIES * copied_elements(setup, 0)


def test_fp8_is_faster_and_delayed_scaling_spares_passes() -> None:
    base = dataclasses.replace(mixtral(world=8, ep=8), graphs="none")
    recipes = ("tensorwise", "delayed", "blockwise")
    settings = [Fp8Config(), *(Fp8Config(format="hybrid", recipe=recipe) for recipe in recipes)]  # type: ignore[arg-type]
    plain, tensorwise, delayed, blockwise = (Estimate(dataclasses.replace(base, fp8=fp8), H100) for fp8 in settings)
    assert delayed.seconds < tensorwise.seconds < blockwise.seconds < 0.95 * plain.seconds
    assert delayed.peak == tensorwise.peak > plain.peak
    assert blockwise.peak > tensorwise.peak, "what ranks were sent is kept in bf16"
    with pytest.raises(ConfigError, match="A100-SXM4-80GB computes nothing in 8 bits; leave it out"):
        Estimate(dataclasses.replace(base, fp8=settings[1]), find_machine("a100"))


@pytest.mark.parametrize(("topk", "launches"), [(2, 4), (4, 8)], ids=["a row for each choice", "sent once"])
def test_the_device_waits_for_what_the_host_launches_once_it_knows_the_rows(topk: int, launches: int) -> None:
    base = dataclasses.replace(mixtral(world=2, count=4, ep=2), micro_batch_size=4, graphs="none")
    assert base.moe is not None
    router = dataclasses.replace(base.moe.router, top_k=topk)
    setup = dataclasses.replace(base, moe=dataclasses.replace(base.moe, router=router))
    layers = setup.model.sizes["layers"]
    waiting = Estimate(setup, H100).stages[0].parts["host"]
    assert waiting == pytest.approx(layers * launches * H100.launch_us * 1e-6)
    pairs = dataclasses.replace(setup.parallel, overlap_exchange=True)
    for other in ({"graphs": "auto"}, {"parallel": pairs}):
        assert "host" not in Estimate(dataclasses.replace(setup, **other), H100).stages[0].parts


def test_the_host_is_the_limit_where_layers_are_small_and_not_replayed() -> None:
    large = dataclasses.replace(mixtral(world=1, count=4), micro_batch_size=2)
    tiny = tiny_model("mixtral")
    assert tiny.compute.router is not None
    small = dataclasses.replace(large, model=tiny, moe=MoEConfig(router=tiny.compute.router), seq_length=64)
    for setup, held_up in ((large, False), (small, True)):
        replayed, launched = (Estimate(dataclasses.replace(setup, graphs=graphs), H100) for graphs in ("auto", "none"))
        assert replayed.setup.captured
        assert not launched.setup.captured
        cost = launched.stages[0]
        launching = sum(cost.launches) * H100.launch_us * 1e-6
        assert (launching > replayed.stages[0].forward + replayed.stages[0].backward) == held_up
        assert ("host" in cost.parts) == held_up
        if held_up:
            assert cost.forward + cost.backward == pytest.approx(launching)
        else:
            assert launched.seconds == replayed.seconds
    again = dataclasses.replace(large, graphs="none", recompute=RecomputeConfig(granularity="full"))
    once = Estimate(dataclasses.replace(large, graphs="none"), H100).stages[0].launches
    twice = Estimate(again, H100).stages[0].launches
    assert twice.forward == once.forward
    assert twice.backward - once.backward == 32 * (DENSE.forward + MOE.forward)
    assert mixtral(world=8, ep=8).captured
    assert not mixtral(world=8, pp=2, ep=4).captured


def test_ranks_that_exchange_rows_and_replay_set_room_aside() -> None:
    """More memory for rows, no numbers of rows to exchange, and the gradients' sums beside the last pass as without."""
    base = dataclasses.replace(mixtral(world=16, ep=8, use_distributed_optimizer=True), graphs="none")
    launched, replayed = (Estimate(dataclasses.replace(base, graphs=graphs), H100) for graphs in ("none", "local"))
    assert replayed.setup.captured
    rows = [estimate.costs.local.rows_allocated for estimate in (launched, replayed)]
    assert 1.2 < rows[1] / rows[0] < 1.25
    assert replayed.peak > launched.peak
    kinds = [{t.kind for t, _ in e.stages[0].transfers if t.axis.name == "ep"} for e in (launched, replayed)]
    assert kinds == [{"all_to_all", "all_gather"}, {"all_to_all"}]
    assert replayed.after[0].reduce == launched.after[0].reduce


def test_recomputation_trades_time_for_memory() -> None:
    base = mixtral(pp=4, ep=4)
    assert base.moe is not None
    some = dataclasses.replace(base, moe=dataclasses.replace(base.moe, recompute_layer=True))
    whole = dataclasses.replace(base, recompute=RecomputeConfig(granularity="full"))
    found = [Estimate(setup, H100) for setup in (base, some, whole)]
    assert found[0].peak > found[1].peak > found[2].peak
    assert found[0].seconds < found[1].seconds < found[2].seconds
    forward = sum(cost.forward for cost in found[0].costs_of(1).values())
    backward = [sum(cost.backward for cost in e.costs_of(1).values()) for e in found]
    assert backward[2] - backward[0] == pytest.approx(forward)


def test_overlapped_exchanges_keep_two_micro_batches() -> None:
    plain = mixtral(world=8, ep=8)
    assert plain.num_microbatches > 1
    pairs = dataclasses.replace(plain, parallel=dataclasses.replace(plain.parallel, overlap_exchange=True))
    kept = [sum(Estimate(setup, H100).memory[0].activations.values()) for setup in (plain, pairs)]
    assert kept[1] == pytest.approx(2 * kept[0])


def test_traffic_is_what_the_collectives_send() -> None:
    setup = dataclasses.replace(mixtral(world=8, ep=8), graphs="none")
    found = Estimate(setup, H100).traffic
    # Rows go there with their weights behind them and come back, twice for each layer and micro-batch; 7 of 8 rows leave.
    row, rows = 4096 * 2, 4096 * 2 * H100.imbalance
    sent = 32 * setup.num_microbatches * (7 / 8) * rows * (4 * row + 2 * 2 * TAIL)
    counts = 32 * setup.num_microbatches * 7 * 8 * 8
    assert found["ep", "nvlink"] == pytest.approx(sent + counts)
    dense = 32 * (4096 * (2 * 4096 + 2 * 1024) + 8 * 4096 + 2 * 4096) + 2 * 32000 * 4096 + 4096
    assert found["dp", "nvlink"] == pytest.approx(7 / 8 * dense * (4 + 2))


def test_links_follow_the_nodes() -> None:
    def links(setup: Setup) -> set[tuple[str, str]]:
        return set(Estimate(setup, H100).traffic)

    assert links(mixtral(world=16, ep=8)) == {("ep", "nvlink"), ("edp", "network"), ("dp", "network")}
    assert ("pp", "network") in links(mixtral(world=16, pp=2, ep=8))
    slow, fast = (find_machine("h100", link_gb_s=rate) for rate in (5.0, 50.0))
    assert Estimate(mixtral(pp=2), slow).seconds > Estimate(mixtral(pp=2), fast).seconds
    wide = find_machine("h100", gpus_per_node=16)
    assert set(Estimate(mixtral(world=16, ep=8), wide).traffic) == {
        ("ep", "nvlink"),
        ("edp", "nvlink"),
        ("dp", "nvlink"),
    }


def test_weak_scaling_is_nearly_ideal_and_strong_scaling_is_not() -> None:
    found = scaling(mixtral(world=8, ep=8, count=16), H100)
    assert [point.gpus for point in found["weak"]] == [8, 16, 32, 64, 128, 256, 512]
    assert [point.sequences for point in found["strong"]] == [128] * 5
    assert found["weak"][-1].share > found["strong"][-1].share
    assert all(0.3 < point.share <= 1.05 for points in found.values() for point in points)


def test_frozen_experts_need_no_gradients_and_less_time() -> None:
    plain = mixtral(world=8, ep=8)
    frozen = dataclasses.replace(plain, optim=OptimConfig(freeze=("*.experts.*",)))
    before, after = Estimate(plain, H100), Estimate(frozen, H100)
    assert before.memory[0].state.weights == after.memory[0].state.weights
    dense = 32 * (4096 * (2 * 4096 + 2 * 1024) + 8 * 4096 + 2 * 4096) + 2 * 32000 * 4096 + 4096
    assert after.memory[0].state.gradients == pytest.approx(4 * dense, rel=1e-4)
    assert after.seconds < before.seconds
