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


@pytest.mark.parametrize("parallel", [{}, {"ep": 2}], ids=["dp2", "ep2 dp2"])
def test_a_layer_is_gathered_while_the_one_before_it_is_computed(parallel: dict[str, int], pool: RankPool) -> None:
    ranks = 2 * parallel.get("ep", 1)
    case = Case(
        name="ahead", num_ranks=ranks, parallel=parallel | {"fully_shard": True}, model={"num_hidden_layers": LAYERS}
    )
    order = [("forward", 1), ("forward", 2), ("backward", 1), ("backward", 0)]
    for found in pool.run(ranks, gathered_ahead, case):
        assert found == [(direction, layer, True) for direction, layer in order]
