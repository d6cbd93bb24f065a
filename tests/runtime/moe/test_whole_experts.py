"""Experts that are trained whole beside adapters of the same layer: their gradients are those that they have alone."""

from __future__ import annotations

import pytest
import torch

from moeconv.adapters.initial import initial_adapters
from runtime.checkpoint.adapters import over
from runtime.data.batch import Batch
from runtime.engine import Engine
from runtime.model.lora import LoraConfig
from runtime.model.recompute import RecomputeConfig
from runtime.model.targets import adapt
from runtime.moe.config import MoEConfig
from runtime.optim.config import OptimConfig
from runtime.parallel.degrees import ParallelConfig
from runtime.parallel.mesh import ParallelMesh
from tests.runtime.model.hub import hub_tensors, model_of, reader
from tests.upcycle.hub import make_model


@pytest.mark.parametrize(("adapted", "whole"), [("w[13]", "w2"), ("w2", "w[13]")])
def test_their_gradients_are_those_that_they_have_alone(adapted: str, whole: str) -> None:
    theirs = make_model("mixtral")
    base, read = model_of(theirs), reader(hub_tensors(theirs, lambda p: p))
    tokens = torch.randint(101, (2, 17), generator=torch.Generator().manual_seed(1))
    # Twice the same: the second gradient is added to the first.
    batch = Batch(tokens=tokens[:, :-1], labels=tokens[:, 1:].clone())
    found = []
    for config in (
        LoraConfig(),
        LoraConfig(rank=2, targets=(f"*experts*{adapted}*",), also_train=(f"*experts*{whole}*",)),
    ):
        model, parallel = adapt(base, config), ParallelConfig()
        assert model.compute.router is not None
        settings = (parallel, MoEConfig(router=model.compute.router), OptimConfig(clip_grad=0.0), RecomputeConfig())
        engine = Engine(model, torch.float32, *settings, ParallelMesh(parallel), torch.device("cpu"), lora=config)
        held = getattr(model, "weight_of", {})
        engine.load_state(over(read, initial_adapters(model, 1), held) if held else read)  # type: ignore[arg-type]
        engine.train_step([batch, batch])
        found.append({item.name: item.tensor for item in engine.gradients() if ".lora_" not in item.name})
    alone, beside = found
    assert 0 < len(beside) < len(alone)
    assert all(".experts." in name for name in beside)
    for name, grad in beside.items():
        assert torch.allclose(grad, alone[name], rtol=1e-5, atol=1e-7), name
