"""One rank against transformers: logits, loss, every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from runtime.data.batch import IGNORED_LABEL, Batch
from runtime.engine import Engine
from runtime.model.config import ModelConfig
from runtime.model.recompute import RecomputeConfig
from runtime.moe.config import MoEConfig
from runtime.ops import cross_entropy as ops
from runtime.optim.config import OptimConfig
from runtime.parallel.degrees import ParallelConfig
from runtime.parallel.mesh import ParallelMesh
from tests.runtime.model.hub import hub_tensors, make_model, reader

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {}),
    "mixtral-tied": ("mixtral", {"tie_word_embeddings": True}),
    "mixtral-window": ("mixtral", {"sliding_window": 5}),
    "mixtral-heads": ("mixtral", {"head_dim": 16, "num_key_value_heads": 1}),
    "llama": ("llama", {}),
    "mistral": ("mistral", {"sliding_window": 5}),
    "qwen2": ("qwen2", {}),
}


def make_engine(model: Any, aux_loss_coeff: float = 0.0, granularity: Any = "none") -> Engine:
    """Put a transformers model's weights into an engine of one rank."""
    config = ModelConfig.from_hf(model.config.to_dict(), dtype="float32")
    moe = None
    if config.num_experts:
        moe = MoEConfig(
            num_experts=config.num_experts, topk=config.topk, aux_loss_mode="hf", aux_loss_coeff=(aux_loss_coeff,)
        )
    parallel = ParallelConfig()
    engine = Engine(
        config,
        parallel,
        moe,
        OptimConfig(clip_grad=0.0),
        RecomputeConfig(granularity=granularity),
        ParallelMesh(parallel),
        torch.device("cpu"),
    )
    engine.load_state(reader(hub_tensors(model, lambda p: p)), with_optimizer=False)
    return engine


def make_batch(vocab_size: int = 99) -> Batch:
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
    coeff = 0.02 if model_type == "mixtral" else 0.0
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
