"""Training checkpoints of the real megatron-core on a CPU: its DistributedOptimizer steps, saves, loads and steps on.

Gradients are made, not computed: each parameter's is its own first value, so that what the optimizer must hold for a
Hugging Face tensor follows from that tensor alone.
"""

from __future__ import annotations

import argparse
import json
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.megatron.mcore_models import build
from tests.megatron.mcore_ranks import (
    WORLD,
    Case,
    Cpu,
    _allow_cpu,
    _args,
    _args_of,
    _load_dist,
    _sharded,
    groups,
    spawn_ranks,
)

STEPS, BATCH, SEED = 2, 8, 1234
LR, DECAY = 1e-3, 0.1
METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
}


@dataclass
class Run:
    """A run under a layout of four ranks: from weights, `STEPS` steps, a save; or from a training checkpoint, one step.

    With `distributed` False its optimizer is the plain one of each precision, which names its tensors otherwise.
    """

    case: Case
    resume: bool = False
    distributed: bool = True
    dtype: str = "float32"


def run_all(runs: list[Run], work: Path) -> list[list[dict[str, torch.Tensor]]]:
    """Do runs one after another in one world of four ranks.

    Args:
        runs: what to do.
        work: a scratch folder.

    Returns:
        For each run what each rank holds at the end: weights, master weights, moments and step counts by name.
    """
    work.mkdir()
    (work / "runs.json").write_text(json.dumps([asdict(run) for run in runs]))
    spawn_ranks(_rank, str(work))
    return [[torch.load(work / f"held{i}-{rank}.pt") for rank in range(WORLD)] for i in range(len(runs))]


def _rank(rank: int, work: str) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    _allow_cpu()
    _keep_steps()
    fields = json.loads((Path(work) / "runs.json").read_text())
    runs = {number: Run(**{**values, "case": Case(**values["case"])}) for number, values in enumerate(fields)}
    for turn, layout in enumerate(sorted({run.case.layout for run in runs.values()}, key=str)):
        same = {number: run for number, run in runs.items() if run.case.layout == layout}
        with groups(rank, Path(work) / f"rendezvous{turn}", next(iter(same.values())).case), Cpu():
            for number, run in same.items():
                torch.save(_run(run), Path(work) / f"held{number}-{rank}.pt")


def _keep_steps() -> None:
    """Let v0.16.1 load into torch's AdamW, whose state has a `step` of each parameter, unlike Transformer Engine's and Apex's.

    Loading has put the checkpoint's step count there already; the function that copies tensors then fails for want of one.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    real = DistributedOptimizer._set_main_param_and_optimizer_states

    def patched(self: Any, parameter: Any, tensors: dict[str, Any]) -> None:
        group, order = self.model_param_group_index_map[parameter]
        main = self.optimizer.param_groups[group]["params"][order]
        real(self, parameter, {**tensors, "step": self.optimizer.state[main]["step"]})

    DistributedOptimizer._set_main_param_and_optimizer_states = patched


def _run(run: Run) -> dict[str, torch.Tensor]:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    case = run.case
    dtype = getattr(torch, run.dtype)
    args = _args_of(case)
    models = [model.to(dtype) for model in build(case, args)]
    if not run.resume:
        _load_dist(case, models)
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=run.distributed)
    wrapped = [DistributedDataParallel(model.config, ddp, model.train()) for model in models]
    settings = OptimizerConfig(
        lr=LR,
        min_lr=LR / 10,
        weight_decay=DECAY,
        adam_eps=1e-7,
        clip_grad=0.0,
        bf16=run.dtype == "bfloat16",
        fp16=run.dtype == "float16",
        initial_loss_scale=2.0**8,
        loss_scale_window=1000,
        params_dtype=dtype,
        use_distributed_optimizer=run.distributed,
    )
    optimizer = get_megatron_optimizer(settings, wrapped)
    scheduler = OptimizerParamScheduler(
        optimizer, 0.0, LR, LR / 10, 0, 100 * BATCH, "constant", DECAY, DECAY, 0, "constant"
    )
    first = [{n: p.detach().float().clone() for n, p in model.named_parameters()} for model in models]
    # A DistributedOptimizer of torch's AdamW must have done a step before it can load.
    for _ in range(1 if run.resume else STEPS):
        _step(optimizer, scheduler, models, first)
    if run.resume:
        _resume(run, models, optimizer, scheduler)
        ones = [{n: torch.ones_like(p) for n, p in chunk.items()} for chunk in first]
        _step(optimizer, scheduler, models, ones)
    else:
        _save(run, args, models, optimizer, scheduler)
    return _held(models, optimizer)


def _step(optimizer: Any, scheduler: Any, models: list[Any], gradients: list[dict[str, torch.Tensor]]) -> None:
    optimizer.zero_grad()
    for model, chunk in zip(models, gradients, strict=True):
        for name, parameter in model.named_parameters():
            parameter.main_grad.copy_(chunk[name] * optimizer.get_loss_scale())
    assert optimizer.step()[0]
    scheduler.step(increment=BATCH)


def _save(run: Run, base: argparse.Namespace, models: list[Any], optimizer: Any, scheduler: Any) -> None:
    """Save as Megatron's checkpointing.py does with --dist-ckpt-optim-fully-reshardable."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    metadata = METADATA if run.distributed else {k: v for k, v in METADATA.items() if not k.startswith("distrib")}
    folder = Path(str(run.case.save)) / f"iter_{STEPS:07d}"
    if dist.get_rank() == 0:
        folder.mkdir(parents=True)
    dist.barrier()
    args = _args(run.case, base)
    args.__dict__.update(
        no_save_optim=False, iteration=STEPS, consumed_train_samples=STEPS * BATCH, global_batch_size=BATCH, seed=SEED
    )
    state: dict[str, Any] = {"args": args, "checkpoint_version": 3.0, "iteration": STEPS, **_sharded(models, metadata)}
    state["optimizer"] = optimizer.sharded_state_dict(dict(state), metadata=metadata)
    state["opt_param_scheduler"] = scheduler.state_dict()
    strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
    dist_checkpointing.save(state, str(folder), sharded_strategy=strategy, content_metadata=metadata)
    dist.barrier()
    (Path(str(run.case.save)) / "latest_checkpointed_iteration.txt").write_text(str(STEPS))


def _resume(run: Run, models: list[Any], optimizer: Any, scheduler: Any) -> None:
    """Load as Megatron's load_checkpoint does; nothing may be missing or left over, and the schedule must agree."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.validation import StrictHandling

    root = Path(run.case.load)
    folder = str(root / f"iter_{int((root / 'latest_checkpointed_iteration.txt').read_text()):07d}")
    common = dist_checkpointing.load_common_state_dict(folder)
    assert common["args"].consumed_train_samples == STEPS * BATCH
    assert not getattr(common["args"], "no_save_optim", False)
    metadata = dist_checkpointing.load_content_metadata(preloaded_state_dict=common)
    state = _sharded(models, metadata)
    state["optimizer"] = optimizer.sharded_state_dict(dict(state), is_loading=True, metadata=metadata)
    loaded = dist_checkpointing.load(state, folder, strict=StrictHandling.RAISE_ALL)
    for number, model in enumerate(models):
        model.load_state_dict(loaded["model" if len(models) == 1 else f"model{number}"], strict=True)
    optimizer.load_state_dict(loaded["optimizer"])
    scheduler.num_steps = 0
    scheduler.load_state_dict(loaded["opt_param_scheduler"])
    assert scheduler.num_steps == STEPS * BATCH


def _held(models: list[Any], optimizer: Any) -> dict[str, torch.Tensor]:
    """Give all that a rank holds: weights by name, the inner optimizers' parameters and states by position."""
    out = {f"{i}.{n}": p.detach().clone() for i, model in enumerate(models) for n, p in model.named_parameters()}
    for i, chained in enumerate(optimizer.chained_optimizers):
        inner = chained.optimizer
        for g, group in enumerate(inner.param_groups):
            for key in ("lr", "eps", "weight_decay", "betas", "wd_mult"):
                out[f"optimizer{i}.group{g}.{key}"] = torch.tensor(group[key])
            for p, parameter in enumerate(group["params"]):
                name = f"optimizer{i}.group{g}.{p}"
                out[name] = parameter.detach().clone()
                out |= {f"{name}.{key}": value.detach().clone() for key, value in inner.state[parameter].items()}
        if getattr(chained, "grad_scaler", None) is not None:
            scaler = chained.grad_scaler.state_dict()
            out |= {f"optimizer{i}.{key}": torch.as_tensor(value) for key, value in scaler.items()}
    return out
