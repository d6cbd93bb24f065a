"""Full sharding gathers weights a layer ahead; parity and state are held by the layouts of `runtime.parity`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from runtime.parity.case import Case, global_batch, make_engine, own_share
from runtime.parity.ranks import RankPool

LAYERS = 3


def gathered_ahead(case: Case) -> list[tuple[str, int, bool]]:
    """Whether a layer's experts are on their way, or there, when those of the layer before it begin; by pass and layer."""
    engine, mesh = make_engine(case)
    stage = engine.module[0]
    assert isinstance(stage, nn.Module)
    experts: list[Any] = [layer.get_submodule("mlp.moe.experts") for layer in stage.get_submodule("layers").children()]
    found: list[tuple[str, int, bool]] = []

    def note(direction: str, layer: int) -> None:
        (group,) = experts[layer]._get_fsdp_state()._fsdp_param_groups
        found.append((direction, layer, group.is_unsharded or group._all_gather_result is not None))

    for place in range(LAYERS):
        if place + 1 < LAYERS:
            experts[place].register_forward_pre_hook(lambda *_, after=place + 1: note("forward", after))
        if place > 0:

            def backward(grad: torch.Tensor, before: int = place - 1) -> None:
                note("backward", before)

            experts[place].register_forward_hook(lambda _, args, out, hook=backward: out.register_hook(hook) and None)
    engine.train_step(own_share(global_batch(case, 0), mesh)[:1])
    return found


def backends_made(case: Case) -> list[list[torch.dtype]]:
    """For which dtypes each layer's experts have looked for grouped products."""
    engine, mesh = make_engine(case)
    made: list[list[torch.dtype]] = []
    for experts in (module for module in engine.module.modules() if hasattr(module, "num_local_experts")):
        mine: list[torch.dtype] = []
        made.append(mine)
        find = experts.gemm

        def gemm(experts: Any = experts, find: Any = find, mine: list[torch.dtype] = mine) -> Any:
            before = experts._gemm
            found = find()
            if experts._gemm is not before:
                mine.append(experts._gemm[1])
            return found

        experts.gemm = gemm
    engine.train_step(own_share(global_batch(case, 0), mesh))
    return made


@pytest.mark.parametrize("model", [{}, {"model_type": "gpt_oss"}], ids=["mixtral", "gpt_oss"])
def test_experts_keep_the_backend_of_what_they_compute_in(model: dict[str, str], pool: RankPool) -> None:
    """Rows are ordered before a layer's experts are gathered, and as their backend wants them: not that of the fp32 shards."""
    case = Case(name="bf16", num_ranks=2, parallel={"fully_shard": True}, model=model, dtype="bfloat16")
    for made in pool.run(2, backends_made, case):
        assert made == [[torch.bfloat16]] * 4


@pytest.mark.parametrize("parallel", [{}, {"ep": 2}], ids=["dp2", "ep2 dp2"])
def test_a_layer_is_gathered_while_the_one_before_it_is_computed(parallel: dict[str, int], pool: RankPool) -> None:
    ranks = 2 * parallel.get("ep", 1)
    case = Case(
        name="ahead", num_ranks=ranks, parallel=parallel | {"fully_shard": True}, model={"num_hidden_layers": LAYERS}
    )
    order = [("forward", 1), ("forward", 2), ("backward", 1), ("backward", 0)]
    for found in pool.run(ranks, gathered_ahead, case):
        assert found == [(direction, layer, True) for direction, layer in order]
