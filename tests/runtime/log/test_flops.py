"""The arithmetic of a step, against torch's own counter on transformers' models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from moeconv.families import family_of
from moeconv.families.base import Model
from runtime.log.flops import device_peak, forward_flops, peak_flops, training_flops

COMMON = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64,
}  # fmt: skip
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}


def models(model_type: str, options: dict[str, Any]) -> tuple[Model, Any]:
    config = AutoConfig.for_model(model_type, **(COMMON | options))
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()
    if hasattr(theirs, "set_experts_implementation"):
        theirs.set_experts_implementation("eager")
    values = config.to_dict()
    return Model.from_config(family_of(values), values), theirs


def counted(model: Any, seq_length: int, *, backward: bool) -> float:
    tokens = torch.arange(2 * seq_length).view(2, seq_length) % 96
    counter = FlopCounterMode(display=False)
    with counter:
        logits = model(input_ids=tokens, use_cache=False).logits
        if backward:
            logits.sum().backward()
    return counter.get_total_flops() / tokens.numel()


@pytest.mark.parametrize(
    ("model_type", "options"),
    [("mixtral", EXPERTS), ("mixtral", EXPERTS | {"tie_word_embeddings": True}), ("llama", {}), ("qwen2", {"head_dim": 8})],
)  # fmt: skip
def test_it_is_what_the_counter_sees(model_type: str, options: dict[str, Any]) -> None:
    mine, theirs = models(model_type, options)
    seq_length, head_dim = 32, options.get("head_dim", 16)
    # Eager attention multiplies the whole square of positions, a rotary table's product of 1 comes on top.
    square = 4 * seq_length * 4 * head_dim * 3
    rotary = 2 * seq_length * head_dim / 2 / (2 * seq_length)
    want = counted(theirs, seq_length, backward=False) - square / 2
    assert forward_flops(mine, seq_length) == pytest.approx(want, abs=2 * rotary)
    full = counted(theirs, seq_length, backward=True) - 3 * square / 2
    assert training_flops(mine, seq_length) == pytest.approx(full, rel=0.02)


def test_a_window_bounds_attention() -> None:
    options = {"num_hidden_layers": 1}
    plain, _ = models("mistral", options | {"sliding_window": None})
    window, _ = models("mistral", options | {"sliding_window": 8})
    # The mean of min(position + 1, 8) over many positions, against the model's linear count.
    positions = 4096
    keys = sum(min(position + 1, 8) for position in range(positions)) / positions
    plain_keys = positions / 2
    got = forward_flops(plain, positions) - forward_flops(window, positions)
    assert got == pytest.approx(4 * (plain_keys - keys) * 4 * 16, rel=1e-3)
    assert forward_flops(window, 4) == forward_flops(plain, 4)


def test_mixtral_8x7b_has_the_known_size() -> None:
    config = AutoConfig.for_model("mixtral").to_dict()
    model = Model.from_config(family_of(config), config)
    # 12.88e9 active parameters, of which 0.13e9 are the embedding's table.
    assert forward_flops(model, 1) == pytest.approx(2 * (12.88e9 - 0.131e9), rel=1e-3)


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4), ("NVIDIA H100 PCIe", 756.0), ("NVIDIA H200", 989.4), ("NVIDIA H200 NVL", 835.0),
        ("NVIDIA A100-SXM4-80GB", 311.8), ("NVIDIA A10G", 70.0), ("NVIDIA A10", 125.0), ("NVIDIA GB200", 2500.0),
        ("NVIDIA L4", 121.0), ("NVIDIA L40S", 362.1), ("Tesla V100-SXM2-32GB", 125.0), ("NVIDIA H20", 148.0),
        ("NVIDIA GeForce RTX 4090", 165.2), ("AMD Instinct MI300X", 1307.4),
    ],
)  # fmt: skip
def test_the_peak_is_that_of_the_named_gpu(name: str, teraflops: float) -> None:
    assert peak_flops(name) == teraflops * 1e12


def test_an_unknown_gpu_and_a_cpu_have_no_peak() -> None:
    assert peak_flops("NVIDIA Something 9000") is None
    assert peak_flops("NVIDIA H1000") is None
    assert device_peak(torch.device("cpu"), torch.bfloat16) is None


def test_attention_within_documents() -> None:
    mine, _ = models("mixtral", EXPERTS)
    documents = (4, 12, 16)
    want = sum(length / 32 * forward_flops(mine, length) for length in documents)
    assert forward_flops(mine, 32, documents) == pytest.approx(want)
    assert forward_flops(mine, 32, documents) < forward_flops(mine, 32)
