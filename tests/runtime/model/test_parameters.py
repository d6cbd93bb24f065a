"""What every rank's modules hold is what the converter's placement says, for every family and all kinds of layouts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moeconv.layout.degrees import chunk_layers
from moeconv.layout.rect import Rect
from moeconv.placement import Placement
from runtime.model.context import ModelContext
from runtime.model.decoder import DecoderStage
from runtime.model.recompute import RecomputeConfig
from runtime.moe.config import MoEConfig
from runtime.optim.config import OptimConfig
from runtime.optim.groups import resolve_groups
from runtime.parallel.degrees import ParallelConfig
from runtime.parallel.mesh import ParallelMesh
from runtime.parallel.topology import topology_of
from tests.support.configs import tiny_model, trained_families

LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (1, {}),
    (2, {"tp": 2}),
    (4, {"tp": 4, "etp": 2}),
    (8, {"tp": 2, "pp": 2, "ep": 2, "etp": 1}),
    (8, {"tp": 4, "ep": 8, "etp": 1}),
    (4, {"pp": 2, "vpp": 2, "cp": 2}),
    (4, {"ep": 4, "pp_layers": None}),
]
OPTIONS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "glm4_moe": {"attention_bias": True, "use_qk_norm": True, "first_k_dense_replace": 1},
    "qwen2_moe": {"mlp_only_layers": [2]},
    "mixtral": {"tie_word_embeddings": True, "vocab_size": 61},
}


def taken(context: ModelContext, layers: range) -> set[tuple[str, Rect]]:
    """The rectangles that a stage's parameters and buffers are."""
    stage = DecoderStage(context, layers)
    found = {(piece.name, piece.rect) for p in stage.parameters() for piece in topology_of(p).pieces}
    tensors = context.model.tensors
    return found | {(b.name, Rect.whole(tensors[b.name].shape)) for b in context.parameters.buffers}


@pytest.mark.parametrize(("world", "degrees"), LAYOUTS)
@pytest.mark.parametrize("family", trained_families())
def test_a_rank_holds_what_the_placement_says(family: str, world: int, degrees: dict[str, Any]) -> None:
    model = tiny_model(family, **OPTIONS.get(family, {}))
    if "experts" not in model.sizes:
        degrees = {key: value for key, value in degrees.items() if key not in ("ep", "etp")}
    parallel = ParallelConfig(**degrees)
    placement = Placement(model, parallel.layout)
    router = model.compute.router
    for rank in range(world):
        mesh = ParallelMesh(parallel, world, rank)
        context = ModelContext(
            model=model,
            dtype=torch.float32,
            parallel=parallel,
            moe=MoEConfig(router=router) if router is not None else None,
            recompute=RecomputeConfig(),
            mesh=mesh,
            device=torch.device("meta"),
            groups=resolve_groups(OptimConfig(), model),
        )
        chunks = chunk_layers(model.sizes["layers"], parallel.layout)[mesh.rank("pp") :: parallel.pp]
        mine = set().union(*(taken(context, layers) for layers in chunks))
        held = placement.held(tp=mesh.rank("tp"), pp=mesh.rank("pp"), ep=mesh.rank("ep"), etp=mesh.rank("etp"))
        assert mine == {(tensor.name, rect) for tensor, rect in held if not model.optional(tensor)}
