"""A search finds the best of all layouts that the trainer accepts and that fit."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import pytest

from moeconv.errors import MoeconvError
from moeconv.families import FAMILIES
from moeconv.families.base import Model
from runtime.estimate.machine import Machine, find_machine
from runtime.estimate.remedies import remedies
from runtime.estimate.search import Free, Search, deal_layers
from runtime.estimate.setup import Setup
from runtime.estimate.split import settle
from runtime.estimate.state import rank_state
from runtime.estimate.step import Estimate
from runtime.model.recompute import RecomputeConfig
from runtime.moe.config import MoEConfig
from runtime.optim.config import OptimConfig
from runtime.parallel.degrees import ParallelConfig
from runtime.settings.check import check_combinations, check_degrees, check_world

CONFIG = {
    "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 2048, "intermediate_size": 6144,
    "moe_intermediate_size": 768, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4,
    "head_dim": 128, "vocab_size": 151936, "num_experts": 128, "num_experts_per_tok": 8,
}  # fmt: skip
BATCH, WORLD = 64, 16


@pytest.fixture(scope="module")
def machine() -> Machine:
    return find_machine("h100")


def setup_of(world: int) -> Setup:
    model = Model.from_config(FAMILIES["qwen3_moe"], CONFIG)
    router = model.compute.router
    assert router is not None
    return Setup(
        model=model, world_size=world, parallel=ParallelConfig(), moe=MoEConfig(router=router), optim=OptimConfig(),
        recompute=RecomputeConfig(), dtype="bfloat16", seq_length=4096, micro_batch_size=1, num_microbatches=1,
    )  # fmt: skip


def every_layout(base: Setup) -> Iterator[Setup]:
    """All layouts of one micro-batch size without virtual stages and full sharding that the trainer accepts."""
    powers = (1, 2, 4, 8, 16)
    for tp, pp, ep, alone in itertools.product(powers[:4], powers, powers, (False, True)):
        fields = {"tp": tp, "sp": tp > 1, "pp": pp, "ep": ep, "etp": 1 if alone else tp}
        try:
            parallel = ParallelConfig(**fields, use_distributed_optimizer=True)
            check_world(parallel, base.world_size)
            check_degrees(parallel, base.model)
            check_combinations(parallel, base.moe)
        except MoeconvError:
            continue
        dp = base.world_size // (tp * pp)
        if BATCH % dp == 0:
            yield dataclasses.replace(base, parallel=parallel, num_microbatches=BATCH // dp)


def test_the_best_is_found(machine: Machine) -> None:
    base = setup_of(WORLD)
    every = [settle(Estimate(setup, machine), stated=False)[0] for setup in every_layout(base)]
    fitting = [estimate for estimate in every if estimate.fits]
    assert 5 < len(fitting) < len(every)
    best = min(fitting, key=lambda estimate: estimate.seconds)
    free = Free(fixed={"vpp": 1, "cp": 1, "fully_shard": False}, micro_batch_size=1, recompute=False)
    found = Search(base, BATCH, machine, free).run()
    assert found.best[0].seconds == pytest.approx(best.seconds)
    assert [e.seconds for e in found.best] == sorted(e.seconds for e in found.best)
    assert len(found.best) == min(10, len(fitting))


def test_a_whole_search_gives_what_the_trainer_accepts(machine: Machine) -> None:
    base = setup_of(64)
    found = Search(base, 256, machine, Free()).run()
    assert len(found.best) == 10
    for estimate in found.best:
        setup = estimate.setup
        check_world(setup.parallel, 64)
        check_degrees(setup.parallel, setup.model)
        check_combinations(setup.parallel, setup.moe)
        assert setup.global_batch_size == 256
        assert estimate.peak <= machine.memory
    assert found.best[0].seconds < 1.01 * min(e.seconds for e in found.best)
    assert "activations don't fit" in found.reasons


def test_given_degrees_stay(machine: Machine) -> None:
    found = Search(setup_of(64), 256, machine, Free(fixed={"tp": 2, "ep": 16}, micro_batch_size=2)).run(3)
    assert {(e.setup.parallel.tp, e.setup.parallel.ep, e.setup.micro_batch_size) for e in found.best} == {(2, 16, 2)}


def test_what_does_not_fit_is_said(machine: Machine) -> None:
    found = Search(setup_of(2), 64, machine, Free()).run()
    assert not found.best
    assert found.smallest is not None
    assert found.smallest.memory[0].state.total > machine.memory
    assert found.reasons.keys() == {"weights, gradients, masters and moments alone don't fit"}


def test_the_quick_count_of_state_is_the_exact_one_without_padding(machine: Machine) -> None:
    base = setup_of(WORLD)
    search = Search(base, BATCH, machine, Free())
    for fields in ({"pp": 4, "ep": 4}, {"tp": 2, "sp": True, "ep": 8, "etp": 1}, {"ep": 2, "fully_shard": True}, {}):
        parallel = ParallelConfig(**{"use_distributed_optimizer": "fully_shard" not in fields} | fields)
        setup = dataclasses.replace(base, parallel=parallel)
        exact = max(rank_state(setup.parameters.stage(rank), setup).total for rank in range(parallel.pp))
        assert search._state(parallel) == pytest.approx(exact, rel=1e-4)


def test_layers_that_do_not_divide_are_dealt_out() -> None:
    assert deal_layers(94, 8) == (11, 12, 12, 12, 12, 12, 12, 11)
    assert deal_layers(7, 2) == (4, 3)
    assert all(sum(deal_layers(layers, n)) == layers for layers in range(1, 40) for n in range(1, layers + 1))


def test_state_in_the_hosts_memory_is_proposed_where_nothing_else_fits_and_it_fits_there() -> None:
    base, whole = setup_of(4), Free(fixed={"fully_shard": False}, offload=False)
    ways = [({}, base.optim), *remedies(base.optim, base.dtype)]

    def first(limit: float | None) -> tuple[dict[str, Any] | None, Estimate | None]:
        machine = find_machine("h100", host_memory_gb=limit)
        for changed, optim in ways:
            found = Search(dataclasses.replace(base, optim=optim), BATCH, machine, whole).run()
            if found.best:
                return changed, found.best[0]
        assert limit is None or "what goes to the host doesn't fit the machines' memory" in found.reasons
        return None, None

    changed, best = first(None)
    assert changed == {"moments_dtype": "bfloat16", "master_weights": "remainder", "optimizer_cpu_offload": True}
    assert best is not None
    assert best.host == pytest.approx(6 * 30.53e9, rel=0.05)  # two bytes of masters, and moments in bf16
    assert first(best.host / 1e9 + 1)[1].setup == best.setup
    assert first(150) == (None, None)


def test_as_much_of_the_state_as_fits_stays_on_the_gpus() -> None:
    """All states would be 183 GB: where the host has 150, the rest is on the GPUs, with room for all that is beside it."""
    optim = OptimConfig(moments_dtype="bfloat16", master_weights="remainder", optimizer_cpu_offload=True)
    base = dataclasses.replace(setup_of(4), optim=optim)

    def best(limit: float | None, *, offload: bool) -> Estimate | None:
        found = Search(base, BATCH, find_machine("h100", host_memory_gb=limit), Free(offload=offload)).run()
        for estimate in found.best:
            assert estimate.fits
            assert estimate.peak <= 0.95 * estimate.machine.memory or estimate.setup.optim.on_host == 1
        return found.best[0] if found.best else None

    whole, part, less = best(None, offload=False), best(None, offload=True), best(150, offload=True)
    assert whole is not None
    assert part is not None
    assert less is not None
    assert whole.setup.optim.on_host == 1
    assert part.seconds <= whole.seconds
    assert 0.05 <= less.setup.optim.on_host < 1
    assert less.host <= 150e9
    # Five hundredths less would fill a GPU beyond what is left free, but for whole buckets.
    fraction = less.setup.optim.optimizer_offload_fraction - 0.05
    fewer = less.with_optim(dataclasses.replace(less.setup.optim, optimizer_offload_fraction=fraction))
    assert fewer.peak > 0.95 * fewer.machine.memory
    assert best(20, offload=True) is None


def test_the_update_takes_what_the_link_takes(machine: Machine) -> None:
    setup = dataclasses.replace(
        setup_of(8), optim=OptimConfig(moments_dtype="bfloat16", optimizer_cpu_offload=True),
        parallel=ParallelConfig(ep=8, use_distributed_optimizer=True),
    )  # fmt: skip
    owned = sum(p.size for p in setup.parameters.stage(0) if p.expert)
    owned += sum(p.size for p in setup.parameters.stage(0) if not p.expert) / 8
    link = max(8 * owned / (machine.pcie_gb_s * 1e9), 8 * 16 * owned / (machine.host_gb_s * 1e9))
    there, here = (
        Estimate(s, machine).after[0].update
        for s in (setup, dataclasses.replace(setup, optim=OptimConfig(moments_dtype="bfloat16")))
    )
    norm = machine.moving(owned * 4, "grad_norm")
    assert there == pytest.approx(link + norm)
    assert here < 0.1 * there
