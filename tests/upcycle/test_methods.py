"""Methods that change the function: what exactly they change, and that it depends on the seed alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from moeconv.checkpoint import open_checkpoint
from moeconv.convert import Options, write_hf, write_sharded
from moeconv.layout.degrees import Degrees
from moeconv.upcycling.draws import normal
from moeconv.upcycling.expand import plan_expand
from moeconv.upcycling.planned import Planned, plan_upcycle
from moeconv.upcycling.recipe import Recipe
from tests.upcycle.hub import gap, logits, make_folder

MATRICES = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("dense") / "llama", "llama", num_hidden_layers=1, intermediate_size=96)


def plan(folder: Path, **recipe: Any) -> Planned:
    return plan_upcycle(open_checkpoint(folder), Recipe(**recipe))


def experts(mixture: Planned, matrix: str) -> np.ndarray[Any, Any]:
    """Give an expert matrix of all experts of layer 0 with neurons first: [experts, neurons, hidden]."""
    names = [
        f"model.layers.0.block_sparse_moe.experts.{e}.{matrix}.weight" for e in range(mixture.model.sizes["experts"])
    ]
    held = np.stack([mixture.read(name).astype(np.float32) for name in names])
    return held.transpose(0, 2, 1) if matrix == "w2" else held


def matrix(folder: Path, name: str) -> np.ndarray[Any, Any]:
    """Give a dense matrix of layer 0 with neurons first."""
    held = open_checkpoint(folder).read(f"model.layers.0.mlp.{name}.weight").astype(np.float32)
    return held.T if name == "down_proj" else held


@pytest.mark.parametrize("per_matrix", [False, True])
def test_drop_draws_a_share_of_neurons_anew(per_matrix: bool, dense: Path) -> None:
    mixture = plan(dense, method="drop", drop_ratio=0.4, drop_per_matrix=per_matrix, seed=3)
    sets = []
    for name, of in MATRICES.items():
        before, after = matrix(dense, of), experts(mixture, name)
        changed = (after != before).any(2)
        assert (changed.sum(1) == int(0.4 * 96)).all()
        assert (
            after[~changed] == np.broadcast_to(before, after.shape)[~changed]
        ).all()  # what is kept is kept bit for bit
        assert ((after != before).all(2) == changed).all()
        sets.append(changed)
        for expert in range(8):
            old, new = before[changed[expert]], after[expert][changed[expert]]
            assert abs(new.mean() - old.mean()) < 5 * old.std() / old.size**0.5
            assert abs(new.std() / old.std() - 1) < 5 / (2 * old.size) ** 0.5
    same = (sets[0] == sets[1]).all() and (sets[0] == sets[2]).all()
    assert bool(same) is not per_matrix
    assert len({row.tobytes() for row in sets[0]}) == 8  # each expert its own neurons


def test_drop_of_a_granular_expert_changes_its_own_part(dense: Path) -> None:
    mixture = plan(dense, method="drop", granularity=2, experts=4, drop_ratio=0.5)
    before, after = matrix(dense, "gate_proj").reshape(2, 48, 32), experts(mixture, "w1")
    changed = (after != np.concatenate([before, before])).any(2)
    assert (changed.sum(1) == 24).all()


def test_noise_has_its_standard_deviation_and_differs_between_experts(dense: Path) -> None:
    mixture = plan(dense, method="noise", noise_std=0.03)
    for name, of in MATRICES.items():
        noise = experts(mixture, name) - matrix(dense, of)
        assert abs(noise.std() / 0.03 - 1) < 0.02
        assert abs(np.corrcoef(noise.reshape(8, -1)) - np.eye(8)).max() < 0.08


@pytest.mark.parametrize("partition", ["random", "clusters"])
def test_split_is_a_partition_whose_experts_sum_to_the_dense_part(partition: str, dense: Path, tmp_path: Path) -> None:
    mixture = plan(dense, method="split", experts=4, top_k=4, partition=partition, router_std=0.0)
    gates = experts(mixture, "w1").reshape(96, 32)
    rows = {row.tobytes() for row in gates}
    assert rows == {np.ascontiguousarray(row).tobytes() for row in matrix(dense, "gate_proj")}
    assert len(rows) == 96
    write_hf(
        mixture, tmp_path / "moe", None, Options()
    )  # an even router gives each of all 4 experts a quarter, and down holds the 4
    assert gap(logits(dense), logits(tmp_path / "moe")) < 1e-5


def test_clusters_put_like_neurons_together(tmp_path: Path) -> None:
    """Neurons made of 4 directions, shuffled: each expert gets one direction."""
    from safetensors.torch import load_file, save_file

    folder = make_folder(tmp_path / "dense", "llama", num_hidden_layers=1, intermediate_size=64)
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(4, 32, generator=generator))
    owner = torch.randperm(64, generator=generator) % 4
    for path in folder.glob("*.safetensors"):
        held = load_file(path)
        name = "model.layers.0.mlp.gate_proj.weight"
        if name in held:
            held[name] = directions[owner] + 0.02 * torch.randn(64, 32, generator=generator)
        save_file(held, path, metadata={"format": "pt"})
    mixture = plan(folder, method="split", experts=4, top_k=2, partition="clusters", router="centroid", router_std=0.1)
    likeness = np.einsum("ejd,kd->ejk", experts(mixture, "w1"), directions.numpy()).argmax(2)
    assert all(len(set(row)) == 1 for row in likeness.tolist())
    assert len({row[0] for row in likeness.tolist()}) == 4
    router = mixture.read("model.layers.0.block_sparse_moe.gate.weight")
    assert ((router @ directions.numpy().T).argmax(1) == likeness[:, 0]).all()
    np.testing.assert_allclose(np.linalg.norm(router, axis=1), 0.1 * 32**0.5, rtol=1e-5)


def test_mix_takes_experts_in_turn_and_averages_the_rest(dense: Path, tmp_path: Path) -> None:
    folders = [dense] + [
        make_folder(tmp_path / str(s), "llama", seed=s, num_hidden_layers=1, intermediate_size=96) for s in (1, 2)
    ]
    sources = [open_checkpoint(folder) for folder in folders]
    branches = tuple(map(str, folders[1:]))
    mixture = plan_upcycle(sources[0], Recipe(method="mix", branches=branches, experts=6), sources[1:])
    for name, of in MATRICES.items():
        held = experts(mixture, name)
        for expert in range(6):
            np.testing.assert_array_equal(held[expert], matrix(folders[expert % 3], of))
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.norm.weight", "model.embed_tokens.weight"):
        mean = np.mean([s.read(name).astype(np.float64) for s in sources], axis=0)
        np.testing.assert_allclose(mixture.read(name), mean, rtol=1e-6)
    kept = plan_upcycle(sources[0], Recipe(method="mix", branches=branches, average=False), sources[1:])
    np.testing.assert_array_equal(kept.read("model.norm.weight"), sources[0].read("model.norm.weight"))


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "glm4_moe", "dots1"])
def test_expand_with_as_many_more_experts_for_a_token_computes_the_same(family: str, tmp_path: Path) -> None:
    source = open_checkpoint(make_folder(tmp_path / "moe", family))
    exact = plan_expand(source, Recipe(method="expand", experts=12, top_k=6, router_std=0.0))
    assert exact.inexact == ()
    write_hf(exact, tmp_path / "exact", None, Options())
    assert gap(logits(tmp_path / "moe"), logits(tmp_path / "exact")) < 1e-5
    noisy = plan_expand(source, Recipe(method="expand", noise_std=0.01, seed=1))
    assert noisy.inexact
    router = noisy.model.tensor("router", 1).name
    spread = noisy.read(router) - np.tile(source.read(router), (2, 1))
    assert abs(spread.std() / 1e-3 - 1) < 0.3
    write_hf(noisy, tmp_path / "noisy", None, Options())
    assert gap(logits(tmp_path / "moe"), logits(tmp_path / "noisy")) > 1e-5
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "noisy").num_parameters() == noisy.report["parameters"]


def test_zeros_mean_router_favours_no_direction(dense: Path) -> None:
    router = plan(dense, router="zeros-mean").read("model.layers.0.block_sparse_moe.gate.weight")
    assert abs(router.mean(0)).max() < 1e-8
    assert abs(router.std() / (0.02 * (7 / 8) ** 0.5) - 1) < 0.1
    drawn = plan(dense).read("model.layers.0.block_sparse_moe.gate.weight")
    assert abs(drawn.std() / 0.02 - 1) < 0.1


@pytest.mark.parametrize(
    "recipe",
    [
        {"method": "drop", "seed": 5},
        {"method": "noise", "noise_std": 0.02, "seed": 5},
        {"method": "split", "partition": "clusters", "seed": 5},
        {"method": "virtual-group", "granularity": 4, "seed": 5},
    ],
)
def test_bytes_depend_on_the_seed_alone(recipe: dict[str, Any], dense: Path, tmp_path: Path) -> None:
    layouts = [(Degrees(), 1), (Degrees(tp=4, ep=2, etp=1), 3), (Degrees(ep=4, etp=3), 2)]
    folders = []
    for number, (degrees, workers) in enumerate(layouts):
        write_sharded(plan(dense, **recipe), tmp_path / str(number), degrees, Options(workers=workers))
        folders.append(open_checkpoint(tmp_path / str(number)))
    other = plan(dense, **{**recipe, "seed": 6})
    for name in folders[0].tensors:
        for folder in folders[1:]:
            np.testing.assert_array_equal(folders[0].read(name).view(np.uint8), folder.read(name).view(np.uint8))
    differ = [n for n in other.tensors if (other.read(n).view(np.uint8) != folders[0].read(n).view(np.uint8)).any()]
    assert any("gate.weight" in name for name in differ)
    assert all("block_sparse_moe" in name for name in differ)


def test_draws_are_addressable_by_row() -> None:
    whole = normal(1, "a", 0, 100, 7)
    for first, count in ((0, 1), (31, 2), (40, 60), (99, 1)):
        np.testing.assert_array_equal(normal(1, "a", first, count, 7), whole[first : first + count])
    assert not (normal(1, "b", 0, 100, 7) == whole).any()
    assert not (normal(2, "a", 0, 100, 7) == whole).any()
    assert abs(np.corrcoef(whole.T) - np.eye(7)).max() < 0.4
