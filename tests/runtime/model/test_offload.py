"""Activations in the host's memory: gradients are those of a run whose activations stay, bit for bit, and memory is less."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moeconv.families import FAMILIES
from moeconv.families.base import Model
from runtime.errors import ConfigError
from runtime.estimate.machine import find_machine
from runtime.estimate.setup import Setup
from runtime.estimate.step import Estimate
from runtime.measures import host_bytes
from runtime.model import offload
from runtime.model.decoder import DecoderStage
from runtime.model.recompute import RecomputeConfig
from runtime.moe.config import MoEConfig
from runtime.optim.config import OptimConfig
from runtime.parallel.degrees import ParallelConfig
from runtime.parity.case import Case, global_batch, make_engine

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, GPU])]
FULL = {"granularity": "full"}
WAYS: dict[str, dict[str, Any]] = {
    "both parts": {"offload": ("attention", "mlp")},
    "attention, recomputed in part": {"offload": ("attention",), "granularity": "selective"},
    "inputs of recomputed layers": {"offload": ("layer_inputs",), **FULL},
    "inputs of some, both parts of others": {
        "offload": ("layer_inputs", "attention", "mlp"), "method": "block", "num_layers": 2, **FULL,
    },
}  # fmt: skip
DENSE = {"model_type": "qwen3_moe", "mlp_only_layers": [0, 1]}


def gradients(
    recompute: dict[str, Any], model: dict[str, Any], device: str
) -> tuple[dict[str, torch.Tensor], float, int]:
    """Of the second of two steps, in case memory that is used again isn't what it should be; the loss; the host's bytes."""
    case = Case(name="offload", num_ranks=1, recompute=recompute, model=model, device=device)
    engine, _ = make_engine(case)
    for step in range(2):
        loss = engine.train_step(global_batch(case, step)).lm_loss
    (stage,) = engine.module
    assert isinstance(stage, DecoderStage)
    assert stage.offload.host_bytes == host_bytes(engine)
    return {item.name: item.tensor.clone() for item in engine.gradients()}, loss, host_bytes(engine)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("model", [{}, DENSE], ids=["experts", "dense layers"])
def test_gradients_are_those_of_activations_that_stay(
    device: str, model: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offload, "LEAST", 1)
    for way in WAYS.values():
        stay = {key: value for key, value in way.items() if key != "offload"}
        (want, loss, none), (got, again, host) = (gradients(r, model, device) for r in (stay, way))
        assert again == pytest.approx(loss, rel=0 if device == "cpu" else 1e-5)
        assert none == 0
        assert host > 0
        close = 0.0 if device == "cpu" else 1e-5  # on GPUs attention's own backward pass adds in any order
        assert all(torch.allclose(got[name], want[name], rtol=close, atol=close * 0.1) for name in want)


def test_host_memory_is_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "LEAST", 1)
    case = Case(name="offload", num_ranks=1, recompute=WAYS["both parts"])
    engine, _ = make_engine(case)
    sizes = []
    for step in range(3):
        engine.train_step(global_batch(case, step))
        sizes.append(host_bytes(engine))
    assert sizes[0] > 0
    # Experts get different numbers of tokens, and so may need memory of other sizes; what does not depend on them is there.
    engine.train_step(global_batch(case, 2))
    assert host_bytes(engine) == sizes[2]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"offload": ("layer_inputs",)}, "needs --recompute-granularity full"),
        ({"offload": ("mlp",), **FULL}, "give layer_inputs"),
        ({"offload": ("mlp", "mlp")}, "named twice"),
    ],
)
def test_parts_that_keep_nothing_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        RecomputeConfig(**settings)


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("way", ["both parts", "inputs of recomputed layers"])
def test_a_gpus_memory_holds_less(way: str) -> None:
    peaks = []
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 8}
    for recompute in ({k: v for k, v in WAYS[way].items() if k != "offload"}, WAYS[way]):
        case = Case(
            name="offload",
            num_ranks=1,
            recompute=recompute,
            model=sizes,
            dtype="bfloat16",
            device="cuda",
            positions=4096,
        )
        engine, _ = make_engine(case)
        engine.train_step(global_batch(case, 0))
        torch.cuda.synchronize()
        start = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        engine.train_step(global_batch(case, 0))
        peaks.append(torch.cuda.max_memory_allocated() - start)
        del engine
    assert peaks[1] < 0.9 * peaks[0]


def test_a_plan_counts_what_goes_to_the_host_and_what_waits_for_it() -> None:
    config = {
        "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 4,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000, "num_local_experts": 8,
        "num_experts_per_tok": 2,
    }  # fmt: skip
    model = Model.from_config(FAMILIES["mixtral"], config)
    router = model.compute.router
    assert router is not None

    def plan(recompute: RecomputeConfig) -> Estimate:
        setup = Setup(
            model=model, world_size=1, parallel=ParallelConfig(), moe=MoEConfig(router=router), optim=OptimConfig(),
            recompute=recompute, dtype="bfloat16", seq_length=4096, micro_batch_size=2, num_microbatches=1,
        )  # fmt: skip
        return Estimate(setup, find_machine("h100"))

    stay, attention, both = (plan(RecomputeConfig(offload=x)) for x in ((), ("attention",), ("attention", "mlp")))
    parts = stay.memory[0].activations
    assert attention.host == parts["attention"] == 4 * 8192 * (2 * (2 * 4096 + 2 * 1024) + 4 * 32)
    assert both.host == parts["attention"] + parts["experts"] + parts["router"]
    assert stay.peak - attention.peak == pytest.approx(parts["attention"] / 2)  # those of two layers are there at once
    assert attention.seconds == pytest.approx(stay.seconds)
    assert both.seconds > stay.seconds
    whole, inputs = (plan(RecomputeConfig(granularity="full", offload=x)) for x in ((), ("layer_inputs",)))
    assert inputs.host == whole.memory[0].activations["inputs"] == 4 * 8192 * 4096 * 2
    assert inputs.seconds == pytest.approx(whole.seconds)


@pytest.mark.parametrize("device", DEVICES)
def test_tensors_come_back_with_their_values_and_their_order_in_memory(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offload, "LEAST", 1)
    base = torch.randn(6, 4, 3, 8, device=device)
    views = [
        base,
        base.permute(1, 2, 0, 3),
        base[:, :, :2].permute(2, 0, 1, 3),
        base[0, 0, 0, 0],
        base[:0],
        base[:1].expand(5, 4, 3, 8),
    ]
    way = offload.ActivationOffload(("mlp",), base.device)
    way.begin()
    got: list[torch.Tensor] = []

    class Keep(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(*tensors)
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
            got.extend(ctx.saved_tensors)
            return grad, *(None for _ in views)

    x = torch.ones((), device=device, requires_grad=True)
    with way.region("mlp", None):
        y = Keep.apply(x, *views)
    want = [view.clone() for view in views]
    base.zero_()
    y.backward()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert got[1].stride() == base.permute(1, 2, 0, 3).stride()
    assert way.host_bytes >= sum(view.numel() for view in views[:3]) * 4
