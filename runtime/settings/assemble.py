"""From what was given and a checkpoint's config to the settings of a run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from moeconv.families.base import Model
from moeconv.families.key_states import AUX_LOSS, NOISE
from runtime.checkpoint.config import CheckpointConfig
from runtime.data.config import DataConfig
from runtime.errors import ConfigError, require
from runtime.flag import flag_name
from runtime.fp8.config import Fp8Config
from runtime.generate.config import GenerateConfig
from runtime.initial.config import InitConfig
from runtime.log.config import LogConfig
from runtime.model.lora import LoraConfig
from runtime.model.recompute import RecomputeConfig
from runtime.model.support import check_supported, stored_dtype
from runtime.model.targets import adapt
from runtime.moe.config import MoEConfig
from runtime.optim.config import OptimConfig
from runtime.optim.schedule import ScheduleConfig
from runtime.parallel.degrees import ParallelConfig
from runtime.settings.architecture import check_architecture
from runtime.settings.flags import Given
from runtime.settings.idle import check_idle
from runtime.settings.run import RunConfig
from runtime.settings.steps import TrainConfig


def make_run(
    given: Given, model: Model, where: Path, *, drawn: bool = False, generates: GenerateConfig | None = None
) -> RunConfig:
    """Put a run's settings together.

    Args:
        given: what `parse_flags` returned.
        model: the checkpoint's.
        where: the checkpoint.
        drawn: whether weights are drawn.
        generates: what a run writes that is not to train or evaluate.

    Returns:
        The settings, each valid in itself; `runtime.settings.check` checks them against each other and the world size.

    Raises:
        ConfigError: a flag and the checkpoint disagree, a value is out of range, or a flag would do nothing.
    """
    train = TrainConfig(**given.of("train"))
    check_supported(model, where)
    check_architecture(given.stated, model, where)
    train = _fit_train(train, model, where)
    optim, lora = OptimConfig(**given.of("optim")), LoraConfig(**given.of("lora"))
    learning_rate = ScheduleConfig(**given.of("learning_rate"))
    recompute = RecomputeConfig(**given.of("recompute"))
    shared: dict[str, Any] = {"seq_length": train.seq_length, "seed": train.seed, "vocab_size": model.sizes["vocab"]}
    run = RunConfig(
        model=adapt(model, lora),
        parallel=_parallel(given, model, where),
        moe=_moe(given, model, recompute, where),
        fp8=Fp8Config(**given.of("fp8")),
        optim=optim,
        lora=lora,
        learning_rate=learning_rate,
        schedule=learning_rate.resolve(optim.lr, train.train_iters, train.train_samples, optim.decoupled_lr),
        recompute=recompute,
        train=train,
        data=DataConfig(**given.of("data"), **shared),
        checkpoint=CheckpointConfig(**given.of("checkpoint")),
        init=InitConfig(**given.of("init")),
        log=LogConfig(**given.of("log")),
        stated=dict(given.stated),
        drawn=drawn,
        generate=generates,
    )
    training = [] if generates else [*_balance_note(given, run), *_noise_note(given, run)]
    return dataclasses.replace(run, notes=(*given.notes, *check_idle(given, run), *training))


def _balance_note(given: Given, run: RunConfig) -> list[str]:
    """Say that a config asks for a balancing loss where no flag does: it is the run's to choose, and none is the default."""
    wanted = run.model.config.get(AUX_LOSS)
    chosen = any(group == "moe" and name in ("aux_loss_coeff", "load_balancing") for group, name in given.values)
    if run.moe is None or chosen or not wanted:
        return []
    return [
        f"config.json has {AUX_LOSS} {wanted}, which by itself has no effect: experts are balanced by "
        f"{flag_name(MoEConfig, 'aux_loss_coeff')}, which is not given (0)"
    ]


def _noise_note(given: Given, run: RunConfig) -> list[str]:
    """Say that a config asks for noise in training where no flag does."""
    family, config = run.model.family, run.model.config
    wanted = [f"{key} {config[key]}" for key in NOISE if key in family.harmless and config.get(key)]
    if run.moe is None or not wanted or ("moe", "input_jitter_eps") in given.values:
        return []
    return [
        f"config.json has {', '.join(wanted)}, noise in training that by itself has no effect here: "
        f"{flag_name(MoEConfig, 'input_jitter_eps')} puts it on what routers see"
    ]


def _fit_train(train: TrainConfig, model: Model, where: Path) -> TrainConfig:
    """Fill in what the checkpoint says where the flags don't."""
    longest = model.compute.max_positions
    seq_length = train.seq_length or min(2048, longest or 2048)
    require(
        not longest or seq_length <= longest,
        f"--seq-length is {seq_length}; the checkpoint {where} was made for at most {longest} positions",
    )
    return dataclasses.replace(train, seq_length=seq_length, dtype=train.dtype or stored_dtype(model))


def _parallel(given: Given, model: Model, where: Path) -> ParallelConfig:
    parallel = ParallelConfig(**given.of("parallel"))
    layers = parallel.layers_per_virtual_stage
    if layers is None:
        return parallel
    require(
        model.sizes["layers"] % (layers * parallel.pp) == 0,
        f"--num-layers-per-virtual-pipeline-stage is {layers} with --pipeline-model-parallel-size {parallel.pp}; the "
        f"{model.sizes['layers']} layers of {where} are no multiple of {layers * parallel.pp}",
    )
    vpp = model.sizes["layers"] // (layers * parallel.pp)
    require(
        parallel.vpp in (1, vpp),
        f"--num-layers-per-virtual-pipeline-stage {layers} makes {vpp} virtual stages a rank, and "
        f"--num-virtual-stages-per-pipeline-rank says {parallel.vpp}: give one of the two",
    )
    return ParallelConfig(**given.of("parallel") | {"vpp": vpp})


def _moe(given: Given, model: Model, recompute: RecomputeConfig, where: Path) -> MoEConfig | None:
    options = given.of("moe")
    router = model.compute.router
    if router is None:
        names = ", ".join(name for (group, _), name in given.names.items() if group == "moe")
        if names:
            raise ConfigError(
                f"{where} is a dense model without experts, for which {names} can do nothing: leave it out"
            )
        return None
    if recompute.granularity == "selective" and "moe" in recompute.modules:
        options["recompute_layer"] = True
    return MoEConfig(router=router, **options)
