"""Flags that do nothing beside the others: refused where a result would be lost or differ, else said in the log."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from runtime.errors import ConfigError
from runtime.settings.fields import settings
from runtime.settings.flags import Given
from runtime.settings.run import RunConfig


@dataclass(frozen=True, slots=True)
class Idle:
    """Settings that need something else to have an effect."""

    group: str
    fields: tuple[str, ...]
    works: Callable[[RunConfig], bool]
    needs: str
    """What they need, as the message ends."""
    refuse: bool = False
    """Whether the run is refused; else a note says it."""


IDLE = (
    Idle("checkpoint", ("save_interval", "keep_last", "keep_best", "save_optim", "async_save"), lambda r: r.checkpoint.save is not None, "needs --save", True),
    Idle(
        "init",
        ("init_config", "init_method_std", "embedding_init_method_std", "use_scaled_init_method"),
        lambda r: r.drawn,
        "needs a new model: weights come from the checkpoint",
    ),
    Idle("recompute", ("modules",), lambda r: r.recompute.granularity == "selective", "needs --recompute-granularity selective", True),
    Idle("train", ("manual_gc_interval",), lambda r: r.train.manual_gc, "needs --manual-gc", True),
    Idle("train", ("eval_interval",), lambda r: r.train.eval_iters != 0, "needs --eval-iters", True),
    Idle("train", ("early_stop",), lambda r: r.train.eval_interval > 0, "needs --eval-interval and --eval-iters", True),
    Idle("train", ("early_stop_min_delta",), lambda r: r.train.early_stop > 0, "needs --early-stop", True),
    Idle("checkpoint", ("keep_best",), lambda r: r.train.eval_interval > 0, "needs --eval-interval and --eval-iters", True),
    Idle("train", ("eval_ema",), lambda r: r.optim.ema_decay is not None or r.train.skip_train, "needs --ema-decay", True),
    Idle("train", ("eval_ema",), lambda r: r.train.eval_iters != 0, "needs --eval-iters", True),
    Idle("optim", ("muon_momentum", "muon_num_ns_steps", "muon_adjust_lr"), lambda r: r.optim.optimizer == "muon", "needs --optimizer muon", True),
    Idle("optim", ("optimizer_offload_fraction",), lambda r: r.optim.optimizer_cpu_offload, "needs --optimizer-cpu-offload", True),
    Idle("data", ("eod_token_id",), lambda r: r.data.needs_eod, "needs --eod-mask-loss, --reset-position-ids or --reset-attention-mask", True),
    Idle("data", ("text_key",), lambda r: not r.data.finetuning, "needs text (--data-path)", True),
    Idle("log", ("wandb_name",), lambda r: r.log.wandb_project is not None, "needs --wandb-project", True),
    Idle("log", ("per_layer_logging",), lambda r: r.moe is not None, "needs a model with experts", True),
    Idle("moe", ("aux_loss_mode",), lambda r: r.moe is None or any(r.moe.aux_loss_coeff), "needs --moe-aux-loss-coeff above 0"),
    Idle("moe", ("drop_policy",), lambda r: r.moe is None or r.moe.capacity_factor is not None, "needs --moe-token-dropping", True),
    Idle("moe", ("expert_bias_update_rate",), lambda r: r.moe is None or r.moe.enable_expert_bias, "needs --moe-router-enable-expert-bias"),
    Idle("fp8", ("recipe",), lambda r: r.fp8.format is not None, "needs --fp8-format", True),
    Idle("moe", ("dispatcher",), lambda r: r.parallel.ep * r.parallel.etp > 1, "needs --expert-model-parallel-size above 1"),
    Idle(
        "learning_rate",
        ("lr_wsd_decay_style", "lr_wsd_decay_iters", "lr_wsd_decay_samples"),
        lambda r: r.schedule.style == "WSD",
        "needs --lr-decay-style WSD",
    ),
    Idle("learning_rate", ("decoupled_min_lr",), lambda r: r.optim.decoupled_lr is not None, "needs --decoupled-lr", True),
    Idle("learning_rate", ("lr_warmup_init",), lambda r: r.schedule.warmup_iters + r.schedule.rewarmup > 0, "needs a warm-up"),
    Idle("learning_rate", ("min_lr",), lambda r: r.schedule.style != "constant", "needs a --lr-decay-style other than constant"),
    Idle(
        "optim",
        ("initial_loss_scale", "min_loss_scale", "loss_scale_window"),
        lambda r: r.dtype == "float16",
        "needs --fp16",
    ),
    Idle(
        "lora",
        ("alpha", "rslora", "dropout", "targets", "also_train", "quantize_base"),
        lambda r: r.lora.rank > 0 or r.lora.adapter is not None,
        "needs --lora-rank or --adapter",
        True,
    ),
    Idle("lora", ("double_quant",), lambda r: r.lora.quantize_base == "nf4", "needs --quantize-base nf4", True),
    Idle(
        "generate",
        ("system", "max_new_tokens", "temperature", "top_k", "top_p", "json"),
        lambda r: r.generate is not None,
        "needs --prompt, --chat or --messages",
        True,
    ),
    Idle("parallel", ("overlap_exchange",), lambda r: r.parallel.ep > 1, "needs --expert-model-parallel-size above 1", True),
    Idle("parallel", ("sp",), lambda r: r.parallel.tp > 1, "needs --tensor-model-parallel-size above 1"),
    Idle("parallel", ("pp_schedule",), lambda r: r.parallel.pp > 1, "needs --pipeline-model-parallel-size above 1"),
)  # fmt: skip


def check_idle(given: Given, run: RunConfig) -> list[str]:
    """Find the flags that were given a value of their own and do nothing.

    Args:
        given: what was given.
        run: what came of it.

    Returns:
        A line for the log for each that is merely without effect.

    Raises:
        ConfigError: one that is surely a mistake; names it and what it needs.
    """
    defaults = {setting.key: setting.default for setting in settings()}
    notes = []
    for row in IDLE:
        for field in row.fields:
            key = (row.group, field)
            if key not in given.values or given.values[key] == defaults[key] or row.works(run):
                continue
            name, value = given.names[key], given.values[key]
            shown = name if isinstance(value, bool) else f"{name} {value}"
            if row.refuse:
                raise ConfigError(f"{shown} does nothing here: it {row.needs}; give that, or leave {name} out")
            notes.append(f"{shown}: no effect here (it {row.needs})")
    return notes
