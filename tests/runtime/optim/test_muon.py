"""Muon for matrices and AdamW for the rest, against torch's two optimizers on parameters of their own."""

from __future__ import annotations

import pytest
import torch

from moeconv.families.base import Model
from runtime.errors import ConfigError
from runtime.optim.config import OptimConfig
from runtime.optim.groups import check_states, resolve_groups
from runtime.parity.case import Case, global_batch, make_engine, model_of
from runtime.settings.check import check_run
from tests.runtime.settings.lines import SHORT, make

LR, DECAY = 2e-2, 0.1


def is_matrix(name: str) -> bool:
    """By name alone: projections, experts and routers; neither norms nor the ends."""
    return "norm" not in name and "embed_tokens" not in name and "lm_head" not in name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("adjust", ["match_rms_adamw", "original"])
def test_steps_are_those_of_torch(dtype: str, adjust: str) -> None:
    case = Case(name="one rank", num_ranks=1, dtype=dtype)
    options = {
        "optimizer": "muon",
        "muon_adjust_lr": adjust,
        "freeze": ("*experts.1.*",),
        "lr_scale": ("*.gate.*=0.5",),
    }
    engine, _ = make_engine(case, lr=LR, weight_decay=DECAY, adam_eps=1e-8, **options)
    prefix = "optimizer.master." if dtype == "bfloat16" else ""
    initial = {item.name: item.tensor.clone() for item in engine.state(with_optimizer=True)}
    names = [name for name in initial if not name.startswith("optimizer.") and "experts.1." not in name]
    theirs = {name: torch.nn.Parameter(initial[prefix + name].float().clone()) for name in names}
    matrices = [name for name in names if is_matrix(name)]
    rates = {name: LR * (0.5 if ".gate." in name else 1) for name in names}
    muon = torch.optim.Muon(
        [{"params": [theirs[name]], "lr": rates[name]} for name in matrices], weight_decay=DECAY, adjust_lr_fn=adjust
    )
    rest = [name for name in names if not is_matrix(name)]
    adamw = torch.optim.AdamW(
        [{"params": [theirs[name]], "weight_decay": 0.0 if "norm" in name else DECAY} for name in rest], lr=LR, eps=1e-8
    )
    for step in range(3):
        engine.train_step(global_batch(case, step))
        for item in engine.gradients():
            theirs[item.name].grad = item.tensor.view(theirs[item.name].shape).clone()
        muon.step()
        adamw.step()
    after = {item.name: item.tensor for item in engine.state(with_optimizer=True)}
    for name in names:
        want = theirs[name].detach()
        assert torch.allclose(after[prefix + name].view(want.shape), want, rtol=1e-5, atol=1e-6), name
        states = {key.split(".")[1] for key in after if key.startswith("optimizer.") and key.endswith(f".{name}")}
        assert states - {"master"} == ({"momentum_buffer"} if is_matrix(name) else {"exp_avg", "exp_avg_sq"})


def test_a_step_that_is_left_out_leaves_matrices_and_momentum() -> None:
    case = Case(name="one rank", num_ranks=1)
    engine, _ = make_engine(case, optimizer="muon", lr=LR)
    engine.train_step(global_batch(case, 0))
    before = {item.name: item.tensor.clone() for item in engine.state(with_optimizer=True)}
    engine.optimizer.step(torch.ones(()), torch.tensor(True))
    after = {item.name: item.tensor for item in engine.state(with_optimizer=True)}
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--tensor-model-parallel-size 2", "--tensor-model-parallel-size 2, --expert-tensor-parallel-size 2"),
        ("--expert-tensor-parallel-size 2", "--expert-tensor-parallel-size 2"),
        ("--use-distributed-optimizer", "--use-distributed-optimizer"),
        ("--fully-shard", "--fully-shard"),
    ],
)
def test_layouts_that_cut_matrices_are_refused(flags: str, named: str) -> None:
    with pytest.raises(ConfigError, match=f"of which {named} leaves a rank only a part"):
        check_run(make(f"{SHORT} --optimizer muon {flags}"), 4)
    check_run(make(f"{SHORT} --optimizer muon --expert-model-parallel-size 4"), 8)


def test_matrices_stay_on_the_device() -> None:
    with pytest.raises(ConfigError, match=r"--optimizer muon with --optimizer-cpu-offload: .*take --optimizer adam"):
        check_run(make(f"{SHORT} --optimizer muon --optimizer-cpu-offload"), 1)
    with pytest.raises(ConfigError, match=r"--optimizer-offload-fraction 0\.5 does nothing here"):
        make(f"{SHORT} --optimizer-offload-fraction 0.5")


def test_moments_of_another_optimizer_are_missed() -> None:
    model: Model = model_of(Case(name="one rank", num_ranks=1))
    stored = [f"optimizer.exp_avg.{name}" for name in resolve_groups(OptimConfig(), model)]
    with pytest.raises(ConfigError, match=r"another --optimizer trained them.*--no-load-optim"):
        check_states(resolve_groups(OptimConfig(optimizer="muon"), model), stored, "ckpt")
