"""Muon under layouts: each takes torch's own step on the whole gradient. (Its bf16 iterations amplify what rounding leaves of
directions without a gradient, so that the steps of two layouts agree less than their gradients do.)"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from runtime.parity.case import Case, assemble, copies, global_batch, initial_weight, make_engine, own_share
from runtime.parity.ranks import RankPool

LAYOUTS: list[tuple[int, dict[str, Any]]] = [(4, {"pp": 2, "ep": 2}), (4, {"cp": 2, "ep": 2})]


def one_step(case: Case) -> Any:
    """Gradients and weights of this rank after a step."""
    engine, mesh = make_engine(case, optimizer="muon", lr=1e-2)
    engine.train_step(own_share(global_batch(case, 0), mesh))
    return copies(engine.gradients()), copies(engine.state(with_optimizer=False))


@pytest.mark.parametrize(("num_ranks", "parallel"), LAYOUTS)
def test_a_layouts_step_is_torchs_on_the_whole_gradient(
    num_ranks: int, parallel: dict[str, Any], pool: RankPool
) -> None:
    ranks = pool.run(num_ranks, one_step, Case(name="muon", num_ranks=num_ranks, parallel=parallel))
    gradients, weights = (assemble(part for rank in ranks for part in rank[i]) for i in range(2))
    compared = 0
    for name, gradient in gradients.items():
        if "norm" in name or "embed_tokens" in name or "lm_head" in name:
            continue
        matrix = torch.nn.Parameter(initial_weight(name, gradient.shape))
        matrix.grad = torch.from_numpy(gradient)
        torch.optim.Muon([matrix], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw").step()
        moved = (matrix.detach() - initial_weight(name, gradient.shape)).abs().max()
        assert (torch.from_numpy(weights[name]) - matrix.detach()).abs().max() <= 1e-5 * moved + 1e-7, name
        compared += 1
    assert compared == 4 * (4 + 1 + 8 * 3)
