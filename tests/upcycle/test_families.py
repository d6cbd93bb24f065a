"""Every family's tensors as transformers saves them: shards and back, byte for byte."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moeconv.checkpoint import open_checkpoint
from moeconv.convert import Options, write_hf, write_sharded
from moeconv.describe import describe
from moeconv.families import FAMILIES as KNOWN
from moeconv.families.key_states import SPECIAL_TOKENS
from moeconv.layout.degrees import Degrees
from tests.moeconv.models import digests
from tests.upcycle.hub import FAMILIES, make_folder


@pytest.mark.parametrize("model_type", FAMILIES)
def test_shards_and_back(model_type: str, tmp_path: Path) -> None:
    source = open_checkpoint(make_folder(tmp_path / "hf", model_type, torch.bfloat16))
    experts = source.model.sizes.get("experts", 0)
    write_sharded(source, tmp_path / "shards", Degrees(tp=2, ep=2 if experts else 1, pp=2), Options())
    write_hf(open_checkpoint(tmp_path / "shards"), tmp_path / "back", None, Options())
    assert digests(tmp_path / "back") == digests(tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    in_experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    total = sum(p.numel() for name, p in model.named_parameters() if "e_score_correction" not in name)
    counts = describe(source)
    assert counts["parameters"] == total
    assert counts["active_parameters"] == total - in_experts // 2


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"tie_word_embeddings": True}),
        ("qwen3", {"attention_bias": True}),
        ("qwen2_moe", {"qkv_bias": False, "decoder_sparse_step": 2, "mlp_only_layers": []}),
        ("qwen2_moe", {"shared_expert_intermediate_size": 0}),
        ("qwen3_moe", {"attention_bias": True, "mlp_only_layers": [1]}),
        ("glm4_moe", {"attention_bias": True, "use_qk_norm": True, "first_k_dense_replace": 0}),
        ("dots1", {"attention_bias": True, "n_shared_experts": 0}),
    ],
)
def test_options_of_a_family(model_type: str, options: dict[str, object], tmp_path: Path) -> None:
    source = open_checkpoint(make_folder(tmp_path / "hf", model_type, **options))
    write_sharded(source, tmp_path / "shards", Degrees(tp=2), Options())
    write_hf(open_checkpoint(tmp_path / "shards"), tmp_path / "back", None, Options())
    assert digests(tmp_path / "back") == digests(tmp_path / "hf")


@pytest.mark.parametrize("model_type", FAMILIES)
def test_silent_configs_have_transformers_special_tokens(model_type: str) -> None:
    config = AutoConfig.for_model(model_type)
    assert {key: getattr(config, key) for key in SPECIAL_TOKENS if getattr(config, key) is not None} == KNOWN[
        model_type
    ].tokens
