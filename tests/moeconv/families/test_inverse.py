"""A family's config of a model that is described without one: whatever one family says, the same comes back; another says it or names what it can't."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from moeconv.families import FAMILIES
from moeconv.families.base import Model
from moeconv.families.inverse import Description, layer_config, shapes_of, write_config
from moeconv.families.key_states import known_keys
from tests.moeconv.families.test_compute import COMPUTED, SAYINGS, reference, silent, skips

FLAGS: list[dict[str, Any]] = [
    {"attention_bias": True},
    {"mlp_bias": True},
    {"tie_word_embeddings": True},
    {"qkv_bias": False},
    {"use_qk_norm": True},
    {"mlp_only_layers": [0, 2]},
    {"decoder_sparse_step": 2},
    {"first_k_dense_replace": 3},
    {"n_shared_experts": 0},
    {"shared_expert_intermediate_size": 0},
]


def describe(model: Model) -> Description:
    parts = ("mlp", "expert", "shared")
    return Description(
        sizes=model.sizes,
        widths={part: model.width(part) for part in parts},
        shapes=shapes_of(model),
        moe_layers=model.moe_layers,
        linear_layers=model.linear_layers,
        tied=model.tied,
        compute=model.compute,
    )


def model_of(config: dict[str, Any]) -> Model:
    return Model.from_config(FAMILIES[config["model_type"]], config)


@pytest.mark.parametrize("saying", [*SAYINGS, *FLAGS], ids=lambda s: "-".join(s))
@pytest.mark.parametrize("model_type", COMPUTED)
def test_a_family_says_what_it_said(model_type: str, saying: dict[str, Any]) -> None:
    if model_type == "glm4_moe" and "longrope" in str(saying):
        pytest.skip("half of each head is turned, so these factors are too many")
    if skips(model_type, saying):
        pytest.skip("transformers wants more parameters of such positions")
    model = model_of(silent(model_type) | saying)
    config, problems = write_config(model.family, describe(model))
    assert problems == []
    again = model_of(config)
    assert again.compute == model.compute
    assert [(t.name, t.shape) for t in again.tensors.values()] == [(t.name, t.shape) for t in model.tensors.values()]
    reference(config)
    assert config.keys() - {"rope_scaling"} - FAMILIES[model_type].stated.keys() <= known_keys(model.family)


@pytest.mark.parametrize("model_type", COMPUTED)
def test_another_family_names_what_it_lacks(model_type: str) -> None:
    model = model_of(silent(model_type))
    for name, family in ((n, FAMILIES[n]) for n in COMPUTED):
        config, problems = write_config(family, describe(model))
        if not problems:
            assert model_of(config).compute == model.compute
            assert shapes_of(model_of(config)) == shapes_of(model)
        if name == model_type:
            assert problems == []
    wrong = replace(describe(model), shapes={**shapes_of(model), "attention.q_norm": (5,)})
    problems = set(write_config(model.family, wrong)[1])
    assert problems & {"norms of query and key heads (qk-norm)", "attention.q_norm of shape [5]"}


def test_one_layer_has_its_own_kind() -> None:
    said = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 3, "mlp_only_layers": [1]}
    model = model_of(silent("qwen2_moe") | said)
    for layer in range(4):
        one = model_of(layer_config(model, layer))
        assert one.compute == replace(model.compute, windows=(model.compute.windows[layer],))
        assert bool(one.moe_layers) == (layer in model.moe_layers)
