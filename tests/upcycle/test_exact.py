"""Methods that keep the dense model's function: fp32 logits by transformers, from the exported folder, against the dense model's."""

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
from moeconv.upcycling.planned import Planned, plan_upcycle
from moeconv.upcycling.recipe import Recipe
from tests.upcycle.hub import gap, logits, make_folder

pytestmark = pytest.mark.filterwarnings(
    "ignore:Initializing zero-element tensors"
)  # Qwen2-MoE's shared expert of width 0
TOLERANCE = 1e-5
VG = {"method": "virtual-group"}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
WINDOWS = {"use_sliding_window": True, "sliding_window": 5}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "llama copy": ("llama", {}, {"top_k": 3}, "mixtral"),
    "llama vg": ("llama", {}, VG | {"granularity": 4}, "mixtral"),
    "llama vg up_down, 2 groups": ("llama", {}, VG | {"granularity": 2, "top_k": 4, "scale_placement": "up_down"}, "mixtral"),
    "llama tied": ("llama", {"tie_word_embeddings": True}, VG | {"granularity": 3}, "mixtral"),
    "llama 3 rope": ("llama", {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 16}}, {}, "mixtral"),
    "llama head_dim": ("llama", {"head_dim": 16, "rms_norm_eps": 1e-3}, {}, "mixtral"),
    "llama gelu, into qwen2_moe": ("llama", {"hidden_act": "gelu"}, {"carrier": "qwen2_moe"}, "qwen2_moe"),
    "llama some layers": ("llama", {"num_hidden_layers": 3}, {"layers": (0, 2)}, "qwen2_moe"),
    "llama shared": ("llama", {}, VG | {"granularity": 2, "shared_experts": 1}, "qwen2_moe"),
    "llama shared, glm": ("llama", {}, VG | {"granularity": 2, "shared_experts": 2, "carrier": "glm4_moe"}, "glm4_moe"),
    "mistral copy": ("mistral", {}, {}, "mixtral"),
    "mistral vg": ("mistral", {"sliding_window": 5}, VG | {"granularity": 4, "router": "zeros-mean"}, "mixtral"),
    "mistral no window": ("mistral", {"sliding_window": None}, {"shared_experts": 2}, "qwen2_moe"),
    "mistral window, shared": ("mistral", {"sliding_window": 5}, {"shared_experts": 1}, "qwen2_moe"),
    "qwen2 some windows": ("qwen2", WINDOWS | {"max_window_layers": 1}, {}, "qwen2_moe"),
    "qwen3 some windows": ("qwen3", WINDOWS | {"max_window_layers": 1}, {"shared_experts": 1}, "dots1"),
    "qwen3 all windows": ("qwen3", WINDOWS | {"max_window_layers": 0}, {}, "qwen3_moe"),
    "llama yarn": ("llama", {"rope_parameters": YARN}, {}, "mixtral"),
    "qwen2 linear": ("qwen2", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, {}, "qwen2_moe"),
    "qwen2 copy": ("qwen2", {}, {}, "qwen2_moe"),
    "qwen2 vg": ("qwen2", {}, VG | {"granularity": 2, "top_k": 6}, "qwen2_moe"),
    "qwen2 vg shared": ("qwen2", {}, VG | {"granularity": 3, "shared_experts": 1}, "qwen2_moe"),
    "qwen2 shared, glm": ("qwen2", {}, {"shared_experts": 1, "carrier": "glm4_moe"}, "glm4_moe"),
    "qwen3 copy": ("qwen3", {}, {}, "qwen3_moe"),
    "qwen3 vg, bias": ("qwen3", {"attention_bias": True}, VG | {"granularity": 4}, "qwen3_moe"),
    "qwen3 shared": ("qwen3", {}, VG | {"granularity": 2, "shared_experts": 1}, "dots1"),
    "qwen3 shared, glm": ("qwen3", {}, VG | {"granularity": 2, "shared_experts": 1, "carrier": "glm4_moe"}, "glm4_moe"),
    "qwen3 first layer dense": ("qwen3", {}, {"layers": (1,), "carrier": "dots1", "shared_experts": 1}, "dots1"),
    "drop of nothing": ("llama", {}, {"method": "drop", "drop_ratio": 0.0}, "mixtral"),
    "noise of nothing": ("llama", {}, {"method": "noise", "noise_std": 0.0}, "mixtral"),
}  # fmt: skip


def planned(folder: Path, recipe: dict[str, Any]) -> Planned:
    return plan_upcycle(open_checkpoint(folder), Recipe(**recipe))


@pytest.mark.parametrize("case", CASES)
def test_logits_and_counts(case: str, tmp_path: Path) -> None:
    family, options, recipe, carrier = CASES[case]
    source = make_folder(tmp_path / "dense", family, **options)
    plan = planned(source, recipe)
    assert plan.inexact == ()
    assert plan.config["model_type"] == carrier
    write_sharded(plan, tmp_path / "shards", Degrees(ep=2), Options())
    write_hf(open_checkpoint(tmp_path / "shards"), tmp_path / "moe", None, Options())
    assert gap(logits(source), logits(tmp_path / "moe")) < TOLERANCE
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    unused = 1 - plan.config["num_experts_per_tok"] / plan.model.sizes["experts"]
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    assert plan.report["parameters"] == model.num_parameters()
    assert plan.report["active_parameters"] == model.num_parameters() - round(experts * unused)


@pytest.mark.parametrize("bf16_exact", [True, False])
def test_scaling_in_bf16_rounds_only_where_it_says_so(bf16_exact: bool, tmp_path: Path) -> None:
    source = make_folder(tmp_path / "dense", "llama", torch.bfloat16)
    plan = planned(source, VG | {"granularity": 4 if bf16_exact else 3})
    assert plan.lossless is bf16_exact
    write_hf(plan, tmp_path / "moe", None, Options())
    error = gap(logits(source), logits(tmp_path / "moe"))
    assert error < TOLERANCE if bf16_exact else TOLERANCE < error < 0.05


def test_what_is_not_in_the_feed_forward_part_is_the_same_bytes(tmp_path: Path) -> None:
    source = open_checkpoint(make_folder(tmp_path / "dense", "qwen3", torch.bfloat16, attention_bias=True))
    write_sharded(plan_upcycle(source, Recipe()), tmp_path / "moe", Degrees(tp=2, ep=4), Options())
    moe = open_checkpoint(tmp_path / "moe")
    kept = [name for name in source.tensors if ".mlp." not in name]
    assert len(kept) > 20
    for name in kept:
        np.testing.assert_array_equal(source.read(name).view(np.uint8), moe.read(name).view(np.uint8))


@pytest.mark.parametrize("top_k", [4, 8])
def test_every_token_meets_each_part_of_one_copy(top_k: int, tmp_path: Path) -> None:
    source = make_folder(tmp_path / "dense", "llama")
    write_hf(planned(source, VG | {"granularity": 4, "top_k": top_k}), tmp_path / "moe", None, Options())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "moe").eval()
    chosen: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda module, inputs, out: chosen.append(out[2]))
    with torch.no_grad():
        model(torch.arange(400).reshape(4, 100) % 101)
    for experts in chosen:
        parts = torch.nn.functional.one_hot(experts % 4, 4).sum(1)
        assert (parts == top_k // 4).all()
        copies = torch.nn.functional.one_hot(experts // 4, 8).sum(1)
        assert set(copies.unique().tolist()) == {0, 4}


@pytest.mark.parametrize(
    ("recipe", "trains"),
    [({}, False), (VG | {"granularity": 2}, False), ({"method": "drop"}, True), ({"method": "noise", "noise_std": 0.05}, True)],
)  # fmt: skip
def test_router_gradient_between_copies_at_the_first_step(recipe: dict[str, Any], trains: bool, tmp_path: Path) -> None:
    source = make_folder(tmp_path / "dense", "llama")
    plan = planned(source, recipe)
    write_hf(plan, tmp_path / "moe", None, Options())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    tokens = torch.arange(64)[None] * 7 % 101
    model(tokens, labels=tokens).loss.backward()
    by_copy = [layer.mlp.gate.weight.grad.reshape(8, -1, 32).sum(1) for layer in model.model.layers]
    largest = max(float(gradient.abs().max()) for gradient in by_copy)
    assert largest > 1e-4 if trains else largest < 1e-6
    assert any("gradient" in note for note in plan.notes) is not trains


def test_llama_without_rope_theta_keeps_its_own_default(tmp_path: Path) -> None:
    import json

    source = make_folder(tmp_path / "dense", "llama")
    config = json.loads((source / "config.json").read_text())
    for key in ("rope_parameters", "rope_theta", "rms_norm_eps", "head_dim", "tie_word_embeddings", "hidden_act"):
        config.pop(key, None)
    (source / "config.json").write_text(json.dumps(config))
    write_hf(planned(source, {}), tmp_path / "moe", None, Options())
    assert gap(logits(source), logits(tmp_path / "moe")) < TOLERANCE
