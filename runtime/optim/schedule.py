"""Learning rate of each step: warm-up, then constant, linear, cosine, inverse square root or warm-up-stable-decay."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from runtime.errors import require
from runtime.flag import check_fields, flag

DecayStyle = Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"]
WsdStyle = Literal["exponential", "linear", "cosine", "minus_sqrt"]
DECAY_STYLES: tuple[DecayStyle, ...] = get_args(DecayStyle)
WSD_STYLES: tuple[WsdStyle, ...] = get_args(WsdStyle)


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig:
    """The learning rate's schedule as a run states it: in iterations, in samples, or the warm-up as a share."""

    min_lr: float = flag(0.0, at_least=0)
    """Learning rate at the end of the decay and after it."""
    decoupled_min_lr: float | None = flag(None, at_least=0)
    """The same for the embedding and the output head, with --decoupled-lr; by default --min-lr."""
    lr_decay_style: DecayStyle = "linear"
    """How the rate falls after the warm-up."""
    lr_decay_iters: int | None = flag(None, at_least=1)
    """Iterations until --min-lr, the warm-up included; by default --train-iters."""
    lr_decay_samples: int | None = flag(None, at_least=1)
    """Samples until --min-lr, the warm-up included; by default --train-samples."""
    lr_warmup_iters: int = flag(0, at_least=0)
    """Iterations of linear warm-up."""
    lr_warmup_samples: int = flag(0, at_least=0)
    """Samples of linear warm-up, with --train-samples."""
    lr_warmup_fraction: float | None = flag(None, at_least=0, below=1)
    """Linear warm-up as a share of the decay."""
    lr_warmup_init: float = flag(0.0, at_least=0)
    """Learning rate of the first step of the warm-up."""
    lr_rewarmup_iters: int = flag(0, at_least=0)
    """Where a run goes on from a checkpoint of --load: iterations of another linear warm-up, from --lr-warmup-init to what
    the schedule says. A restart from --save goes on in it, and begins none anew."""
    lr_rewarmup_samples: int = flag(0, at_least=0)
    """The same in samples, with --train-samples."""
    lr_wsd_decay_style: WsdStyle = "exponential"
    """WSD only: how the rate falls at the end."""
    lr_wsd_decay_iters: int = flag(0, at_least=0)
    """WSD only: iterations of the fall at the end of the decay."""
    lr_wsd_decay_samples: int = flag(0, at_least=0)
    """WSD only: samples of the fall at the end of the decay, with --train-samples."""
    use_checkpoint_schedule: bool = flag(False, "--use-checkpoint-opt_param-scheduler")
    """On a resume, take the whole schedule from the checkpoint instead of these flags."""

    def __post_init__(self) -> None:
        check_fields(self)

    def resolve(
        self, max_lr: float, train_iters: int, train_samples: int, decoupled_lr: float | None = None
    ) -> Schedule:
        """Give the schedule of a run.

        Args:
            max_lr: the peak rate.
            train_iters: iterations in all; 0 where the run is evaluated only.
            train_samples: samples in all, where the run counts in them; else 0.
            decoupled_lr: the peak rate of embedding and head; None: max_lr.

        Returns:
            The schedule; it counts samples where the run does, else iterations.

        Raises:
            ConfigError: flags that count in the other unit, two warm-ups, or values that exclude each other.
        """
        unit: Literal["iters", "samples"] = "samples" if train_samples else "iters"
        other = "iters" if train_samples else "samples"
        for name in ("lr_decay", "lr_warmup", "lr_rewarmup", "lr_wsd_decay"):
            require(
                not getattr(self, f"{name}_{other}"),
                f"--{name.replace('_', '-')}-{other} is {getattr(self, f'{name}_{other}')} in a run that counts in "
                f"{unit} (--train-{unit}): give --{name.replace('_', '-')}-{unit}",
            )
        decay = (self.lr_decay_samples if train_samples else self.lr_decay_iters) or train_samples or train_iters or 1
        warmup = self.lr_warmup_samples if train_samples else self.lr_warmup_iters
        if self.lr_warmup_fraction is not None:
            require(not warmup, f"--lr-warmup-fraction and --lr-warmup-{unit} are two warm-ups: give one")
            warmup = int(self.lr_warmup_fraction * decay)
        return Schedule(
            max_lr=max_lr,
            min_lr=self.min_lr,
            warmup_init=self.lr_warmup_init,
            warmup_iters=warmup,
            decay_iters=decay,
            style=self.lr_decay_style,
            wsd_style=self.lr_wsd_decay_style,
            wsd_iters=self.lr_wsd_decay_samples if train_samples else self.lr_wsd_decay_iters,
            unit=unit,
            rewarmup=self.lr_rewarmup_samples if train_samples else self.lr_rewarmup_iters,
            decoupled_max_lr=decoupled_lr,
            decoupled_min_lr=self.min_lr if self.decoupled_min_lr is None else self.decoupled_min_lr,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """The learning rate as a function of the steps done, as Megatron counts it: the first step has done 0.

    Source:
        https://github.com/NVIDIA/Megatron-LM/blob/d98e8a6/megatron/core/optimizer_param_scheduler.py (get_lr).
    """

    max_lr: float
    min_lr: float = 0.0
    warmup_init: float = 0.0
    """Rate of the first warm-up step."""
    warmup_iters: int = 0
    decay_iters: int = 1
    """Steps until min_lr, the warm-up included; afterwards the rate stays there."""
    style: DecayStyle = "linear"
    wsd_style: WsdStyle = "exponential"
    wsd_iters: int = 0
    """WSD only: length of the decay at the end of decay_iters."""
    unit: Literal["iters", "samples"] = "iters"
    """What the lengths above and `lr` count."""
    decoupled_max_lr: float | None = None
    """Peak rate of embedding and head; None: they have that of everything else."""
    decoupled_min_lr: float = 0.0
    rewarmup: int = 0
    """Length of the warm-up after a resume."""
    rewarmup_start: int | None = None
    """Where that begins; None: it doesn't."""

    def __post_init__(self) -> None:
        unit = self.unit
        for flag_, value, known in (
            ("--lr-decay-style", self.style, DECAY_STYLES),
            ("--lr-wsd-decay-style", self.wsd_style, WSD_STYLES),
        ):
            require(value in known, f"{flag_} is {value!r}; expected one of {', '.join(known)}")
        for name, rate in (("--min-lr", self.min_lr), ("--lr-warmup-init", self.warmup_init)):
            require(0 <= rate <= self.max_lr, f"{name} is {rate}; expected 0 to --lr ({self.max_lr})")
        peak = self.max_lr if self.decoupled_max_lr is None else self.decoupled_max_lr
        require(
            self.decoupled_max_lr is None or max(self.decoupled_min_lr, self.warmup_init) <= peak,
            f"--decoupled-lr is {peak}; expected at least --decoupled-min-lr, or --min-lr without it "
            f"({self.decoupled_min_lr}), and --lr-warmup-init ({self.warmup_init})",
        )
        require(self.decay_iters >= 1, f"--lr-decay-{unit} is {self.decay_iters}; expected at least 1")
        require(
            0 <= self.warmup_iters < self.decay_iters or self.warmup_iters == 0,
            f"--lr-warmup-{unit} is {self.warmup_iters}; expected less than --lr-decay-{unit} ({self.decay_iters})",
        )
        require(
            self.style != "WSD" or 0 < self.wsd_iters <= self.decay_iters - self.warmup_iters,
            f"--lr-wsd-decay-{unit} is {self.wsd_iters}; expected 1 to what follows the warm-up "
            f"({self.decay_iters - self.warmup_iters})",
        )

    def lr(self, steps_done: int) -> float:
        """Give the learning rate of a step.

        Args:
            steps_done: optimizer steps before it, or samples of them, as `unit` says.

        Returns:
            The rate.
        """
        return self._rate(steps_done, self.max_lr, self.min_lr)

    def decoupled_lr(self, steps_done: int) -> float:
        """Give the learning rate of embedding and head; arguments as of `lr`."""
        if self.decoupled_max_lr is None:
            return self.lr(steps_done)
        return self._rate(steps_done, self.decoupled_max_lr, self.decoupled_min_lr)

    def _rate(self, steps_done: int, max_lr: float, min_lr: float) -> float:
        rate = self._scheduled(steps_done, max_lr, min_lr)
        if self.rewarmup_start is None or not 0 <= steps_done - self.rewarmup_start < self.rewarmup:
            return rate
        return self.warmup_init + (rate - self.warmup_init) * (steps_done - self.rewarmup_start) / self.rewarmup

    def _scheduled(self, steps_done: int, max_lr: float, min_lr: float) -> float:
        if self.warmup_iters and steps_done <= self.warmup_iters:
            return self.warmup_init + (max_lr - self.warmup_init) * steps_done / self.warmup_iters
        if self.style == "constant":
            return max_lr
        if steps_done > self.decay_iters:
            return min_lr
        if self.style == "inverse-square-root":
            rate = max_lr * math.sqrt(max(self.warmup_iters, 1) / max(steps_done, 1))
            return max(min_lr, rate)
        return min_lr + self._remaining(steps_done) * (max_lr - min_lr)

    def _remaining(self, steps_done: int) -> float:
        """Give the share of the way from min_lr to max_lr, 1 at the start of the decay and 0 at its end."""
        if self.style == "WSD":
            start = self.decay_iters - self.wsd_iters
            if steps_done <= start:
                return 1.0
            done = (steps_done - start) / self.wsd_iters
            shares: dict[WsdStyle, float] = {
                "linear": 1.0 - done,
                "cosine": 0.5 * (math.cos(math.pi * done) + 1.0),
                "exponential": 2.0 * math.pow(0.5, done) - 1.0,
                "minus_sqrt": 1.0 - math.sqrt(done),
            }
            return shares[self.wsd_style]
        done = (steps_done - self.warmup_iters) / (self.decay_iters - self.warmup_iters)
        return 1.0 - done if self.style == "linear" else 0.5 * (math.cos(math.pi * done) + 1.0)
