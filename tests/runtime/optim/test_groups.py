"""Groups of tensors by globs: against torch.optim.AdamW with groups made by hand, and against Megatron's rates."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch

from runtime.errors import ConfigError
from runtime.optim.config import OptimConfig
from runtime.optim.groups import check_states, resolve_groups
from runtime.optim.schedule import ScheduleConfig
from runtime.parity.case import Case, global_batch, make_engine
from tests.support.configs import tiny_model

GLOBS: dict[str, Any] = {
    "freeze": ("*layers.0.*", "*experts.1.*", "*layers.2.self_attn.k_proj.weight"),
    "no_weight_decay": ("*o_proj*", "*experts.3.w2*"),
    "lr_scale": ("*.gate.weight=0.1", "*experts.2.*=3", "*experts.2.w3.weight=0.5"),
    "decoupled_lr": 5e-3,
}
LR, ENDS, DECAY, EPS = 1e-3, 5e-3, 0.1, 1e-8


def by_hand(name: str) -> dict[str, float] | None:
    """What the globs above mean, said again without globs; None is frozen."""
    parts = name.split(".")
    expert = parts[parts.index("experts") + 1] if "experts" in parts else ""
    if parts[1:3] == ["layers", "0"] or expert == "1" or name == "model.layers.2.self_attn.k_proj.weight":
        return None
    rate = ENDS if "embed_tokens" in parts or parts[0] == "lm_head" else LR
    rate *= 0.1 if parts[-2] == "gate" else {"w1": 3, "w2": 3, "w3": 0.5}[parts[-2]] if expert == "2" else 1
    plain = "norm" in name or "o_proj" in parts or (expert == "3" and "w2" in parts)
    return {"lr": rate, "weight_decay": 0.0 if plain else DECAY}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_steps_are_those_of_torch_with_groups(dtype: str) -> None:
    case = Case(name="one rank", num_ranks=1, dtype=dtype)
    engine, _ = make_engine(case, lr=LR, weight_decay=DECAY, adam_eps=EPS, **GLOBS)
    prefix = "optimizer.master." if dtype == "bfloat16" else ""
    initial = {item.name: item.tensor.clone() for item in engine.state(with_optimizer=True)}
    weights = [name for name in initial if not name.startswith("optimizer.")]
    theirs = {name: torch.nn.Parameter(initial.get(prefix + name, initial[name]).float().clone()) for name in weights}
    groups = [{"params": [theirs[name]], **found} for name in weights if (found := by_hand(name)) is not None]
    judge = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=EPS)
    for step in range(3):
        engine.set_lr(LR, ENDS)
        engine.train_step(global_batch(case, step))
        gradients = {item.name: item.tensor for item in engine.gradients()}
        assert gradients.keys() == {name for name in weights if by_hand(name) is not None}
        for name, gradient in gradients.items():
            theirs[name].grad = gradient.view(theirs[name].shape).clone()
        judge.step()
    after = {item.name: item.tensor for item in engine.state(with_optimizer=True)}
    for name in weights:
        if by_hand(name) is None:
            assert torch.equal(after[name], initial[name]), f"{name} is frozen"
            assert not [key for key in after if key.startswith("optimizer.") and key.endswith(name)]
        else:
            got, want = after.get(prefix + name, after[name]), theirs[name].detach()
            assert torch.allclose(got.view(want.shape), want, rtol=2e-6, atol=2e-7), name


def test_what_is_frozen_takes_no_memory_and_no_gradient() -> None:
    engine, _ = make_engine(Case(name="one rank", num_ranks=1), freeze=("*embed_tokens*", "*experts*"))
    for shard in engine.store.shards:
        if shard.topology.frozen:
            assert shard not in engine.trained
            assert not shard.grad_shard.numel()
            assert shard.master.data_ptr() == next(iter(shard.held())).flat.data_ptr()
    engine.train_step(global_batch(Case(name="one rank", num_ranks=1), 0))
    wanted = {name: p.requires_grad for name, p in engine.module.named_parameters()}
    assert {name for name, needs in wanted.items() if not needs} == {
        name for name in wanted if "experts" in name or "embedding" in name
    }
    assert all(p.grad is None for p in engine.module.parameters())


def test_the_rates_of_the_ends_are_megatrons() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
    torch_groups = [
        {"params": [torch.nn.Parameter(torch.zeros(1))], "max_lr": peak, "min_lr": low}
        for peak, low in ((1e-3, 1e-4), (4e-3, 2e-4))
    ]
    optimizer = torch.optim.SGD(torch_groups, lr=0.1)
    theirs = OptimizerParamScheduler(
        optimizer, init_lr=1e-5, max_lr=1e-3, min_lr=1e-4, lr_warmup_steps=7, lr_decay_steps=40, lr_decay_style="cosine",
        start_wd=0.1, end_wd=0.1, wd_incr_steps=100, wd_incr_style="constant",
    )  # fmt: skip
    config = ScheduleConfig(
        min_lr=1e-4, decoupled_min_lr=2e-4, lr_warmup_iters=7, lr_warmup_init=1e-5, lr_decay_style="cosine"
    )
    ours = config.resolve(1e-3, 40, 0, 4e-3)
    for step in range(45):
        rates = [group["lr"] for group in optimizer.param_groups]
        np.testing.assert_allclose([ours.lr(step), ours.decoupled_lr(step)], rates, rtol=1e-12, err_msg=str(step))
        theirs.step(1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"freeze": ("*mlp.gate.weight",)}, r"--freeze \*mlp.gate.weight: no trained tensor .*moe.gate.weight"),
        ({"freeze": ("*",)}, "leaves nothing to train"),
        ({"lr_scale": ("*.gate.weight",)}, r"expected GLOB=FACTOR"),
        ({"lr_scale": ("*.gate.weight=-1",)}, r"expected GLOB=FACTOR"),
        ({"no_weight_decay": ("lm_heads.weight",)}, "--no-weight-decay lm_heads.weight: .*nearest: lm_head.weight"),
    ],
)
def test_globs_that_can_not_be_meant(options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_groups(OptimConfig(**options), tiny_model())


def test_router_biases_that_follow_the_load_are_not_trained() -> None:
    with pytest.raises(ConfigError, match="no trained tensor"):
        resolve_groups(OptimConfig(freeze=("*e_score_correction_bias",)), tiny_model("glm4_moe"))


def test_moments_that_were_never_kept_are_missed_before_anything_is_loaded() -> None:
    model = tiny_model()
    frozen = resolve_groups(OptimConfig(freeze=("*experts*",)), model)
    stored = [f"optimizer.exp_avg.{name}" for name, settings in frozen.items() if not settings.frozen]
    check_states(frozen, stored, "ckpt")
    check_states(resolve_groups(OptimConfig(), model), (), "ckpt")
    with pytest.raises(ConfigError, match=r"no moments of 96 tensors .*experts.*--no-load-optim"):
        check_states(resolve_groups(OptimConfig(), model), stored, "ckpt")
