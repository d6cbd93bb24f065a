"""What a config says that a model computes: transformers' own config classes are the judge, for every family and key."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from moeconv.errors import MappingError
from moeconv.families import FAMILIES, document
from moeconv.families.base import ROLES, Model
from moeconv.families.compute import Compute, Key
from moeconv.families.key_states import unknown_keys
from moeconv.families.keys import config_keys

SIZES: dict[str, Any] = {
    "num_hidden_layers": 4,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "vocab_size": 64,
    "moe_intermediate_size": 16,
    "num_experts": 16,
    "num_local_experts": 16,
    "n_routed_experts": 16,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "shared_expert_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "moe_num_experts": 16,
    "moe_k": 2,
    "moe_topk": 2,
    "moe_num_shared_experts": 1,
    "q_lora_rank": 12,
    "kv_lora_rank": 10,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 6,
    "v_head_dim": 8,
}
# Families whose every key is known; of the others only the tensors are.
COMPUTED = [name for name, family in FAMILIES.items() if family.compute.lacks is None]


def silent(model_type: str) -> dict[str, Any]:
    """Give a config that states sizes alone."""
    keys = {
        key for names in FAMILIES[model_type].sizes.values() for key in ((names,) if isinstance(names, str) else names)
    } | {"first_k_dense_replace"}
    return {"model_type": model_type} | {key: value for key, value in SIZES.items() if key in keys}


def computed(config: dict[str, Any]) -> Compute:
    return Model.from_config(FAMILIES[config["model_type"]], config).compute


def reference(config: dict[str, Any]) -> Any:
    return AutoConfig.for_model(**copy.deepcopy(config))  # it writes into what it is given


def check(config: dict[str, Any]) -> None:
    """Compare everything that is computed with transformers' config of the same keys."""
    ours, theirs = computed(config), reference(config)
    assert ours.norm_eps == theirs.rms_norm_eps
    assert ours.max_positions == theirs.max_position_embeddings
    assert ours.act == theirs.hidden_act
    assert ours.init_std == theirs.initializer_range
    theirs.standardize_rope_params()  # as a model does that is made of it
    rope = dict(theirs.rope_parameters)
    assert ours.rope.kind == rope.pop("rope_type")
    assert ours.rope.theta == rope.pop("rope_theta")
    assert ours.rope.share == (rope.pop("partial_rotary_factor", None) or 1.0)
    rope.pop("type", None)
    assert dict(ours.rope.parameters) == {key: value for key, value in rope.items() if value is not None}
    rule = FAMILIES[config["model_type"]].compute
    kinds = getattr(theirs, "layer_types", None)
    window = (getattr(theirs, "sliding_window", None) or None) if rule.window is not None else None
    windows = tuple(window if kind == "sliding_attention" else None for kind in kinds) if kinds else (window,) * 4
    assert ours.windows == windows
    if ours.router is not None and rule.router is not None:
        assert ours.router.top_k == theirs.num_experts_per_tok
        for value, key in (("normalise", rule.router.normalise), ("scale", rule.router.scale)):
            assert getattr(ours.router, value) == (getattr(theirs, key.name) if isinstance(key, Key) else key)
        grouped = rule.router.grouped is None or ours.router.groups > 1
        for value, key in (("groups", rule.router.groups), ("group_top_k", rule.router.group_top_k)) if grouped else ():
            assert getattr(ours.router, value) == (getattr(theirs, key.name) if isinstance(key, Key) else key)


@pytest.mark.parametrize("model_type", COMPUTED)
def test_silent_keys_take_transformers_values(model_type: str) -> None:
    check(silent(model_type))


SAYINGS: list[dict[str, Any]] = [
    {"rms_norm_eps": 3e-5},
    {"rope_theta": 12345.0},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 777.0}},
    {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 5e5},
    {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
    {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 512,
        }
    },
    {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16.0}, "max_position_embeddings": 1024},
    {
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 4.0,
            "truncate": False,
            "mscale": 0.7,
            "mscale_all_dim": 1.0,
        },
        "original_max_position_embeddings": 256,
    },
    {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0]}},
    {"sliding_window": 7, "use_sliding_window": True},
    {"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 2},
    {"sliding_window": 7, "use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"] * 2},
    {"sliding_window": None},
    {"use_sliding_window": False, "sliding_window": 9},
    {"norm_topk_prob": True, "routed_scaling_factor": 2.5, "n_group": 4, "topk_group": 2},
    {"norm_topk_prob": False, "hidden_act": "gelu", "initializer_range": 0.1, "max_position_embeddings": 99},
]


def skips(model_type: str, saying: dict[str, Any]) -> bool:
    """Phi-MoE's positions are plain ones, or longrope with two factors more; transformers refuses a gpt-oss without its window."""
    if model_type == "gpt_oss" and saying == {"sliding_window": None}:
        return True
    rope = saying.get("rope_scaling") or saying.get("rope_parameters") or {}
    return model_type == "phimoe" and rope.get("rope_type", rope.get("type", "default")) != "default"


@pytest.mark.parametrize("saying", SAYINGS, ids=lambda s: "-".join(s))
@pytest.mark.parametrize("model_type", COMPUTED)
def test_stated_keys_mean_what_transformers_takes(model_type: str, saying: dict[str, Any]) -> None:
    if skips(model_type, saying):
        pytest.skip("transformers wants more parameters of such positions")
    if "layer_types" in saying and FAMILIES[model_type].compute.window is None:
        pytest.skip("the family has no window")
    if model_type == "glm4_moe" and "longrope" in str(saying):
        pytest.skip("half of each head is turned, so these factors are too many")
    if "layer_types" in saying and FAMILIES[model_type].compute.window.pattern == "all":  # type: ignore[union-attr]
        pytest.skip("transformers reads no layer_types for this family")
    check(silent(model_type) | saying)


@pytest.mark.parametrize("model_type", COMPUTED)
def test_partial_rotary(model_type: str) -> None:
    config = silent(model_type) | {"partial_rotary_factor": 0.75}
    if FAMILIES[model_type].compute.rope.share is None:
        with pytest.raises(MappingError, match="partial_rotary_factor"):
            computed(config)
    else:
        check(config)


@pytest.mark.parametrize("saying", SAYINGS, ids=lambda s: "-".join(s))
@pytest.mark.parametrize("model_type", COMPUTED)
def test_keys_of_what_is_computed_say_the_same(model_type: str, saying: dict[str, Any]) -> None:
    """`config_keys` is the inverse of reading, whatever the config said."""
    if model_type == "glm4_moe" and "longrope" in str(saying):
        pytest.skip("half of each head is turned, so these factors are too many")
    if skips(model_type, saying):
        pytest.skip("transformers wants more parameters of such positions")
    config = silent(model_type) | saying
    compute = computed(config)
    if compute.others:
        with pytest.raises(MappingError, match=next(iter(compute.others))):
            config_keys(FAMILIES[model_type].compute, compute)
        return
    again = silent(model_type) | config_keys(FAMILIES[model_type].compute, compute)
    assert computed(again) == compute
    reference(again)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rms_norm_eps", "small"),
        ("rms_norm_eps", float("nan")),
        ("rms_norm_eps", True),
        ("rope_theta", -1.0),
        ("rope_theta", "1e4"),
        ("rope_scaling", 5),
        ("rope_scaling", {"rope_type": "other"}),
        ("rope_scaling", {"rope_type": "linear"}),
        ("rope_scaling", {"rope_type": "linear", "factor": "two"}),
        ("rope_scaling", {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}),
        ("max_position_embeddings", 1.5),
        ("sliding_window", -3),
        ("num_experts_per_tok", 17),
    ],
)
def test_values_that_mean_nothing_are_refused(key: str, value: Any) -> None:
    with pytest.raises(MappingError, match=r"config\.json"):
        computed(silent("mixtral") | {key: value})


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda f: f.model_type)
def test_roles_are_known_and_name_one_tensor(family: Any) -> None:
    roles = [rule.role for rule in family.rules]
    assert set(roles) <= ROLES
    assert len(roles) == len(set(roles))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_key_of_transformers_has_a_state(model_type: str) -> None:
    """Each field that the config class serialises, and each other name that it takes one by, is honoured, harmless or refused."""
    from transformers import CONFIG_MAPPING

    config = CONFIG_MAPPING[model_type]()
    keys = {*config.to_dict(), *config.attribute_map}
    assert unknown_keys(FAMILIES[model_type], dict.fromkeys(keys)) == []


def test_the_page_of_families_is_made_from_the_data() -> None:
    page = Path(__file__).parents[3] / "docs" / "families.md"
    assert page.read_text(encoding="utf8") == document.page(), "python -m moeconv.families.document > docs/families.md"


WINDOW_OF_QWEN = {"use_sliding_window": False, "sliding_window": 5, "layer_types": ["sliding_attention"] * 4}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


@pytest.mark.parametrize(
    ("model_type", "saying", "words"),
    [
        ("mixtral", {"num_local_experts": 4, "num_experts": 8}, "num_local_experts is 4, num_experts is 8"),
        ("ernie4_5_moe", {"moe_k": 2, "num_experts_per_tok": 1}, "moe_k is 2, num_experts_per_tok is 1"),
        ("hunyuan_v1_moe", {"moe_topk": 2, "num_experts_per_tok": 1}, "moe_topk is 2, num_experts_per_tok is 1"),
        ("mixtral", {"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'; expected true or false"),
        ("llama", {"attention_bias": None}, "attention_bias is None"),
        ("qwen3_moe", {"norm_topk_prob": 1}, "norm_topk_prob is 1; expected true or false"),
        ("qwen2", WINDOW_OF_QWEN, "use_sliding_window false.*layer_types"),
        ("qwen2_moe", WINDOW_OF_QWEN, "use_sliding_window false.*layer_types"),
        ("gpt_oss", {"sliding_window": None}, "sliding_window is None"),
        ("qwen2", {"layer_types": [["full_attention"]] * 4}, "layer_types"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method is 'noaux_tc'"),
        ("deepseek_v2", {"topk_method": "group_limited_greedy", "topk_group": 1}, "n_group is None"),
        ("deepseek_v3", {"rope_scaling": YARN | {"factor": None, "mscale_all_dim": 1.0}}, "mscale_all_dim"),
        ("deepseek_v3", {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "mscale_all_dim": 1.0}}, "mscale_all_dim"),
        ("glm4_moe_lite", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("llama", {"rope_scaling": {"rope_type": "yarn"}}, "lacks factor"),
        ("llama", {"rope_scaling": YARN, "rope_theta": 1.0}, "rope_theta is 1"),
        ("llama", {"rope_scaling": LONG | {"original_max_position_embeddings": 1}}, "original_max_position_embeddings"),
        ("llama", {"rope_scaling": YARN | {"original_max_position_embeddings": None}}, "original_max_position_embeddings"),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": None}}, "rope_theta is None"),
        ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 5.0}}}, "full_attention"),
        ("mixtral", {"attention_dropout": None}, "attention_dropout is None"),
        ("ernie4_5_moe", {"moe_layer_interval": None}, "moe_layer_interval is None"),
        ("qwen3_moe", {"mlp_only_layers": [False]}, "mlp_only_layers"),
        ("qwen3_moe", {"mlp_only_layers": {}}, "mlp_only_layers"),
        ("minimax_m2", {"rotary_dim": 0}, "rotary_dim is 0"),
        ("minimax_m2", {"rotary_dim": 9}, "rotary_dim is 9"),
        ("glm4_moe", {"partial_rotary_factor": None}, "partial_rotary_factor is null"),
        ("deepseek_v3", {"num_mtp_layers": -0.0}, "num_mtp_layers is -0.0"),
        ("llama", {"initializer_range": 7}, "initializer_range is 7; .* at most 1"),
        ("llama", {"rms_norm_eps": 10**400}, "rms_norm_eps is 1000"),
        ("llama", {"rope_theta": 10**400}, "rope_theta is 1000"),
        ("llama", {"rope_theta": 10**30}, "rope_theta is 1000"),
        ("llama", {"rope_scaling": YARN | {"factor": float("inf")}}, "factor of the rotary positions is inf"),
    ],
)  # fmt: skip
def test_what_transformers_refuses_or_reads_otherwise_is_refused_by_name(
    model_type: str, saying: dict[str, Any], words: str
) -> None:
    with pytest.raises(MappingError, match=words):
        computed(silent(model_type) | saying)


@pytest.mark.parametrize(
    ("model_type", "saying"),
    [
        *((name, {"is_causal": False}) for name in COMPUTED),
        *((name, {"per_layer_config": {"0": {"num_attention_heads": 2}}}) for name in COMPUTED),
        ("deepseek_v3", {"num_key_value_heads": 1}),
        ("deepseek_v3", {"head_dim": 16}),
        ("glm4_moe_lite", {"qk_head_dim": 16}),
        ("olmoe", {"clip_qkv": 0.05}),
        ("jamba", {"mamba_proj_bias": True}),
    ],
)
def test_keys_that_nobody_here_computes_are_named(model_type: str, saying: dict[str, Any]) -> None:
    config = silent(model_type) | dict.fromkeys(("mamba_d_state", "mamba_d_conv", "mamba_expand", "mamba_dt_rank"), 4)
    if model_type in COMPUTED and "head_dim" in config and "kv_lora_rank" in config:
        del config["head_dim"]
    assert computed(config | saying).others == saying


def test_a_length_beside_the_table_counts_before_the_tables() -> None:
    """transformers puts it into the table when a model is made."""
    config = silent("llama") | {"rope_scaling": YARN, "original_max_position_embeddings": 16}
    check(config)
    assert computed(config).rope.parameters["original_max_position_embeddings"] == 16


def test_an_empty_table_is_not_a_missing_one() -> None:
    config = silent("gpt_oss") | {"rope_parameters": {}}
    check(config)
    assert computed(config).rope.kind == "default"
