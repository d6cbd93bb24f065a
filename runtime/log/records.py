"""A run's numbers: of a step, of an interval, of an evaluation. One interval has the same keys wherever it is written."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from runtime.model.routing_report import RoutingReport


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRecord:
    """The numbers of one optimizer step."""

    iteration: int
    """Counts from 1."""
    consumed_samples: int
    """Sequences of all steps up to this one."""
    consumed_tokens: int
    """Tokens of all steps up to this one."""
    num_tokens: int
    """Tokens of this step, over all ranks."""
    lm_loss: float
    """Mean cross entropy, nats a token."""
    grad_norm: float
    """Global L2 norm before clipping."""
    learning_rate: float
    skipped: bool
    """The step had a NaN or inf and was left out."""
    repeated: bool = False
    """The step was done twice: its rows had outgrown the room set aside for them."""
    seconds: float
    """Of the whole step, on this rank."""
    data_seconds: float = 0.0
    """Spent waiting for the batch, on the rank that waited longest."""
    memory_bytes: int = 0
    """Peak of the step, on the rank that needed most: of the GPU, or of the process where there is none."""
    routing: RoutingReport | None = None
    """What the routers did; None for a dense model."""
    measured: Mapping[str, float] = field(default_factory=dict)
    """What was measured beside the step, by name: params_norm, num_zeros, global_batch_size."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Speed:
    """What turns tokens a second into arithmetic."""

    flops_per_token: float
    """Of training, over all GPUs."""
    num_gpus: int
    peak_flops: float | None = None
    """Of one GPU; None where it is unknown."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalRecord:
    """The result of an evaluation on one set."""

    iteration: int
    split: str
    """The set's name: valid, test, or what several validation sets are called."""
    consumed_tokens: int = 0
    """Training tokens of all steps before it."""
    lm_loss: float
    """Mean cross entropy, nats a token."""
    tokens: int
    """Labels that count."""
    num_bytes: int | None = None
    """Bytes of the text that these stand for; None where that isn't known."""
    seconds: float

    @property
    def bits_per_byte(self) -> float | None:
        """The loss in bits, spread over the bytes of the text; it compares models of different tokenizers."""
        if not self.num_bytes:
            return None
        return self.lm_loss * self.tokens / math.log(2) / self.num_bytes

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that is no number."""
        try:
            return math.exp(self.lm_loss)
        except OverflowError:
            return math.inf

    def scalars(self) -> dict[str, float]:
        """Give the numbers under the names that every sink has."""
        found = {
            "eval_lm_loss": self.lm_loss,
            "eval_perplexity": self.perplexity,
            "eval_tokens": self.tokens,
            "eval_seconds": self.seconds,
        }
        if self.num_bytes is not None and self.bits_per_byte is not None:
            found |= {"eval_bits_per_byte": self.bits_per_byte, "eval_bytes": self.num_bytes}
        return found


@dataclass(frozen=True, kw_only=True, slots=True)
class IntervalRecord:
    """The numbers of the steps since the last record."""

    iteration: int
    """The last step."""
    num_steps: int
    scalars: Mapping[str, float | None]
    """Name -> value, the same names in every sink; None is unknown here (a share of an unknown peak)."""
    layers: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Name -> a value for each layer; NaN for a layer without experts."""
    expert_load: Sequence[Sequence[int]] = ()
    """[L][E] choices of each expert over the interval; empty for a dense model."""
    dead_experts: Mapping[int, Sequence[int]] = field(default_factory=dict)
    """Layer -> experts without a token for long."""

    def layer_scalars(self) -> dict[str, float]:
        """Give the layers' numbers as named curves; layers without experts have none."""
        return {
            f"layer_{number:03d}/{name}": value
            for name, values in self.layers.items()
            for number, value in enumerate(values)
            if not math.isnan(value)
        }


def summarize(steps: Sequence[StepRecord], speed: Speed | None, eta_seconds: float | None) -> IntervalRecord:
    """Put the steps of an interval together.

    Args:
        steps: at least one, in order; what isn't finite because a step was skipped is left out of means.
        speed: to tell TFLOP/s and MFU; None leaves them unknown.
        eta_seconds: until the run's end; None is unknown.

    Returns:
        The record: means over the steps, the last learning rate, the load summed up.
    """
    last, done = steps[-1], [step for step in steps if not step.skipped]
    seconds = sum(step.seconds for step in steps)
    tokens_per_second = sum(step.num_tokens for step in steps) / seconds if seconds else math.nan
    flops = speed.flops_per_token * tokens_per_second / speed.num_gpus if speed is not None else None
    peak = speed.peak_flops if speed is not None else None
    scalars: dict[str, float | None] = {
        "loss": _mean([step.lm_loss + _added(step) for step in done]),
        "lm_loss": _mean([step.lm_loss for step in done]),
        "grad_norm": _mean([step.grad_norm for step in done]),
        "learning_rate": last.learning_rate,
        "consumed_train_samples": last.consumed_samples,
        "consumed_train_tokens": last.consumed_tokens,
        "tokens_per_second": tokens_per_second,
        "tflops_per_gpu": None if flops is None else flops / 1e12,
        "mfu": None if flops is None or peak is None else flops / peak,
        "step_seconds": seconds / len(steps),
        "data_wait": sum(step.data_seconds for step in steps) / seconds if seconds else math.nan,
        "memory_gb": max(step.memory_bytes for step in steps) / 1e9,
        "skipped_steps": len(steps) - len(done),
        "repeated_steps": sum(step.repeated for step in steps),
        "eta_seconds": eta_seconds,
    } | dict(last.measured)
    reports = [step.routing for step in steps if step.routing is not None]
    if not reports:
        return IntervalRecord(iteration=last.iteration, num_steps=len(steps), scalars=scalars)
    routing, layers, load_LE = _routing(reports)
    return IntervalRecord(
        iteration=last.iteration,
        num_steps=len(steps),
        scalars=scalars | routing,
        layers=layers,
        expert_load=load_LE.tolist(),
    )


def _routing(reports: Sequence[RoutingReport]) -> tuple[dict[str, float | None], dict[str, list[float]], Tensor]:
    """Give the scalars, the layers' numbers and the load of an interval."""
    load_LE = sum((report.load_LE for report in reports[1:]), reports[0].load_LE)
    active_L = load_LE.sum(1) > 0
    choices_L = load_LE.sum(1).clamp(min=1)
    ratio_L = load_LE.amax(1).double() * load_LE.shape[1] / choices_L
    dropped_L = sum((report.dropped_L for report in reports[1:]), reports[0].dropped_L)
    layers = {
        "aux_loss": _layer_means([report.aux_loss_L for report in reports]),
        "z_loss": _layer_means([report.z_loss_L for report in reports]),
        "load_max_over_mean": ratio_L,
        "dropped_share": dropped_L.double() / choices_L,
        "router_entropy": _layer_means([report.entropy_L for report in reports]),
    }
    scalars: dict[str, float | None] = {
        # Exactly 0 is a loss that nobody computes.
        "aux_loss": _mean([report.aux_loss for report in reports]) or None,
        "z_loss": _mean([report.z_loss for report in reports]) or None,
        "load_max_over_mean": float(ratio_L.max()),
        **({"rank_load": _mean([report.rank_load for report in reports])} if reports[0].num_ranks > 1 else {}),
        "dropped_share": int(dropped_L.sum()) / max(int(load_LE.sum()), 1),
        "router_entropy": _mean([report.entropy for report in reports]),
        "nonfinite_logits": sum(report.nonfinite for report in reports),
    }
    missing = ~active_L
    return scalars, {name: values.masked_fill(missing, math.nan).tolist() for name, values in layers.items()}, load_LE


def _added(step: StepRecord) -> float:
    return step.routing.added_loss if step.routing is not None else 0.0


def _layer_means(values: Sequence[Tensor]) -> Tensor:
    return sum(values[1:], values[0]) / len(values)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def as_json(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Make numbers that JSON lacks null, however deep.

    Args:
        fields: names and values.

    Returns:
        The same with None for NaN and infinity.
    """

    def plain(value: Any) -> Any:
        if isinstance(value, float):
            return value if math.isfinite(value) else None
        if isinstance(value, Mapping):
            return {str(key): plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return value if value is None or isinstance(value, str | int | bool) else str(value)

    return {key: plain(value) for key, value in fields.items()}
