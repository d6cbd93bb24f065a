"""One rank against transformers: logits, loss, every gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moeconv.families import FAMILIES
from runtime.data.batch import IGNORED_LABEL, Batch
from runtime.engine import Engine
from runtime.errors import ConfigError
from runtime.model.recompute import RecomputeConfig
from runtime.model.support import check_supported
from runtime.moe.config import MoEConfig
from runtime.ops import cross_entropy as ops
from runtime.optim.config import OptimConfig
from runtime.parallel.degrees import ParallelConfig
from runtime.parallel.mesh import ParallelMesh
from tests.runtime.model.hub import hub_tensors, model_of, reader
from tests.support.configs import tiny_model, trained_families
from tests.upcycle.hub import make_model as make_random

ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8},
    "longrope": {"rope_type": "longrope", "short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [2.0, 3.0, 4.0, 5.0], "original_max_position_embeddings": 8},
}  # fmt: skip
YARN_SCALE = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 8, "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip
WINDOWS = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1, "max_position_embeddings": 64}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in trained_families()},
    "mixtral-tied": ("mixtral", {"tie_word_embeddings": True}),
    "mixtral-window": ("mixtral", {"sliding_window": 5}),
    "mixtral-heads": ("mixtral", {"head_dim": 16, "num_key_value_heads": 1}),
    "mixtral-top1": ("mixtral", {"num_experts_per_tok": 1}),
    "mistral-window": ("mistral", {"sliding_window": 5}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    **{f"llama-{kind}": ("llama", {"rope_scaling": values, "max_position_embeddings": 12}) for kind, values in ROPES.items()},
    "qwen2-windows": ("qwen2", WINDOWS),
    "qwen2-listed-windows": ("qwen2", WINDOWS | {"layer_types": ["sliding_attention", "full_attention"]}),
    "qwen3-bias": ("qwen3", {"attention_bias": True, "tie_word_embeddings": True}),
    "qwen2_moe-no-bias": ("qwen2_moe", {"qkv_bias": False, "mlp_only_layers": []}),
    "qwen2_moe-no-shared": ("qwen2_moe", {"shared_expert_intermediate_size": 0, "norm_topk_prob": True}),
    "qwen2_moe-windows": ("qwen2_moe", WINDOWS),
    "qwen3_moe-weights-left": ("qwen3_moe", {"norm_topk_prob": False, "attention_bias": True, "mlp_only_layers": [1]}),
    "qwen3_moe-window": ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 5}),
    "glm4_moe-all": ("glm4_moe", {"attention_bias": True, "use_qk_norm": True, "first_k_dense_replace": 0}),
    "glm4_moe-groups": ("glm4_moe", {"n_routed_experts": 8, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}),
    "glm4_moe-no-shared": ("glm4_moe", {"n_shared_experts": 0, "norm_topk_prob": False, "partial_rotary_factor": 1.0}),
    "olmoe-bias": ("olmoe", {"attention_bias": True, "norm_topk_prob": True}),
    "deepseek_v2-greedy": ("deepseek_v2", {"topk_method": "greedy", "q_lora_rank": None, "attention_bias": True}),
    "deepseek_v3-yarn": ("deepseek_v3", {"rope_parameters": YARN_SCALE, "attention_bias": True}),
    "deepseek_v3-halves": ("deepseek_v3", {"rope_interleave": False, "norm_topk_prob": False, "q_lora_rank": None}),
    "glm4_moe_lite-all": ("glm4_moe_lite", {"mlp_layer_types": ["sparse", "dense"], "n_group": 1, "topk_group": 1}),
    "gpt_oss-yarn": ("gpt_oss", {"rope_parameters": YARN_SCALE | {"truncate": False}, "num_local_experts": 8, "swiglu_limit": 0.5}),
    "gpt_oss-window-everywhere": ("gpt_oss", {"layer_types": ["sliding_attention"] * 2, "sliding_window": 3, "num_key_value_heads": 1, "swiglu_alpha": 0.9}),
    "gpt_oss-no-biases": ("gpt_oss", {"attention_bias": False, "layer_types": ["full_attention"] * 2}),
    "minimax_m2-whole": ("minimax_m2", {"rotary_dim": None, "num_key_value_heads": 1}),
    "ernie4_5_moe-biases": ("ernie4_5_moe", {"use_bias": True, "tie_word_embeddings": False, "moe_num_shared_experts": 0}),
    "granitemoe-bias": ("granitemoe", {"attention_bias": True, "tie_word_embeddings": True}),
    "phimoe-near": ("phimoe", {"router_jitter_noise": 0.3, "attention_bias": False, "lm_head_bias": False, "sliding_window": 5}),
    "phimoe-longrope": ("phimoe", {"rope_scaling": ROPES["longrope"] | {"short_mscale": 1.1, "long_mscale": 1.3}, "max_position_embeddings": 64}),
    "hunyuan_v1_moe-alpha": ("hunyuan_v1_moe", {"rope_scaling": {"rope_type": "dynamic", "factor": 1.0, "alpha": 100.0}, "attention_bias": True}),
    "flex_olmo-normalised": ("flex_olmo", {"norm_topk_prob": True, "num_key_value_heads": 4}),
    "dots1-bias": ("dots1", {"attention_bias": True, "norm_topk_prob": False, "sliding_window": 5, "max_window_layers": 1}),
}  # fmt: skip


def make_model(model_type: str, **options: Any) -> Any:
    """A tiny transformers model whose stored buffers are not at their trivial starting values either."""
    attention = "eager" if model_type == "gpt_oss" else "sdpa"  # it has no other on a CPU
    model = make_random(model_type, attn_implementation=attention, **options)
    model.train(model_type != "phimoe")  # which samples its experts at random in training
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.randn(buffer.shape, generator=torch.Generator().manual_seed(1)) * 0.2)
    return model


def make_engine(model: Any, aux_loss_coeff: float = 0.0, granularity: Any = "none") -> Engine:
    """Put a transformers model's weights into an engine of one rank."""
    ours = model_of(model)
    check_supported(ours, Path("model"))
    moe = None
    if ours.compute.router is not None:
        moe = MoEConfig(router=ours.compute.router, aux_loss_mode="hf", aux_loss_coeff=(aux_loss_coeff,))
    parallel = ParallelConfig()
    engine = Engine(
        ours,
        torch.float32,
        parallel,
        moe,
        OptimConfig(clip_grad=0.0),
        RecomputeConfig(granularity=granularity),
        ParallelMesh(parallel),
        torch.device("cpu"),
    )
    engine.load_state(reader(hub_tensors(model, lambda p: p)))
    return engine


def make_batch(vocab_size: int = 101) -> Batch:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(vocab_size, (2, 17), generator=generator)
    labels = tokens[:, 1:].clone()
    labels[0, 3] = IGNORED_LABEL
    return Batch(tokens=tokens[:, :-1], labels=labels)


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float(((got - want).abs().max() / want.abs().max()).detach())


@pytest.mark.parametrize("name", CASES)
def test_logits_and_gradients_equal_transformers(name: str) -> None:
    model_type, options = CASES[name]
    model = make_model(model_type, **options)
    coeff = 0.02 if model_type in ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe") else 0.0
    engine, batch = make_engine(model, coeff), make_batch()
    more = {"output_router_logits": True} if coeff else {}
    out = model(batch.tokens, **more)
    logits = engine.module[0](batch.tokens).transpose(0, 1)[..., : model.config.vocab_size]
    assert relative(logits, out.logits) < 1e-5

    loss = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), batch.labels.flatten())
    (loss + coeff * (out.aux_loss if coeff else 0.0)).backward()
    result = engine.train_step([batch])
    assert result.lm_loss == pytest.approx(loss.item(), rel=1e-6)
    if coeff:
        assert result.aux_loss == pytest.approx(out.aux_loss.item(), rel=1e-5)
    want = hub_tensors(model, lambda p: p.grad)
    got = {item.name: item.tensor for item in engine.gradients()}
    assert got.keys() == want.keys()
    errors = {key: relative(got[key], want[key]) for key in want}
    assert max(errors.values()) < 1e-5, errors
    norm = torch.stack([g.norm() for g in want.values()]).norm().item()
    assert result.grad_norm == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("granularity", ["selective", "full"])
def test_recompute_changes_nothing(granularity: str) -> None:
    model = make_model("mixtral")
    plain, again = make_engine(model), make_engine(model, granularity=granularity)
    want, got = (engine.train_step([make_batch()]) for engine in (plain, again))
    assert got.lm_loss == want.lm_loss
    assert torch.equal(got.expert_load, want.expert_load)
    for a, b in zip(again.gradients(), plain.gradients(), strict=True):
        assert torch.equal(a.tensor, b.tensor), a.name


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_cross_entropy_in_chunks_equals_torch(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_CHUNK_ELEMENTS", 40)
    logits = torch.randn(7, 2, 13, dtype=dtype, requires_grad=True)
    labels = torch.randint(13, (7, 2))
    labels[2, 1] = IGNORED_LABEL
    weight = torch.rand(7, 2)
    want = torch.nn.functional.cross_entropy(logits.double().flatten(0, 1), labels.flatten(), reduction="none")
    (expected,) = torch.autograd.grad((want * weight.flatten()).sum(), logits)
    got = ops.cross_entropy(logits, labels, 0, None)
    (grad,) = torch.autograd.grad((got * weight).sum(), logits)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-2
    assert relative(got.flatten(), want) < min(tolerance, 1e-6)
    assert relative(grad, expected) < tolerance


def test_evaluate_is_the_mean_over_tokens() -> None:
    model = make_model("mixtral")
    batch = make_batch()
    loss = torch.nn.functional.cross_entropy(model(batch.tokens).logits.flatten(0, 1), batch.labels.flatten())
    empty = Batch(tokens=batch.tokens, labels=torch.full_like(batch.labels, IGNORED_LABEL))
    assert make_engine(model).evaluate([batch, empty]) == pytest.approx(loss.item(), rel=1e-6)


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(trained_families())))
def test_what_is_not_computed_is_refused_by_name(family: str) -> None:
    with pytest.raises(ConfigError, match=f"doesn't compute {FAMILIES[family].name}: "):
        check_supported(tiny_model(family), Path("ckpt"))
