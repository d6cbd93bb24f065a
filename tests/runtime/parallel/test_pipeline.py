"""What torch's pipelines hold of a micro-batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from runtime.model.decoder import DecoderStage
from runtime.parity.case import Case, global_batch, make_engine, own_share
from runtime.parity.ranks import RankPool

CASES: dict[str, dict[str, Any]] = {
    "1f1b": {"parallel": {"pp": 2}},
    "interleaved": {"parallel": {"pp": 2, "vpp": 2, "pp_schedule": "interleaved"}},
}


def logits_behind_their_head(case: Case) -> list[bool]:
    """Do a step; say of each micro-batch whether its logits are there when the layers' backward pass begins."""
    engine, mesh = make_engine(case)
    found: list[bool] = []
    stages = [stage for stage in engine.module if isinstance(stage, DecoderStage)]
    stage = next((stage for stage in stages if stage.head is not None), None)
    if stage is None:
        engine.train_step(own_share(global_batch(case, 0), mesh))
        return []
    assert stage.head is not None
    assert stage.norm is not None
    refs: list[StorageWeakRef] = []

    def entered(_: Any, args: tuple[torch.Tensor, ...]) -> None:
        place = len(refs)
        args[0].register_hook(lambda _: found.append(not refs[place].expired()))

    stage.norm.register_forward_pre_hook(entered)
    stage.head.register_forward_hook(lambda _, __, out: refs.append(StorageWeakRef(out.untyped_storage())))
    engine.train_step(own_share(global_batch(case, 0), mesh))
    return found


@pytest.mark.parametrize("name", CASES)
def test_logits_are_gone_when_their_head_is_done(name: str, pool: RankPool) -> None:
    case = Case(name=name, num_ranks=2, **CASES[name])
    first, last = pool.run(2, logits_behind_their_head, case)
    assert first == []
    assert len(last) >= 2
    assert not any(last)
