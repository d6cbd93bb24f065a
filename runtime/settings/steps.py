"""The sizes of a step and the length of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from runtime.errors import require
from runtime.flag import check_fields, flag
from runtime.model.dtypes import DtypeName
from runtime.settings.batch_sizes import BatchSizes

CudaGraphs = Literal["auto", "local", "none"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """The sizes of a step and the length of a run."""

    train_iters: int = flag(0, at_least=0)
    """Steps in all, the ones before a resume included."""
    train_samples: int = flag(0, at_least=0)
    """Sequences in all instead of steps: as many full global batches as they give."""
    micro_batch_size: int = flag(1, at_least=1)
    """Sequences of one forward pass of one data-parallel rank."""
    global_batch_size: int = flag(0, at_least=0)
    """Sequences of one optimizer step over all data-parallel ranks; 0 is one micro-batch on each."""
    rampup_batch_size: tuple[int, ...] = ()
    """START INCREMENT SAMPLES, with --train-samples: the global batch has START sequences first, and grows by INCREMENT at
    a time to --global-batch-size, which it has from the step after SAMPLES consumed sequences on."""
    seq_length: int = flag(0, at_least=0)
    """Tokens of a sequence; 0 takes 2048, or the checkpoint's longest if that is shorter."""
    dtype: DtypeName | None = flag(
        None,
        "--dtype",
        shorthands={"--bf16": "bfloat16", "--fp16": "float16", "--fp32": "float32", "--fp64": "float64"},
    )
    """Type that weights and activations are computed in; by default the checkpoint's own."""
    cuda_graph_impl: CudaGraphs = flag("auto", "--cuda-graph-impl", shorthands={"--enable-cuda-graph": "local"})
    """local: capture a micro-batch's passes once and replay them as a CUDA graph, so that the host needn't launch each kernel. auto:
    where nothing speaks against it, which the log says. none: never."""
    seed: int = 1234
    """Determines the order of the data, and with the iteration the random numbers of each step."""
    eval_interval: int = flag(0, at_least=0)
    """Iterations between evaluations on the validation split; 0 evaluates at the end only."""
    eval_iters: int = flag(0, at_least=-1)
    """Global batches of an evaluation; 0 doesn't evaluate, -1 takes the whole split once."""
    eval_ema: bool = False
    """Evaluate the mean of the weights (--ema-decay) too; with --skip-train, it alone, as the checkpoint has it."""
    early_stop: int = flag(0, at_least=0)
    """Leave after so many evaluations in turn (--eval-interval) whose validation loss, the mean over the sets, was not lower
    than the last one that was; 0 doesn't."""
    early_stop_min_delta: float = flag(0.0, at_least=0)
    """By how much a loss must be lower to count for --early-stop."""
    skip_train: bool = False
    """Evaluate only."""
    exit_interval: int = flag(0, at_least=0)
    """Save and leave at the first iteration that this divides; 0 doesn't."""
    exit_duration_in_mins: float = flag(0.0, at_least=0)
    """Save and leave after the first step that ends so many minutes after the start; 0 doesn't."""
    manual_gc: bool = False
    """Collect Python's garbage at fixed iterations on all ranks alike, instead of whenever a rank has enough of it."""
    manual_gc_interval: int = flag(0, at_least=0)
    """With --manual-gc: iterations between collections; 0 collects only before evaluations and saves."""
    distributed_timeout_minutes: float = flag(10.0, above=0)
    """A run that stands still this long is ended, with the stack of the rank that does."""

    def __post_init__(self) -> None:
        check_fields(self)
        require(
            not (self.train_iters and self.train_samples),
            "--train-iters and --train-samples both say how long the run is: give one",
        )
        require(
            bool(self.train_iters or self.train_samples or self.skip_train),
            "--train-iters is missing: say how many steps to train in all, or --skip-train to evaluate only",
        )
        require(
            not self.train_samples or self.global_batch_size > 0,
            f"--train-samples is {self.train_samples} and --global-batch-size is not given; samples make whole steps: "
            "give --global-batch-size, too",
        )
        require(
            not self.train_samples or self.train_samples >= self.global_batch_size,
            f"--train-samples is {self.train_samples}, less than one --global-batch-size ({self.global_batch_size})",
        )
        require(
            not self.rampup_batch_size or self.train_samples > 0,
            "--rampup-batch-size needs a run that counts in samples: give --train-samples instead of --train-iters",
        )
        BatchSizes.ramp(self.global_batch_size, self.rampup_batch_size)

    def evaluates_after(self, iteration: int) -> bool:
        """Say whether an evaluation is due after a step."""
        return bool(self.eval_iters and self.eval_interval) and iteration % self.eval_interval == 0

    @property
    def num_steps(self) -> int:
        """Optimizer steps in all."""
        return self.length(1)[0]

    def length(self, dp: int) -> tuple[int, int]:
        """Count the optimizer steps of the run, and the sequences that they take, with so many data-parallel ranks."""
        sizes = BatchSizes.ramp(self.global_batch_size or self.micro_batch_size * dp, self.rampup_batch_size)
        return (
            sizes.steps(self.train_samples) if self.train_samples else (self.train_iters, self.train_iters * sizes.full)
        )

    def batch_sizes(self, dp: int) -> BatchSizes:
        """Give the sequences of each optimizer step.

        Args:
            dp: data-parallel degree.

        Returns:
            The sizes of the global batch.

        Raises:
            ConfigError: one isn't a multiple of what one pass over all ranks takes.
        """
        one_pass = self.micro_batch_size * dp
        sizes = BatchSizes.ramp(self.global_batch_size or one_pass, self.rampup_batch_size)
        for total in sizes.all():
            ramp = f", which --rampup-batch-size {' '.join(map(str, self.rampup_batch_size))} comes to,"
            name = "--global-batch-size" if total == sizes.full else "a global batch of"
            require(
                total % one_pass == 0,
                f"{name} {total}{'' if total == sizes.full else ramp} is not a multiple of --micro-batch-size "
                f"{self.micro_batch_size} times the data-parallel degree {dp}; take a multiple of {one_pass}",
            )
        return sizes

    def num_samples(self, dp: int) -> tuple[int | None, int | None, int | None]:
        """Count the samples of train, valid and test that the whole run takes, as Megatron does.

        Args:
            dp: data-parallel degree.

        Returns:
            The three numbers; None for a part that is taken whole.

        Source:
            https://github.com/NVIDIA/Megatron-LM/blob/d98e8a6/megatron/training/training.py
            (get_train_valid_test_num_samples)
        """
        batch = self.batch_sizes(dp).full
        steps, consumed = self.length(dp)
        train = max(self.train_samples, consumed)
        if self.eval_iters < 0:
            return train, None, None
        evaluations = steps // self.eval_interval + 1 if self.eval_interval else 1
        return train, evaluations * self.eval_iters * batch, self.eval_iters * batch
