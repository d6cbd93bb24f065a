"""`Checkpoint.load_into` fills modules of DTensors: each rank reads its rectangle, and together they are what transformers loads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import moeconv
from runtime.parity.ranks import RankPool
from tests.support.modules import module_of

# Rows of every gate and up in one stack, whole experts, columns, 101 rows, everything: what a trainer may choose.
PLACEMENTS = {
    "q_proj": Shard(0),
    "k_proj": Shard(0),
    "v_proj": Shard(0),
    "o_proj": Shard(1),
    "gate_up_proj": Shard(1),
    "down_proj": Shard(0),
    "embed_tokens": Shard(0),
    "lm_head": Shard(1),
    "norm": Replicate(),
}


def build(kind: str, shapes: Mapping[str, tuple[int, ...]]) -> nn.Module:
    """Build a module with these parameters, and share it out among the ranks."""
    module, world = module_of(shapes), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("other", "pair"))
    if "tp" in kind:
        for name in shapes:
            path, _, last = name.rpartition(".")
            place = next((p for word, p in PLACEMENTS.items() if word in name), None)
            if place is not None:
                owner = module.get_submodule(path)
                shared = distribute_tensor(getattr(owner, last).detach(), mesh["pair"], [place])
                setattr(owner, last, nn.Parameter(shared))
    if "fsdp" in kind:
        over = mesh["other" if "tp" in kind else "pair"]
        for layer in module.get_submodule("model.layers").children():
            fully_shard(layer, mesh=over)
        fully_shard(module, mesh=over)
    return module


def fill(kind: str, checkpoint: str, wanted: str) -> tuple[int, int]:
    """Fill a module on each rank, and compare it whole. Returns how many of its parameters are DTensors, and the bytes read."""
    want: dict[str, torch.Tensor] = torch.load(wanted)
    module = build(kind, {name: tuple(value.shape) for name, value in want.items()})
    nbytes = moeconv.open(checkpoint).load_into(module)
    shared = 0
    for name, value in module.state_dict().items():
        shared += isinstance(value, DTensor)
        got = value.full_tensor() if isinstance(value, DTensor) else value
        assert torch.equal(got, want[name]), name
    return shared, nbytes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import AutoModelForCausalLM

    from tests.upcycle.hub import make_folder

    root = tmp_path_factory.mktemp("fill")
    hub: Any = make_folder(root / "hf", "mixtral")
    moeconv.import_hf(hub, root / "ckpt", moeconv.Degrees(tp=4, ep=2, pp=2, etp=2))
    torch.save(AutoModelForCausalLM.from_pretrained(hub, dtype=torch.float32).state_dict(), root / "want.pt")
    return root


@pytest.mark.parametrize(("kind", "num_ranks"), [("tp", 2), ("fsdp", 2), ("tp and fsdp", 4)])
def test_ranks_together_hold_what_transformers_loads(pool: RankPool, folder: Path, kind: str, num_ranks: int) -> None:
    results = pool.run(num_ranks, fill, kind, str(folder / "ckpt"), str(folder / "want.pt"))
    total = sum(info.nbytes for info in moeconv.open(folder / "ckpt").tensors.values())
    for shared, nbytes in results:
        assert shared >= 15
        assert nbytes < 0.6 * total  # a rank reads its own part
