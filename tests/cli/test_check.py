"""inspect, verify and diff as a user calls them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

Call = Callable[..., Result]
W2 = "model.layers.1.block_sparse_moe.experts.2.w2.weight"


@pytest.fixture
def shards(call: Call, mixtral: Path, tmp_path: Path) -> Path:
    """The small Mixtral over tp 2, ep 2, pp 2."""
    assert call("import-hf", mixtral, tmp_path / "shards", "--tp", 2, "--ep", 2, "--pp", 2).exit_code == 0
    return tmp_path / "shards"


def changed(mixtral: Path, folder: Path) -> Path:
    """Copy the source with one element of one tensor changed by 1."""
    folder.mkdir()
    for path in mixtral.iterdir():
        if path.suffix == ".safetensors":
            tensors = load_file(path)
            if W2 in tensors:
                tensors[W2][3, 5] += 1.0
            save_file(tensors, folder / path.name, metadata={"format": "pt"})
        else:
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_inspect_counts_what_transformers_counts(call: Call, mixtral: Path, shards: Path) -> None:
    value = json.loads(call("inspect", shards, "--json").stdout)
    model = AutoModelForCausalLM.from_pretrained(mixtral)
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    total = model.num_parameters()
    assert (value["parameters"], value["active_parameters"]) == (total, total - experts // 2)
    assert value["bytes"] == 2 * total
    assert value["stages"] == [[0, 1], [2, 3]]


def test_inspect_rank_lists_its_rectangles(call: Call, shards: Path) -> None:
    value = json.loads(call("inspect", shards, "--rank", "tp=1,ep=1,pp=0", "--tensor", "*layers.1*", "--json").stdout)
    rects = {t["name"].removeprefix("model.layers.1."): t["rect"] for t in value["rank"]["tensors"]}
    assert rects["self_attn.q_proj.weight"] == "[16:32, 0:32]"
    assert rects["self_attn.k_proj.weight"] == "[8:16, 0:32]"
    assert rects["self_attn.o_proj.weight"] == "[0:32, 16:32]"
    assert rects["block_sparse_moe.experts.2.w1.weight"] == "[12:24, 0:32]"
    assert rects["block_sparse_moe.experts.3.w2.weight"] == "[0:32, 12:24]"
    assert not any("experts.0" in name or "experts.1" in name for name in rects)
    assert call("inspect", shards, "--rank", "tp=2").exit_code == 1
    assert call("inspect", shards, "--rank", "cp=0").exit_code == 1
    assert call("inspect", shards, "--rank", "tp").exit_code == 1


def test_verify_against_names_the_first_difference(call: Call, mixtral: Path, shards: Path, tmp_path: Path) -> None:
    assert call("verify", shards, "--against", mixtral, "--logits").exit_code == 0
    result = call("verify", shards, "--against", changed(mixtral, tmp_path / "other"))
    assert result.exit_code == 3
    assert W2 in result.stdout
    assert "[3, 5]" in result.stdout
    assert "experts-ep1-etp0-pp0.safetensors" in result.stdout


def test_verify_logits_sees_a_change_in_the_config(call: Call, mixtral: Path, shards: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for path in mixtral.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    config = json.loads((other / "config.json").read_text())
    config["num_experts_per_tok"] = 1
    (other / "config.json").write_text(json.dumps(config))
    result = call("verify", shards, "--against", other, "--logits", "--json")
    value = json.loads(result.stdout)
    assert (result.exit_code, value["same"]) == (3, True)
    assert value["logits_difference"] > 1e-3


def test_verify_finds_any_flipped_byte(call: Call, shards: Path) -> None:
    for path in sorted(shards.iterdir()):
        data = path.read_bytes()
        for position in (9, len(data) // 2, len(data) - 2):
            path.write_bytes(data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :])
            result = call("verify", shards)
            assert result.exit_code == 1, (path, position)
            assert result.stderr.startswith("error: ")
        path.write_bytes(data)
    assert call("verify", shards).exit_code == 0


def test_verify_refuses_a_weight_file_that_other_readers_would_load(call: Call, shards: Path) -> None:
    save_file({"lm_head.weight": torch.zeros(2)}, shards / "extra.safetensors")
    result = call("verify", shards)
    assert (result.exit_code, "extra.safetensors" in result.stderr) == (1, True)


def test_diff_measures_values_and_config(call: Call, mixtral: Path, shards: Path, tmp_path: Path) -> None:
    assert call("diff", shards, mixtral).stdout == "no difference\n"
    other = changed(mixtral, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["rope_theta"] = 7.0
    (other / "config.json").write_text(json.dumps(config))
    result = call("diff", shards, other, "--json")
    value = json.loads(result.stdout)
    assert result.exit_code == 3
    assert [d["name"] for d in value["config"]] == ["rope_theta"]
    (tensor,) = value["tensors"]
    assert (tensor["name"], tensor["count"]) == (W2, 1)
    assert tensor["max_abs"] == pytest.approx(1.0, rel=0.01)
    assert tensor["mean_abs"] == pytest.approx(tensor["max_abs"] / (32 * 24))
