"""The sizes of a step and the length of a run."""

from __future__ import annotations

from dataclasses import dataclass

from runtime.errors import require


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """The sizes of a step and the length of a run."""

    seq_length: int
    micro_batch_size: int = 1
    """Sequences of one forward pass of one data-parallel rank."""
    global_batch_size: int = 0
    """Sequences of one optimizer step over all data-parallel ranks; 0 is one micro-batch on each."""
    train_iters: int = 0
    seed: int = 1234
    eval_interval: int = 0
    """Iterations between evaluations on the validation split; 0 evaluates at the end only."""
    eval_iters: int = 0
    """Global batches of an evaluation; 0 doesn't evaluate, -1 takes the whole split once."""
    save_interval: int = 0
    """Iterations between saves; 0 saves at the end only."""
    log_interval: int = 1
    exit_interval: int = 0
    """Save and leave after the next iteration that is a multiple of it (--exit-interval); 0 goes on to the end."""
    exit_duration_in_mins: float = 0.0
    """Save and leave after the first step that ends so many minutes after the start (--exit-duration-in-mins); 0: never."""

    def __post_init__(self) -> None:
        require(self.seq_length >= 1, f"--seq-length is {self.seq_length}; expected at least 1")
        require(self.micro_batch_size >= 1, f"--micro-batch-size is {self.micro_batch_size}; expected at least 1")
        require(self.log_interval >= 1, f"--log-interval is {self.log_interval}; expected at least 1")
        require(self.eval_iters >= -1, f"--eval-iters is {self.eval_iters}; expected -1 (the whole split) or more")
        for name in (
            "global_batch_size",
            "train_iters",
            "eval_interval",
            "save_interval",
            "exit_interval",
            "exit_duration_in_mins",
        ):
            value = getattr(self, name)
            require(value >= 0, f"--{name.replace('_', '-')} is {value}; expected at least 0")

    def num_microbatches(self, dp: int) -> int:
        """Forward passes that each data-parallel rank makes in one optimizer step.

        Args:
            dp: data-parallel degree.

        Returns:
            The number of micro-batches of one rank.

        Raises:
            ConfigError: the global batch isn't a multiple of what one pass over all ranks takes.
        """
        one_pass = self.micro_batch_size * dp
        total = self.global_batch_size or one_pass
        require(
            total % one_pass == 0,
            f"--global-batch-size {total} is not a multiple of --micro-batch-size {self.micro_batch_size} times the "
            f"data-parallel degree {dp}; take a multiple of {one_pass}",
        )
        return total // one_pass
