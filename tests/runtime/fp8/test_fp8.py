"""FP8 in plain torch: formats and scales, linear maps and experts against fp64, and training beside fp32."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from benchmarks.train_step import mixtral, random_weights, text_batch
from moeconv.errors import MoeconvError
from runtime.engine import Engine
from runtime.fp8.config import Fp8Config
from runtime.fp8.linear import Fp8Linears
from runtime.fp8.operands import E4M3, eight_bits, in_fp32
from runtime.fp8.scaling import FP8_HISTORY, HISTORY_STEPS, Scaling
from runtime.fp8.weights import QuantisedWeights
from runtime.model.recompute import RecomputeConfig
from runtime.moe.config import MoEConfig
from runtime.moe.fp8_experts import Fp8Experts
from runtime.moe.permutation import plan_rows
from runtime.optim.config import OptimConfig
from runtime.parallel.degrees import ParallelConfig
from runtime.parallel.mesh import ParallelMesh
from tests.runtime.moe.oracle import dense, moe_output, relative

CPU = torch.device("cpu")
RECIPES = [("e4m3", "tensorwise"), ("hybrid", "tensorwise"), ("hybrid", "delayed")]


def scaling(fp8_format: str = "hybrid", recipe: str = "tensorwise") -> Scaling:
    return Scaling(Fp8Config(format=fp8_format, recipe=recipe), CPU)  # type: ignore[arg-type]


def rounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What x is in an 8-bit format with a scale of its own, by ml_dtypes, in fp64."""
    kind = ml_dtypes.float8_e4m3fn if dtype == E4M3 else ml_dtypes.float8_e5m2
    limit = float(ml_dtypes.finfo(kind).max)
    scale = np.float32(limit) / np.float32(float(x.abs().max()))
    scaled = np.clip(x.float().numpy() * scale, -limit, limit)
    return torch.from_numpy(scaled.astype(kind).astype(np.float64)) / float(scale)


@pytest.mark.parametrize("dtype", [E4M3, torch.float8_e5m2])
def test_rounding_is_that_of_ml_dtypes(dtype: torch.dtype) -> None:
    x = torch.randn(4000) * torch.logspace(-6, 3, 4000)
    bound = x.abs().max()
    torch.testing.assert_close(
        in_fp32(eight_bits(x, bound, dtype), bound).double(), rounded(x, dtype), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("fp8_format", ["e4m3", "hybrid"])
def test_linears_multiply_what_the_8_bits_stand_for(fp8_format: str, with_bias: bool) -> None:
    bounds = scaling(fp8_format)
    maps = Fp8Linears(bounds)
    bounds.begin(trains=True)
    x = torch.randn(7, 3, 24, requires_grad=True)
    weights = [torch.randn(16, 24, requires_grad=True), torch.randn(40, 24, requires_grad=True)]
    biases = [torch.randn(w.shape[0], requires_grad=True) for w in weights] if with_bias else [None, None]
    outs = maps(x, weights, biases)
    grads = [torch.randn_like(out) for out in outs]
    torch.autograd.backward(outs, grads)
    x8 = rounded(x.detach().flatten(0, 1), E4M3)
    w8 = rounded(torch.cat([w.detach() for w in weights]), E4M3)
    g8 = rounded(torch.cat([g.flatten(0, 1) for g in grads], 1), bounds.config.gradient_dtype)
    expected = (x8 @ w8.t()).split([16, 40], 1)
    for out, wanted, bias in zip(outs, expected, biases, strict=True):
        assert relative(out.flatten(0, 1), wanted if bias is None else wanted + bias.double()) < 1e-6
    assert x.grad is not None
    assert relative(x.grad.flatten(0, 1), g8 @ w8) < 1e-6
    assert relative(torch.cat([w.grad for w in weights if w.grad is not None]), g8.t() @ x8) < 1e-6
    for bias, grad in zip(biases, grads, strict=True):
        assert bias is None or torch.allclose(bias.grad, grad.sum((0, 1)), rtol=1e-5, atol=1e-5)  # type: ignore[arg-type]


@pytest.mark.parametrize(("fp8_format", "recipe"), RECIPES)
def test_experts_are_near_fp64(fp8_format: str, recipe: str) -> None:
    bounds = scaling(fp8_format, recipe)
    layer = Fp8Experts(bounds, CPU)
    chosen = torch.randn(90, 5).topk(2, -1).indices.masked_fill(torch.rand(90, 2) < 0.1, 5)
    plan = plan_rows(chosen, 5, 180, alignment=8, fused=False)
    leaves = [torch.randn(90, 32), torch.rand(90, 2), torch.randn(5, 96, 32) / 6, torch.randn(5, 32, 48) / 7]
    grad = torch.randn(90, 32)
    for _ in range(2):  # the second time with delayed bounds
        bounds.begin(trains=True)
        mine = [t.clone().requires_grad_() for t in leaves]
        out = layer(*mine, plan)
        out.backward(grad)
    exact = [t.double().requires_grad_() for t in leaves]
    expected = moe_output(exact[0], dense(chosen, exact[1], 5)[0], exact[2], exact[3])
    expected.backward(grad.double())
    assert relative(out, expected) < 0.08
    for a, b in zip(mine, exact, strict=True):
        assert relative(a.grad, b.grad) < (0.1 if fp8_format == "e4m3" else 0.14)  # type: ignore[arg-type]


def test_delayed_bounds_follow_the_last_steps() -> None:
    bounds = scaling(recipe="delayed")
    slot, other = bounds.take_slot(), bounds.take_slot()

    def step(size: float, *, trains: bool = True) -> float:
        bounds.begin(trains=trains)
        bound, amax = bounds.bound(slot, lambda out: out.fill_(size))
        if amax is not None:
            amax.fill_(max(size, float(amax)))
        return float(bound)

    assert step(3.0) == 3.0  # the first time by the tensor itself
    assert step(8.0) == 3.0  # what is larger saturates
    assert step(1.0, trains=False) == 3.0  # an evaluation leaves the bounds
    assert [step(1.0) for _ in range(HISTORY_STEPS)] == [8.0] * HISTORY_STEPS
    assert step(40.0, trains=False) == 8.0  # or anything of itself
    assert step(float("inf")) == 1.0
    assert step(2.0) == 1.0  # what isn't finite is not taken for a bound
    assert float(bounds.bound(other, lambda out: out.fill_(5.0))[0]) == 5.0


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed", "blockwise"])
def test_a_replay_counts_as_the_pass_that_it_repeats(recipe: str) -> None:
    """Weights of a replayed step are not quantised again, those of the next one and of a failed capture are; bounds lie still."""
    bounds = scaling(recipe=recipe)
    slot, weights, weight = bounds.take_slot(), QuantisedWeights(bounds), torch.randn(128, 128)

    def current() -> bool:
        found, want = (kept.of([weight]).rows for kept in (weights, QuantisedWeights(scaling(recipe=recipe))))
        assert found is not None
        assert want is not None
        return torch.equal(found.bits.view(torch.uint8), want.bits.view(torch.uint8))

    bounds.begin(trains=True)
    bounds.bound(slot, lambda amax: amax.fill_(3.0))
    assert bounds.settled == (recipe != "delayed"), "the first step of a tensor is like no other"
    assert current()
    weight.neg_()
    assert not current()
    bounds.begin(trains=True)
    bound, met = bounds.bound(slot, lambda amax: amax.fill_(3.0))
    assert bounds.settled
    bounds.note_replay()
    assert not current(), "the graph has made them"
    bounds.forget_capture()
    assert current()
    if recipe == "delayed":
        assert bound.tolist() == [3.0]
        assert met is not None
        met.fill_(5.0)  # by a replay
        bounds.begin(trains=True)
        assert bound.tolist() == [5.0]
        assert met.tolist() == [0.0]
        bounds.note_replay()
        bounds.begin(trains=True)
        assert bound.tolist() == [5.0], "one of the last steps had it"


def test_a_history_is_kept_by_name() -> None:
    bounds = scaling(recipe="delayed")
    slots = [bounds.take_slot(name) for name in ("a", "b")]
    bounds.begin(trains=True)
    bounds.bound(slots[0], lambda out: out.fill_(3.0))
    saved = bounds.history()
    assert saved == {"a": [3.0] + [0.0] * (HISTORY_STEPS - 1)}
    again = scaling(recipe="delayed")
    slots = [again.take_slot(name) for name in ("b", "a")]
    assert again.load_history(saved)[0].endswith(
        "no largest values of earlier steps of 1 tensors (b, ...): the next step is scaled by each tensor itself"
    )
    again.begin(trains=True)
    assert [float(again.bound(slot, lambda out: out.fill_(7.0))[0]) for slot in slots] == [7.0, 3.0]
    assert scaling().load_history(saved) == []  # tensorwise needs none
    for wrong in ([1.0], "x" * HISTORY_STEPS, [float("nan")] * HISTORY_STEPS, None):
        with pytest.raises(MoeconvError, match=r"FP8 history of a is .* expected 16 finite numbers"):
            again.load_history({"a": wrong})  # type: ignore[dict-item]


def test_experts_of_an_engine_take_delayed_bounds() -> None:
    made = engine(Fp8Config(format="hybrid", recipe="delayed"))
    losses(made, 2)
    history = made.scalars()[FP8_HISTORY]
    kinds = {name.rpartition(".")[2] for name in history}
    assert kinds >= {"experts:input", "experts:activation", "experts:gradient", "experts:hidden gradient"}
    for name, column in history.items():
        assert min(column[:2]) > 0, name
        assert not any(column[2:]), name


def engine(fp8: Fp8Config | None, granularity: str = "none", **optim_options: Any) -> Engine:
    model = mixtral(hidden=32, layers=1, heads=2, kv_heads=1, head_dim=16, ffn=32, vocab=64, experts=2)
    assert model.compute.router is not None
    parallel, moe = ParallelConfig(), MoEConfig(router=model.compute.router, aux_loss_coeff=(0.01,))
    optim, recompute = OptimConfig(lr=3e-3, **optim_options), RecomputeConfig(granularity=granularity)  # type: ignore[arg-type]
    dtype = torch.bfloat16 if optim_options else torch.float32
    made = Engine(model, dtype, parallel, moe, optim, recompute, ParallelMesh(parallel), CPU, fp8=fp8)
    made.load_state(random_weights())
    return made


def losses(made: Engine, num_steps: int) -> list[float]:
    return [made.train_step([text_batch(64, 2, 16, 2 * s + m) for m in range(2)]).lm_loss for s in range(num_steps)]


def test_training_is_near_fp32_and_the_same_when_recomputed() -> None:
    exact = losses(engine(None), 4)
    for fp8_format, recipe in RECIPES:
        config = Fp8Config(format=fp8_format, recipe=recipe)  # type: ignore[arg-type]
        made = engine(config)
        found = losses(made, 4)
        assert found != exact
        assert max(abs(a - b) / b for a, b in zip(found, exact, strict=True)) < 5e-3
        assert losses(engine(config, "full"), 2) == found[:2]
    low, wide = (losses(engine(config, main_grads_dtype=kind), 4) for kind in ("bf16", "fp32"))
    assert low != wide
    assert low == pytest.approx(wide, rel=2e-3), "sums in bf16, in steps of two micro-batches, begin anew in each"
    batch = text_batch(64, 2, 32, 99)
    assert made.evaluate([batch]) == pytest.approx(made.evaluate([batch]), abs=0)
