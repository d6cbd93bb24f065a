"""What flags describe: the family that holds it, what is missing, and that the config says what the flags said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from moeconv.errors import MoeconvError
from moeconv.families import family_of
from moeconv.families.base import Model
from runtime.initial.describe import from_config
from runtime.settings.architecture import check_architecture
from runtime.settings.drawn import draw
from runtime.settings.flags import parse_flags
from tests.runtime.settings.lines import MEGATRON, SCRIPT
from tests.runtime.words import VOCAB_SIZE, make_tokenizer
from tests.support.configs import tiny_config, trained_families

DENSE = "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --max-position-embeddings 128 --vocab-size 96"
MOE = f"{DENSE} --num-experts 8 --moe-router-topk 2 --moe-ffn-hidden-size 32"
SIGMOID = f"{MOE} --moe-router-score-function sigmoid"
RUN = "--mock-data --train-iters 2"


def config_of(line: str) -> dict[str, Any]:
    given = parse_flags(f"{line} {RUN}".split())
    checkpoint, _, _ = draw(given, "nothing is there")
    config: dict[str, Any] = json.loads(checkpoint.carried_bytes["config.json"])
    check_architecture(given.stated, Model.from_config(family_of(config), config), Path("new"))
    # transformers reads the same from it, and fills in nothing else.
    read = AutoConfig.for_model(**config).to_dict()
    same = {key: value for key, value in config.items() if key in read}
    assert {key: read[key] for key in same} == same
    return config


@pytest.mark.parametrize(
    ("line", "family"),
    [
        (DENSE, "llama"),
        (f"{DENSE} --untie-embeddings-and-output-weights --group-query-attention --num-query-groups 2", "llama"),
        (f"{DENSE} --add-qkv-bias", "qwen2"),
        (f"{DENSE} --qk-layernorm --kv-channels 32", "qwen3"),
        (MOE, "mixtral"),
        (f"{MOE} --qk-layernorm", "qwen3_moe"),
        (f"{MOE} --moe-router-pre-softmax --add-qkv-bias --moe-shared-expert-intermediate-size 48 --moe-shared-expert-gate", "qwen2_moe"),
        (f"{MOE} --moe-router-pre-softmax --qk-layernorm --moe-layer-freq [0]*1+[1]*1", "qwen3_moe"),
        (f"{SIGMOID} --moe-router-topk-scaling-factor 2.5 --moe-shared-expert-intermediate-size 32 --qk-layernorm", "dots1"),
        (f"{SIGMOID} --moe-router-enable-expert-bias --moe-shared-expert-intermediate-size 32 --moe-layer-freq [0]*1+[1]*1 --rotary-percent 0.5", "glm4_moe"),
    ],
)  # fmt: skip
def test_a_family_is_found(line: str, family: str) -> None:
    assert config_of(line)["model_type"] == family


@pytest.mark.parametrize("script", [SCRIPT, MEGATRON])
def test_the_scripts_describe_mixtral_8x7b(script: str, tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    line = script.replace("tok/tokenizer.model", str(tmp_path))
    checkpoint, _, note = draw(parse_flags(line.split()), "nothing is there")
    config = json.loads(checkpoint.carried_bytes["config.json"])
    theta = 1e6 if script is MEGATRON else 1e4
    assert config == {
        "architectures": ["MixtralForCausalLM"], "bos_token_id": 0, "eos_token_id": 1, "head_dim": 128,
        "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.01, "intermediate_size": 14336,
        "max_position_embeddings": 32768, "model_type": "mixtral", "num_attention_heads": 32, "num_experts_per_tok": 2,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8, "pad_token_id": None,
        "rms_norm_eps": 1e-5, "rope_theta": theta, "sliding_window": None, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": VOCAB_SIZE,
    }  # fmt: skip
    assert "standard deviation 0.01 (0.00125 of output projections)" in note


def test_defaults_are_megatrons() -> None:
    config = config_of(DENSE)
    width = int((4 * 64 * 2 / 3) / 64) * 64
    values = {"intermediate_size": width, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "tie_word_embeddings": True}
    assert values.items() <= (config | {"num_key_value_heads": 4, "initializer_range": 0.02}).items()
    assert (config["num_key_value_heads"], config["initializer_range"]) == (4, 0.02)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--load x", "say what it is: --num-layers, --hidden-size, --num-attention-heads, --max-position-embeddings, "
         r"--tokenizer-model \(or --vocab-size\) are missing. Or name a config.json with --init-config"),
        (f"{DENSE} --group-query-attention --moe-aux-loss-coeff 0.1",
         r"what it is: --num-query-groups, --num-experts \(for --moe-aux-loss-coeff\) are missing"),
        (f"{MOE} --moe-shared-expert-intermediate-size 7 --add-qkv-bias --qk-layernorm", "no family of models holds .*Mixtral: biases on queries"),
        (f"{DENSE} --num-layers 0", "--num-layers is 0; expected a whole number from 1"),
        (f"{MOE} --moe-layer-freq [0]*1", "--moe-layer-freq is .0.; expected 2 whole numbers"),
        (f"{DENSE} --tokenizer-model /nowhere", "--tokenizer-model /nowhere: no such file or folder"),
        (f"{DENSE} --init-config /nowhere", "/nowhere: no such file or folder, and no repository id"),
    ],
)  # fmt: skip
def test_what_describes_no_model(line: str, message: str) -> None:
    with pytest.raises(MoeconvError, match=message):
        draw(parse_flags(f"{line} {RUN}".split()), "nothing is there")


def test_a_vocabulary_that_is_too_small_for_the_tokenizer(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    with pytest.raises(MoeconvError, match=f"--vocab-size is 96; .* give at least {VOCAB_SIZE}"):
        draw(parse_flags(f"{DENSE} --tokenizer-model {tmp_path} {RUN}".split()), "nothing is there")


@pytest.mark.parametrize("family", trained_families())
def test_a_config_says_it_alone(family: str, tmp_path: Path) -> None:
    config = tiny_config(family) | {
        "bos_token_id": 5,
        "eos_token_id": [6, 7],
        "quantization_config": {"quant_method": "fp8"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    for source in (tmp_path, tmp_path / "config.json"):
        described = from_config(str(source), "bfloat16", 0.5, None)
        read = json.loads(described.files["config.json"])
        std = family_of(config).compute.init_std.name
        assert read == {k: v for k, v in config.items() if k != "quantization_config"} | {
            "torch_dtype": "bfloat16",
            std: 0.5,
        }
        assert json.loads(described.files["generation_config.json"]) == {"bos_token_id": 5, "eos_token_id": [6, 7]}
        assert described.model.compute.init_std == 0.5
    make_tokenizer(tmp_path)
    carried = from_config(str(tmp_path), None, None, None)
    assert {"tokenizer.json", "tokenizer_config.json"} <= carried.files.keys()
    assert json.loads(carried.files["config.json"])["eos_token_id"] == [6, 7]
    other = from_config(str(tmp_path), None, None, tmp_path / "tokenizer.json")
    assert json.loads(other.files["config.json"])["eos_token_id"] == 1
