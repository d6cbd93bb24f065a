"""Keys of config.json, flipped and mutated: a light part of what `config_keys` and `configs` run at full size."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from moeconv.errors import MoeconvError
from moeconv.families import FAMILIES, compute
from moeconv.families.base import Model
from moeconv.families.compute import Compute
from runtime.model.support import check_supported
from tests.fuzz.configs import config_case, index_case, run_case
from tests.fuzz.flips import ROPES, flips
from tests.fuzz.judge import Judge
from tests.fuzz.verdicts import refusal_names, verdict
from tests.moeconv.models import RAM

pytestmark = pytest.mark.filterwarnings("ignore")
JUDGED = 5  # flips of each family whose logits are compared here
MUTATED = 4  # mutations of each file of each family
YARN = {"rope_theta": 1e4, **ROPES["yarn-all"]}

# What was once read otherwise than transformers does: the keys, and the verdict.
ONCE_WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"is_causal": False}, "refused"),
    ("llama", {"tie_word_embeddings": True}, "refused"),
    ("llama", {"per_layer_config": {"0": {"num_attention_heads": 2}}}, "refused"),
    ("llama", {"rope_scaling": ROPES["yarn-all"], "original_max_position_embeddings": 16}, "followed"),
    ("llama", {"rope_scaling": ROPES["longrope"], "original_max_position_embeddings": 16}, "followed"),
    ("llama", {"rope_parameters": YARN | {"truncate": None}}, "followed"),
    ("llama", {"rope_parameters": YARN | {"original_max_position_embeddings": None}}, "refused"),
    ("mistral", {"layer_types": ["full_attention", "sliding_attention"]}, "followed"),
    ("mixtral", {"router_jitter_noise": 0.3}, "harmless"),
    ("phimoe", {"input_jitter_noise": 0.3}, "harmless"),
    ("mixtral", {"num_experts": 8}, "refused"),
    ("mixtral", {"num_experts": 4}, "harmless"),
    ("qwen2_moe", {"layer_types": ["sliding_attention", "full_attention"]}, "refused"),
    ("qwen2_moe", {"use_sliding_window": True}, "harmless"),
    ("gpt_oss", {"rope_parameters": {}}, "followed"),
    ("gpt_oss", {"sliding_window": None}, "refused"),
    ("glm4_moe_lite", {"partial_rotary_factor": 0.5}, "refused"),
    ("hunyuan_v1_moe", {"num_experts_per_tok": 1}, "refused"),
    ("deepseek_v3", {"head_dim": 1}, "refused"),
    ("deepseek_v3", {"num_key_value_heads": 1}, "refused"),
]


@pytest.fixture(scope="module")
def judges() -> Iterator[dict[str, Judge]]:
    with tempfile.TemporaryDirectory(prefix="moeconv-keys-", dir=RAM) as folder:
        yield {name: Judge(name, Path(folder) / name) for name in FAMILIES}


@pytest.mark.parametrize(
    ("model_type", "saying", "kind"), ONCE_WRONG, ids=lambda v: v if isinstance(v, str) else "-".join(v)
)
def test_what_was_once_wrong(judges: dict[str, Judge], model_type: str, saying: dict[str, Any], kind: str) -> None:
    judge = judges[model_type]
    found = verdict(judge, list(saying), json.dumps(judge.config | saying).encode())
    assert found.kind == kind, found.what


def test_the_judge_sees_what_it_looks_for(judges: dict[str, Judge], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute, "FIXED", {})
    judge = judges["llama"]
    found = verdict(judge, ["is_causal"], json.dumps(judge.config | {"is_causal": False}).encode())
    assert found.kind == "finding"
    assert found.what.startswith("logits differ by")


def read(model_type: str, config: dict[str, Any]) -> tuple[Model, Compute] | str:
    """Read a config as the trainer does; the message where it refuses."""
    try:
        model = Model.from_config(FAMILIES[model_type], config)
        check_supported(model, Path("model"))
    except MoeconvError as error:
        return str(error)
    return model, model.compute


@pytest.mark.parametrize("model_type", FAMILIES)
def test_flipped_keys(judges: dict[str, Judge], model_type: str) -> None:
    """Each is refused by name, or changes nothing, or changes what is computed; of the last, some are given to transformers."""
    judge = judges[model_type]
    base = read(model_type, judge.config)
    changed = []
    for flip in flips(judge.config, judge.serialised, nested=False):
        found = read(model_type, flip.config)
        if isinstance(found, str):
            assert found == base or refusal_names([flip.key], found, None), (flip.key, flip.value, found)
        elif found != base:
            changed.append(flip)
    assert len(changed) > 20 or isinstance(base, str)
    for flip in Random(model_type).sample(changed, min(JUDGED, len(changed))):
        found = verdict(judge, [flip.key], json.dumps(flip.config).encode())
        assert found.kind != "finding", (flip.key, flip.value, found.what)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_mutated_configs_and_indexes(judges: dict[str, Judge], model_type: str) -> None:
    for make in (config_case, index_case):
        case = make(judges[model_type])
        for number in range(MUTATED):
            found = run_case(case, Random(f"short {model_type} {number}"))
            assert found.kind != "finding", (make.__name__, number, found.what)
