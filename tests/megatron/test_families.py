"""Every family that megatron-core builds, both ways: its logits from our export are transformers', and what it saves is imported.

megatron-core's configuration is made of the exported `args` alone, as Megatron-LM makes it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from moeconv.checking import compare
from moeconv.checkpoint import open_checkpoint
from moeconv.convert import Options, write_hf
from moeconv.errors import LayoutError, MappingError
from moeconv.families import FAMILIES
from moeconv.forward import relative_difference, transformers_logits
from moeconv.layout.degrees import Degrees
from moeconv.megatron.checkpoint import as_checkpoint
from moeconv.megatron.convert import export_megatron, import_megatron, open_megatron
from tests.megatron.mcore_ranks import Case, run_cases
from tests.megatron.test_round_trips import export
from tests.upcycle.hub import make_folder

pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")  # shared experts of width 0
TOLERANCE = 2e-5
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
MSCALES = {"mscale": 0.7, "mscale_all_dim": 0.5}
SOME_WINDOWS = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {"sliding_window": 5, "rms_norm_eps": 1e-3}),
    "llama": ("llama", {"head_dim": 16, "num_key_value_heads": 4}),
    "llama tied, llama3": ("llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA3 | {"factor": 8.0}}),
    "llama, factor 32": ("llama", {"rope_parameters": LLAMA3 | {"factor": 32.0}}),
    "llama yarn": ("llama", {"rope_parameters": YARN | {"beta_fast": 8.0, "mscale": 0.7, "mscale_all_dim": 0.5}}),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {"use_sliding_window": False, "sliding_window": 6}),
    "qwen2 some windows": ("qwen2", SOME_WINDOWS),
    "qwen2 linear": ("qwen2", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    "qwen3": ("qwen3", {}),
    "qwen3_moe": ("qwen3_moe", {}),
    "qwen3_moe mixed": ("qwen3_moe", {"mlp_only_layers": [1], "norm_topk_prob": False}),
    "qwen2_moe": ("qwen2_moe", {"norm_topk_prob": False}),
    "qwen2_moe all": ("qwen2_moe", {"mlp_only_layers": [], "norm_topk_prob": True, "qkv_bias": False}),
    "glm4_moe": ("glm4_moe", {"use_qk_norm": True, "attention_bias": True, "routed_scaling_factor": 2.5}),
    "glm4_moe groups": ("glm4_moe", {"n_routed_experts": 8, "n_group": 4, "topk_group": 1}),
    "dots1": ("dots1", {"n_shared_experts": 1}),
    "dots1 windows": ("dots1", {"sliding_window": 5, "max_window_layers": 1, "first_k_dense_replace": 0}),
    "dots1 no shared": ("dots1", {"n_shared_experts": 0}),
    "deepseek_v3": ("deepseek_v3", {}),
    "deepseek_v3 yarn": ("deepseek_v3", {"q_lora_rank": None, "rope_parameters": YARN | MSCALES}),
    "deepseek_v2 greedy": (
        "deepseek_v2",
        {"topk_method": "greedy", "routed_scaling_factor": 3.0, "rope_parameters": YARN | MSCALES},
    ),
    "deepseek_v2 groups": ("deepseek_v2", {"n_routed_experts": 8, "n_group": 4, "topk_group": 2}),
    "glm4_moe_lite, epsilon 1e-6": ("glm4_moe_lite", {"rms_norm_eps": 1e-6}),
    "gpt_oss": ("gpt_oss", {}),
    "gpt_oss yarn": (
        "gpt_oss",
        {"swiglu_limit": 1.0, "rope_parameters": YARN | {"truncate": False}},
    ),
    "llama biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
}
DENSE = {"llama", "mistral", "qwen2", "qwen3"}


@dataclass
class Outcome:
    hf: Path
    logits: torch.Tensor
    cases: dict[str, Case]
    got: dict[str, torch.Tensor]


def layouts(name: str) -> dict[str, tuple[str, str, dict[str, Any]]]:
    """Give for each kind of case of a model the format, the spec and the layout; a family's variants have two of the four."""
    dense = MODELS[name][0] in DENSE
    found: dict[str, tuple[str, str, dict[str, Any]]] = {
        "torch local": ("torch", "local", {"tp": 2, "pp": 2} if dense else {"tp": 2, "pp": 2, "ep": 2, "etp": 1}),
        "torch te": ("torch", "te", {"tp": 4} if dense else {"tp": 2, "ep": 2}),
        "torch_dist local": ("torch_dist", "local", {"tp": 2} if dense else {"tp": 2, "ep": 2}),
        "torch_dist te": ("torch_dist", "te", {"pp": 2}),
    }
    if MODELS[name][0] == "gpt_oss":  # Megatron has biases in experts that are whole alone
        found = {kind: (*case[:2], {**case[2], "etp": 1}) for kind, case in found.items()}
    return {kind: case for kind, case in found.items() if name in FAMILIES or kind in ("torch local", "torch_dist te")}


CASES = [(name, kind) for name in MODELS for kind in layouts(name)]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    work = tmp_path_factory.mktemp("families")
    tokens = torch.arange(40)[None] * 37 % 101
    out, cases = {}, {}
    for number, (name, (family, options)) in enumerate(MODELS.items()):
        hf = make_folder(work / f"hf{number}", family, **options)
        out[name] = Outcome(hf, transformers_logits(hf, tokens), {}, {})
        for kind, (fmt, spec, layout) in layouts(name).items():
            place = work / f"{kind} {number}".replace(" ", "-")
            experts = "grouped" if spec == "te" else "sequential"
            export(hf, place, fmt, layout, spec, experts)
            save = str(place) + "-saved" if spec == "local" else None
            cases[name, kind] = out[name].cases[kind] = Case(
                load=str(place), fmt=fmt, spec=spec, experts=experts, save=save, **layout
            )
    for (name, kind), logits in zip(cases, run_cases(list(cases.values()), tokens, work), strict=True):
        out[name].got[kind] = logits
    return out


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_megatron_core_computes_the_same(outcomes: dict[str, Outcome], name: str, kind: str) -> None:
    assert relative_difference(outcomes[name].got[kind], outcomes[name].logits) < TOLERANCE


@pytest.mark.parametrize("name", MODELS)
def test_round_trips(outcomes: dict[str, Outcome], name: str, tmp_path: Path) -> None:
    """Our exports and megatron-core's own saves hold every byte of the source."""
    held = outcomes[name]
    source = open_checkpoint(held.hf)
    for kind, case in held.cases.items():
        for folder in filter(None, (case.load, case.save)):
            config = None if folder == case.load else held.hf
            opened = open_megatron(Path(folder), hf_config=config)
            as_checkpoint(opened).check()
            assert next(compare(as_checkpoint(opened), source), None) is None, (kind, folder)
            assert (opened.fmt, opened.degrees) == (case.fmt, Degrees(**layouts(name)[kind][2]))
    saved = next(case.save for case in reversed(held.cases.values()) if case.save is not None)
    import_megatron(open_megatron(Path(saved), hf_config=held.hf), tmp_path / "shards", Degrees(tp=2), Options())
    assert next(compare(open_checkpoint(tmp_path / "shards"), source), None) is None


# What args alone don't decide: Megatron-LM's builders differ in whether they read these.
FROM_CONFIG_ALONE = {"llama, factor 32": "rope_scaling_factor", "qwen2 linear": "interpolation_factor"}


@pytest.mark.parametrize("name", MODELS)
def test_a_config_is_made_of_args_alone(outcomes: dict[str, Outcome], name: str, tmp_path: Path) -> None:
    """transformers computes from that config, with the imported weights, what the original computes."""
    held = outcomes[name]
    saved = Path(str(held.cases["torch local"].save))
    if name in FROM_CONFIG_ALONE:
        with pytest.raises(MappingError, match=FROM_CONFIG_ALONE[name]):
            open_megatron(saved)
        return
    import_megatron(open_megatron(saved), tmp_path / "shards", Degrees(), Options())
    write_hf(open_checkpoint(tmp_path / "shards"), tmp_path / "hf", None, Options())
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    with torch.no_grad():
        logits = model.eval()(torch.arange(40)[None] * 37 % 101).logits
    assert relative_difference(logits, held.logits) < 1e-6


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {family for family, _ in MODELS.values()}))
def test_a_family_that_megatron_core_does_not_build_is_refused(family: str, tmp_path: Path) -> None:
    hf = make_folder(tmp_path / "hf", family)
    for fmt in ("torch", "torch_dist"):
        with pytest.raises(MappingError, match="Megatron"):
            export(hf, tmp_path / "out", fmt, {})


def test_layers_that_predict_further_tokens_are_left_out_in_words(tmp_path: Path) -> None:
    hf = make_folder(tmp_path / "hf", "glm4_moe", num_nextn_predict_layers=1)
    extra = "model.layers.2.eh_proj.weight"
    save_file({extra: torch.randn(32, 64)}, hf / "extra.safetensors", metadata={"format": "pt"})
    index = json.loads((hf / "model.safetensors.index.json").read_text())
    index["weight_map"][extra] = "extra.safetensors"
    (hf / "model.safetensors.index.json").write_text(json.dumps(index))
    settings: dict[str, Any] = {"degrees": Degrees(tp=2), "spec": "te", "experts": "grouped", "options": Options()}
    summary = export_megatron(hf, tmp_path / "out", fmt="torch_dist", **settings)
    assert summary.dropped == (f"1 tensors that the model does not compute with, such as {extra}",)
    found = list(compare(as_checkpoint(open_megatron(tmp_path / "out")), open_checkpoint(hf)))
    assert [difference.name for difference in found] == [extra]


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("mixtral", {"hidden_act": "gelu"}, "gelu in a gated feed-forward part"),
    ("mixtral", {"num_experts_per_tok": 1}, "one expert a token with a routing weight of 1"),
    ("dots1", {"num_experts_per_tok": 2, "norm_topk_prob": False}, "sigmoid routing weights that don't sum to 1"),
    ("glm4_moe", {"num_experts_per_tok": 1}, "one expert a token with a routing weight of 1"),
    (
        "glm4_moe",
        {"n_routed_experts": 8, "n_group": 4, "topk_group": 3, "num_experts_per_tok": 3},
        r"groups of experts valued by their 2 best \(it takes 1\)",
    ),
    ("llama", {"rope_parameters": YARN | {"rope_type": "dynamic"}}, "scaled by dynamic"),
    ("llama", {"rope_parameters": YARN | {"attention_factor": 1.5}}, "attention_factor"),
    (
        "llama",
        {"rope_parameters": LLAMA3 | {"factor": 8.0, "original_max_position_embeddings": 64}},
        "is fixed to 8192",
    ),
    ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 1.5}}, "no whole number"),
    ("llama", {"attention_bias": True}, r"o_proj\.bias: .* no place for it \(attention\.o\.bias\)"),
    ("llama", {"mlp_bias": True}, r"no place for it \(mlp\.\w+\.bias\)"),
    ("olmoe", {}, "norms of all query and key heads at once"),
    ("qwen2_moe", {"shared_expert_intermediate_size": 0}, r"no place for it \(shared\.router\)"),
    ("minimax_m2", {}, "norms of all query and key heads at once"),
    ("ernie4_5_moe", {}, "rotary positions of neighbouring pairs; a bias of the choice of a router without sigmoids"),
    ("granitemoe", {}, "attention scale: 0.3; embedding scale: 3.0; residual scale: 0.7; logits divisor: 2.0"),
    ("deepseek_v2", {}, r"groups of experts valued by their 1 best \(it takes 2\)"),
    ("glm4_moe_lite", {}, "rms_norm_eps = 1e-05, with 1e-06 in the norms of latent vectors"),
    ("deepseek_v3", {"rope_interleave": False}, "rotary positions of halves in latent attention"),
    ("deepseek_v3", {"rope_parameters": YARN | {"mscale_all_dim": 0.5}}, "mscale_all_dim without mscale"),
    ("deepseek_v3", {"attention_bias": True}, r"no place for it \(attention\.\w+\.bias\)"),
    ("gpt_oss", {"swiglu_alpha": 1.5}, r"swiglu_alpha = 1\.5"),
]


@pytest.mark.parametrize(("family", "options", "message"), REFUSED, ids=[f"{r[0]}-{'-'.join(r[1])}" for r in REFUSED])
def test_what_megatron_cannot_say_is_refused(
    family: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    hf = make_folder(tmp_path / "hf", family, **options)
    for fmt in ("torch", "torch_dist"):
        with pytest.raises(MappingError, match=message):
            export(hf, tmp_path / "out", fmt, {})
    assert not (tmp_path / "out").exists()


EPSILON = "--norm-epsilon 1e-06"
GROUPS = {"n_routed_experts": 8, "n_group": 4, "topk_group": 1}
FLAGS: list[tuple[str, dict[str, Any], list[str]]] = [
    ("mixtral", {"rms_norm_eps": 1e-5}, []),
    ("mixtral", {"rms_norm_eps": 1e-6, "sliding_window": 9}, [EPSILON, "--window-size 8,0"]),
    ("qwen2", SOME_WINDOWS, [EPSILON, "--window-size 4,0", "--window-attn-skip-freq '[0,1]'"]),
    ("qwen2_moe", {}, [EPSILON, "--moe-shared-expert-gate"]),
    ("qwen3", {}, [EPSILON, "--qk-layernorm"]),
    ("glm4_moe", GROUPS, ["--moe-router-num-groups 4", "--moe-router-group-topk 1"]),
    (
        "llama",
        {"rope_parameters": LLAMA3 | {"factor": 32.0}},
        [EPSILON, "--use-rope-scaling", "--rope-scaling-factor 32.0", "rope_scaling_factor=32.0"],
    ),
    (
        "deepseek_v3",
        {"rope_parameters": YARN | MSCALES | {"beta_fast": 8.0}},
        [
            *(EPSILON, "--qk-layernorm", "--multi-latent-attention", "--q-lora-rank 12", "--kv-lora-rank 10"),
            *("--qk-head-dim 6", "--qk-pos-emb-head-dim 4", "--v-head-dim 8", "--rotary-scaling-factor 4.0"),
            *("--mscale 0.7", "--mscale-all-dim 0.5", "--moe-router-num-groups 2", "--moe-router-group-topk 1"),
            "MLATransformerConfig original_max_position_embeddings=16, beta_fast=8",
        ],
    ),
    (
        "gpt_oss",
        {},
        [
            *("--window-size 7,0", "--window-attn-skip-freq '[1,0]'", "--quick-geglu", "--glu-linear-offset 1.0"),
            *("--activation-func-clamp-value 7.0", "--softmax-type learnable"),
        ],
    ),
    (
        "llama",
        {"rope_parameters": YARN},
        [EPSILON, "--rotary-scaling-factor 4.0", "--yarn-original-max-position-embeddings 16"],
    ),
]


@pytest.mark.parametrize(("family", "options", "expected"), FLAGS)
def test_flags_that_megatron_needs_are_named(
    family: str, options: dict[str, Any], expected: list[str], tmp_path: Path
) -> None:
    hf = make_folder(tmp_path / "hf", family, **options)
    summary = export_megatron(
        hf,
        tmp_path / "out",
        fmt="torch_dist",
        degrees=Degrees(),
        spec="local",
        experts="sequential",
        options=Options(),
        dry_run=True,
    )
    told = [word for note in summary.notes for word in note.split(" run it with ")[-1].split(" ") if word[:2] == "--"]
    assert all(flag in " ".join(summary.notes) for flag in expected)
    assert len(told) == sum(flag.count("--") for flag in expected)


def test_experts_with_biases_are_whole(tmp_path: Path) -> None:
    """megatron-core asserts as much; refused before anything is written."""
    hf = make_folder(tmp_path / "hf", "gpt_oss")
    for fmt in ("torch", "torch_dist"):
        with pytest.raises(LayoutError, match=r"--etp 2: the experts of gpt-oss have biases.* --etp 1 alone"):
            export(hf, tmp_path / "out", fmt, {"tp": 2})
    assert not (tmp_path / "out").exists()


BAD_ARGS: list[tuple[str, Any]] = [
    ("num_layers", float("nan")),
    ("num_layers", "two"),
    ("num_layers", {}),
    ("num_layers", 10**5000),
    ("num_layers", -1),
    ("num_attention_heads", True),
    ("hidden_size", [32]),
    ("rotary_base", float("inf")),
    ("rotary_base", "1e4"),
    ("rotary_percent", 10**400),
    ("norm_epsilon", {}),
    ("window_size", 5),
    ("window_size", (1, 2, 3)),
    ("window_size", (4, 4)),
    ("window_attn_skip_freq", [0, 7]),
    ("moe_layer_freq", "([1]*2)"),
    ("moe_layer_freq", [1]),
    ("moe_layer_freq", 0),
    ("moe_router_topk", 10**30),
    ("moe_router_pre_softmax", "yes"),
    ("moe_router_score_function", 3),
    ("moe_router_topk_scaling_factor", "big"),
    ("qk_layernorm", 7),
    ("num_experts", float("nan")),
    ("tensor_model_parallel_size", "2"),
    ("pipeline_model_parallel_size", float("nan")),
    ("expert_tensor_parallel_size", {}),
    ("normalization", {}),
    ("swiglu", float("nan")),
    ("position_embedding_type", []),
    ("untie_embeddings_and_output_weights", "no"),
]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("args")
    return export(make_folder(work / "hf", "mixtral", sliding_window=5), work / "out", "torch_dist", {})


@pytest.mark.parametrize("given", [False, True], ids=["args alone", "beside a config"])
@pytest.mark.parametrize(
    ("name", "value"), BAD_ARGS, ids=[f"{n}-{type(v).__name__}{i}" for i, (n, v) in enumerate(BAD_ARGS)]
)
def test_args_that_mean_nothing_are_refused(exported: Path, given: bool, name: str, value: Any, tmp_path: Path) -> None:
    """A clear refusal that names the argument, never a traceback."""
    config = tmp_path / "config.json"
    config.write_bytes((exported / "config.json").read_bytes())
    common = exported / "release/common.pt"
    before = common.read_bytes()
    state = torch.load(common, weights_only=False)
    setattr(state["args"], name, value)
    (exported / "config.json").unlink()
    try:
        torch.save(state, common)
        with pytest.raises(MappingError, match=name):
            open_megatron(exported, hf_config=config if given else None)
    finally:
        common.write_bytes(before)
        (exported / "config.json").write_bytes(config.read_bytes())
    assert json.loads(config.read_text()) == open_megatron(exported).config
