"""The state of a training run besides its tensors: Megatron's common state from and to trainer.json.

Source: https://github.com/NVIDIA/Megatron-LM/blob/d98e8a64/megatron/core/optimizer/distrib_optimizer.py (state_dict,
load_state_dict), .../core/optimizer/optimizer.py (param_group_identifier_keys, common_step), .../core/optimizer_param_scheduler.py
(state_dict) and .../training/checkpointing.py (generate_state_dict, load_checkpoint).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from typing import Any

from moeconv.errors import MappingError, SourceError
from moeconv.io.torch_archive import tensor_value, whole_tensor
from moeconv.io.trainer_file import TRAINER_VERSION
from moeconv.megatron.args import RunArgs, shown

SHARDING = "fully_reshardable"
_SCALE = "0"  # the key of the storage of the loss scale
# What an optimizer is set to where trainer.json doesn't say: the runtime's and Megatron's defaults.
_DEFAULTS: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}


def read_trainer(common: Mapping[str, Any], args: RunArgs, where: str) -> dict[str, Any]:
    """Make the content of trainer.json for a checkpoint whose optimizer state is imported.

    Args:
        common: the common state.
        args: the run's arguments.
        where: the checkpoint, for messages.

    Returns:
        The position of the run: iteration, samples consumed, seed, the schedule as far as it is known, the optimizer's
        step count, its settings and, with fp16, the loss scale.

    Raises:
        MappingError: the number of optimizer steps is missing, or differs between groups of parameters.
    """
    groups = list(_dicts_with(common.get("optimizer"), "wd_mult"))
    steps = {_count(found["step"], where) for found in _dicts_with(common.get("optimizer"), "step")}
    steps |= {_count(found["common_step"], where) for found in _dicts_with(common.get("optimizer"), "common_step")}
    if len(steps) != 1:
        raise MappingError(
            f"{where}: its optimizer says {sorted(steps) or 'nothing'} of how many steps it did; expected one number, on "
            "which Adam's bias correction depends. Import the weights alone with --no-optimizer"
        )
    iteration = _count(common.get("iteration", 0), where)
    optimizer: dict[str, Any] = {"num_steps": steps.pop()}
    for group in groups:
        if group["wd_mult"] == 1.0:
            optimizer |= {key: group[key] for key in ("betas", "eps", "weight_decay") if key in group}
    for scaler in _dicts_with(common.get("optimizer"), "growth_tracker"):
        optimizer |= {"loss_scale": float(scaler["scale"]), "good_steps": int(scaler["growth_tracker"])}
    return {
        "version": TRAINER_VERSION,
        "iteration": iteration,
        "consumed_train_samples": args.whole("consumed_train_samples", 0, least=0),
        "seed": args.whole("seed", 0, least=0),
        "data_fingerprint": "",  # another program's data: whether they are the same is the user's to know
        "schedule": _schedule(common.get("opt_param_scheduler"), args),
        "optimizer": optimizer,
    }


def _schedule(state: Any, args: RunArgs) -> dict[str, Any]:
    """Give the schedule's settings that both programs have; Megatron counts in samples, trainer.json in steps."""
    if not isinstance(state, dict):
        return {}
    batch = args.whole("global_batch_size", 0, least=0)
    out = {"max_lr": state.get("max_lr"), "min_lr": state.get("min_lr"), "style": state.get("lr_decay_style")}
    for ours, theirs in (("warmup_iters", "lr_warmup_steps"), ("decay_iters", "lr_decay_steps")):
        samples = state.get(theirs)
        if batch and isinstance(samples, int) and samples % batch == 0:
            out[ours] = samples // batch
    return {key: value for key, value in out.items() if value is not None}


def _dicts_with(value: Any, key: str) -> Iterator[dict[Any, Any]]:
    """Find the dicts that have a key, however the optimizers are chained."""
    if isinstance(value, dict):
        if key in value:
            yield value
        for inner in value.values():
            yield from _dicts_with(inner, key)
    elif isinstance(value, list):
        for inner in value:
            yield from _dicts_with(inner, key)


def _count(value: Any, where: str) -> int:
    whole = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 2**53
    if not whole or value != int(value):
        raise SourceError(f"{where}: {shown(value)} is no number of steps")
    return int(value)


def training_args(trainer: Mapping[str, Any]) -> dict[str, Any]:
    """Give the arguments of a checkpoint that a run goes on from, besides those of one without a history."""
    samples, iteration = int(trainer["consumed_train_samples"]), int(trainer["iteration"])
    return {
        "iteration": iteration,
        "consumed_train_samples": samples,
        "global_batch_size": _batch(trainer),
        "seed": int(trainer["seed"]),
        "no_save_optim": False,
        "use_distributed_optimizer": True,
        "ckpt_fully_parallel_save": True,
        "dist_ckpt_optim_fully_reshardable": True,
    }


def optimizer_common(trainer: Mapping[str, Any], expert_parallel: bool) -> dict[str, Any]:
    """Make the common state of Megatron's optimizer and of its scheduler.

    Args:
        trainer: the content of trainer.json.
        expert_parallel: whether the run that loads it has an optimizer of its own for experts, as with ep > 1.

    Returns:
        The entries `optimizer` and `opt_param_scheduler`; tensors are stored apart.
    """
    schedule, settings = trainer.get("schedule") or {}, trainer.get("optimizer") or {}
    known = {key: schedule[key] for key in ("max_lr", "min_lr") if key in schedule}
    set_to = {key: settings.get(key, default) for key, default in _DEFAULTS.items()}
    group = {"default_config": True, "lr_mult": 1.0, "is_decoupled_lr": False, **known}
    group |= {"lr": known.get("max_lr", 0.0), "bias_correction": True, **set_to, "betas": tuple(set_to["betas"])}
    # torch's AdamW, where neither Transformer Engine nor Apex is there.
    group |= {"amsgrad": False, "maximize": False, "foreach": None, "capturable": False, "differentiable": False}
    group |= {"fused": None, "decoupled_weight_decay": True, "step": int(settings["num_steps"])}

    def optimizer(experts: bool) -> dict[str, Any]:
        groups = [group | {"wd_mult": wd, "is_expert_parallel": experts} for wd in ((1.0,) if experts else (1.0, 0.0))]
        state: dict[str, Any] = {"optimizer": {"param_groups": groups}, "param_state_sharding_type": SHARDING}
        if "loss_scale" in settings:
            scale = tensor_value(whole_tensor(_SCALE, "F32", (1,)))
            scaler = {"scale": scale, "growth_tracker": settings.get("good_steps", 0), "hysteresis_tracker": 2}
            state["grad_scaler"] = scaler
        return state

    chained = {0: optimizer(False), 1: optimizer(True)} if expert_parallel else optimizer(False)
    batch, decay = _batch(trainer), set_to["weight_decay"]
    scheduler = {
        "max_lr": known.get("max_lr", 0.0),
        "min_lr": known.get("min_lr", 0.0),
        "lr_warmup_steps": schedule.get("warmup_iters", 0) * batch,
        "lr_decay_steps": schedule.get("decay_iters", 1) * batch,
        "lr_decay_style": schedule.get("style", "constant"),
        "num_steps": int(trainer["consumed_train_samples"]),
        "start_wd": decay,
        "end_wd": decay,
        "wd_incr_style": "constant",
        "wd_incr_steps": 0,
    }
    return {"optimizer": chained, "opt_param_scheduler": scheduler}


def optimizer_storages(trainer: Mapping[str, Any]) -> dict[str, bytes]:
    """Give the bytes of the storages that `optimizer_common` refers to, by key."""
    settings = trainer.get("optimizer") or {}
    return {_SCALE: struct.pack("<f", settings["loss_scale"])} if "loss_scale" in settings else {}


def _batch(trainer: Mapping[str, Any]) -> int:
    """Give the global batch size, in samples, of a run that never changed it."""
    return int(trainer["consumed_train_samples"]) // max(int(trainer["iteration"]), 1)
