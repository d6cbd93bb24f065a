"""From flags and a checkpoint's config to the settings of a run."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.checkpoint.config import CheckpointConfig
from runtime.data.loader import DataConfig
from runtime.errors import ConfigError, require
from runtime.log.config import LogConfig
from runtime.model.config import DtypeName, ModelConfig
from runtime.model.recompute import RecomputeConfig, RecomputeGranularity
from runtime.moe.config import MoEConfig
from runtime.optim.config import OptimConfig
from runtime.optim.schedule import Schedule
from runtime.parallel.degrees import ParallelConfig, PipelineSchedule
from runtime.settings.steps import TrainConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """Everything that a run is made of."""

    model: ModelConfig
    parallel: ParallelConfig
    moe: MoEConfig | None
    """None for a dense model."""
    optim: OptimConfig
    recompute: RecomputeConfig
    train: TrainConfig
    schedule: Schedule
    data: DataConfig
    checkpoint: CheckpointConfig
    log: LogConfig
    skip_train: bool = False
    hang_timeout: float = 600.0
    """Seconds without progress after which the run is ended."""


# Flag -> field of ModelConfig.
_ARCHITECTURE = {
    "num_layers": "num_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "ffn_hidden_size",
    "moe_ffn_hidden_size": "ffn_hidden_size",
    "num_attention_heads": "num_heads",
    "num_query_groups": "num_kv_heads",
    "kv_channels": "head_dim",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
    "num_experts": "num_experts",
    "moe_router_topk": "topk",
    "rotary_base": "rope_theta",
    "norm_epsilon": "rms_norm_eps",
}


def check_architecture(flags: argparse.Namespace, model: ModelConfig, where: Path) -> None:
    """Compare the architecture flags that were given with the checkpoint.

    Args:
        flags: what `parse_flags` returned.
        model: the checkpoint's architecture.
        where: the checkpoint, for messages.

    Raises:
        ConfigError: they disagree; names the flag and both values.
    """
    for flag, field in _ARCHITECTURE.items():
        given, found = getattr(flags, flag), getattr(model, field)
        require(
            given is None or given == found,
            f"--{flag.replace('_', '-')} is {given}; the checkpoint {where} has {found}: "
            "give that, or leave the flag out",
        )
    require(
        not (flags.untie_embeddings_and_output_weights and model.tie_embeddings),
        f"--untie-embeddings-and-output-weights: the checkpoint {where} has tied embeddings; leave the flag out",
    )


def make_run(flags: argparse.Namespace, hf_config: Mapping[str, Any], where: Path) -> RunConfig:
    """Put a run's settings together.

    Args:
        flags: what `parse_flags` returned.
        hf_config: the checkpoint's config.json as parsed.
        where: the checkpoint.

    Returns:
        The settings, each valid in itself; `runtime.settings.check` checks them against each other and the world size.

    Raises:
        ConfigError: a flag and the checkpoint disagree, or a value is out of range.
        MoEConfigError: options of the MoE layer are out of range or exclude each other.
    """
    model = ModelConfig.from_hf(hf_config, dtype=_compute_dtype(flags))
    check_architecture(flags, model, where)
    longest = model.max_position_embeddings
    seq_length = flags.seq_length or min(2048, longest or 2048)
    require(
        not longest or seq_length <= longest,
        f"--seq-length is {seq_length}; the checkpoint {where} was made for at most {longest} positions",
    )
    return RunConfig(
        model=model,
        parallel=_parallel(flags),
        moe=_moe(flags, model),
        optim=_optim(flags),
        recompute=_recompute(flags),
        train=TrainConfig(
            seq_length=seq_length,
            micro_batch_size=flags.micro_batch_size,
            global_batch_size=flags.global_batch_size,
            train_iters=flags.train_iters,
            seed=flags.seed,
            eval_interval=flags.eval_interval,
            eval_iters=flags.eval_iters,
            save_interval=flags.save_interval,
            log_interval=flags.log_interval,
            exit_interval=flags.exit_interval,
            exit_duration_in_mins=flags.exit_duration_in_mins,
        ),
        schedule=_schedule(flags),
        data=_data(flags, seq_length, model.vocab_size),
        checkpoint=CheckpointConfig(
            load=flags.load,
            save=flags.save,
            keep_last=flags.keep_last,
            ckpt_step=flags.ckpt_step,
            finetune=flags.finetune,
            load_optim=not (flags.no_load_optim or flags.finetune),
            load_rng=not (flags.no_load_rng or flags.finetune),
            save_optim=not flags.no_save_optim,
        ),
        log=LogConfig(
            file=flags.log_file,
            tensorboard_dir=flags.tensorboard_dir,
            wandb_project=flags.wandb_project,
            wandb_name=flags.wandb_exp_name,
            per_layer=flags.moe_per_layer_logging,
            dead_expert_steps=flags.moe_dead_expert_steps,
            progress_bar=flags.progress_bar,
        ),
        skip_train=flags.skip_train,
        hang_timeout=60.0 * flags.distributed_timeout_minutes,
    )


def _compute_dtype(flags: argparse.Namespace) -> DtypeName | None:
    names: dict[str, DtypeName] = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}
    return next((name for flag, name in names.items() if getattr(flags, flag)), None)


def _parallel(flags: argparse.Namespace) -> ParallelConfig:
    vpp = flags.num_virtual_stages_per_pipeline_rank
    schedule: PipelineSchedule = flags.pipeline_schedule or ("interleaved" if vpp > 1 else "1f1b")
    return ParallelConfig(
        tp=flags.tensor_model_parallel_size,
        sp=flags.sequence_parallel,
        pp=flags.pipeline_model_parallel_size,
        vpp=vpp,
        pp_layers=flags.pp_layers,
        ep=flags.expert_model_parallel_size,
        etp=flags.expert_tensor_parallel_size,
        cp=flags.context_parallel_size,
        use_distributed_optimizer=flags.use_distributed_optimizer,
        fully_shard=flags.fully_shard,
        pp_schedule=schedule,
    )


def _moe(flags: argparse.Namespace, model: ModelConfig) -> MoEConfig | None:
    if model.num_experts == 0:
        return None
    capacity = flags.moe_expert_capacity_factor
    if flags.moe_token_dropping and capacity is None:
        capacity = 1.0
    return MoEConfig(
        num_experts=model.num_experts,
        topk=model.topk,
        load_balancing=tuple(flags.moe_router_load_balancing_type),
        aux_loss_coeff=tuple(flags.moe_aux_loss_coeff),
        aux_loss_mode=flags.moe_aux_loss_mode,
        z_loss_coeff=flags.moe_z_loss_coeff,
        input_jitter_eps=flags.moe_input_jitter_eps,
        score_function=flags.moe_router_score_function,
        pre_softmax=flags.moe_router_pre_softmax,
        num_groups=flags.moe_router_num_groups,
        group_topk=flags.moe_router_group_topk,
        topk_scaling_factor=flags.moe_router_topk_scaling_factor,
        enable_expert_bias=flags.moe_router_enable_expert_bias,
        expert_bias_update_rate=flags.moe_router_bias_update_rate,
        router_dtype=flags.moe_router_dtype,
        capacity_factor=capacity,
        pad_to_capacity=flags.moe_pad_expert_input_to_capacity,
        drop_policy=flags.moe_token_drop_policy,
        dispatcher=flags.moe_token_dispatcher_type,
        gemm_backend=flags.moe_grouped_gemm_backend,
        permute_fusion=flags.moe_permute_fusion,
        shared_expert_intermediate_size=flags.moe_shared_expert_intermediate_size,
        recompute_layer=flags.moe_layer_recompute,
        fp8_format=flags.fp8_format,
        fp8_recipe=flags.fp8_recipe,
    )


def _optim(flags: argparse.Namespace) -> OptimConfig:
    names = ("lr", "weight_decay", "adam_beta1", "adam_beta2", "adam_eps", "clip_grad")
    scaling = ("initial_loss_scale", "min_loss_scale", "loss_scale_window")
    values = {name: getattr(flags, name) for name in (*names, *scaling)}
    return OptimConfig(**values, skip_nonfinite=flags.on_nonfinite == "skip")


def _recompute(flags: argparse.Namespace) -> RecomputeConfig:
    default: RecomputeGranularity = "selective" if flags.recompute_activations else "none"
    granularity: RecomputeGranularity = flags.recompute_granularity or default
    layers = flags.recompute_num_layers if flags.recompute_method == "block" else 0
    return RecomputeConfig(granularity=granularity, modules=tuple(flags.recompute_modules), num_layers=layers)


def _schedule(flags: argparse.Namespace) -> Schedule:
    decay = flags.lr_decay_iters or max(flags.train_iters, 1)
    warmup = flags.lr_warmup_iters
    if flags.lr_warmup_fraction is not None:
        if not 0 <= flags.lr_warmup_fraction < 1:
            raise ConfigError(f"--lr-warmup-fraction is {flags.lr_warmup_fraction}; expected 0 <= fraction < 1")
        warmup = int(flags.lr_warmup_fraction * decay)
    return Schedule(
        max_lr=flags.lr,
        min_lr=flags.min_lr,
        warmup_init=flags.lr_warmup_init,
        warmup_iters=warmup,
        decay_iters=decay,
        style=flags.lr_decay_style,
        wsd_style=flags.lr_wsd_decay_style,
        wsd_iters=flags.lr_wsd_decay_iters,
    )


def _data(flags: argparse.Namespace, seq_length: int, vocab_size: int) -> DataConfig:
    splits = (flags.train_data_path, flags.valid_data_path, flags.test_data_path)
    return DataConfig(
        paths=tuple(flags.data),
        split=flags.split,
        split_paths=tuple(tuple(paths) for paths in splits),
        tokenizer=flags.tokenizer_model,
        cache=flags.data_cache_path,
        seq_length=seq_length,
        seed=flags.seed,
        vocab_size=vocab_size,
    )
