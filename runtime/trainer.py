"""The training loop: data, learning rate, engine, logs, evaluation, checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import time
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from moeconv.checkpoint import Checkpoint
from moeconv.io.manifest import FileRecord
from runtime.checkpoint import folder as folders
from runtime.checkpoint.position import TrainerState, seed_step
from runtime.checkpoint.rank_files import collect_files, commit_checkpoint
from runtime.checkpoint.writer import Outcome, Saver, check
from runtime.data.loader import DataSource
from runtime.data.packing import Samples
from runtime.data.prefetch import Prefetcher
from runtime.engine import Engine, StepResult
from runtime.evaluation import counts, evaluate_set
from runtime.job.processes import STARTED, max_over_ranks, peak_memory
from runtime.job.signals import StopRequest
from runtime.job.watchdog import Progress
from runtime.log.metrics import MetricLog
from runtime.log.records import EvalRecord, StepRecord
from runtime.measures import num_zeros, params_norm
from runtime.optim.config import EMA
from runtime.optim.groups import changed_groups
from runtime.optim.schedule import Schedule
from runtime.parallel.mesh import ParallelMesh
from runtime.settings.resolved import RUN_FILE, run_file
from runtime.settings.run import RunConfig
from runtime.validation import Referee


class Trainer:
    """One rank's part of a run."""

    def __init__(
        self,
        run: RunConfig,
        engine: Engine,
        mesh: ParallelMesh,
        source: Checkpoint,
        data: DataSource,
        log: MetricLog | None,
        progress: Progress,
    ) -> None:
        """Put a run together; collective.

        Args:
            run: the settings.
            engine: the model with its weights.
            mesh: the ranks' coordinates and groups.
            source: the checkpoint that was loaded; saves carry its config and tokenizer.
            data: the samples of each split.
            log: where the numbers go; None on all ranks but one.
            progress: told what happens next, for the watchdog.
        """
        self.run, self.engine, self.mesh, self.source, self.data = run, engine, mesh, source, data
        self._log, self._progress = log, progress
        self.state = TrainerState(seed=run.train.seed)
        self._schedule = run.schedule
        self._batch_sizes = run.train.batch_sizes(mesh.size("dp"))
        self._control = dist.new_group(backend="gloo")
        self._saver: Saver | None = None
        if run.checkpoint.save is not None:
            _ = source.carried_bytes  # read now: the folder may be removed by the time of a save (--keep-last)
            group = dist.new_group(backend="gloo")
            note = log.note if log is not None else None
            config = run.checkpoint
            self._saver = Saver(
                run.checkpoint.save, group, keep_last=config.keep_last, asynchronous=config.async_save, note=note
            )
        self._saved_iteration = -1
        self._outcome: Outcome | None = None  # of the last save that has come to its end
        self._referee = Referee(run.train, run.checkpoint, self._note, first=mesh.global_rank == 0)

    def resume(self, state: TrainerState, *, own: bool) -> None:
        """Go on from a checkpoint's position.

        Args:
            state: what the checkpoint's trainer.json says.
            own: whether the checkpoint is in the folder that this run saves to.
        """
        for line in self.engine.load_scalars(state.optimizer):
            self._note(line)
        self.state = state
        self._saved_iteration = state.iteration if own else -1
        if own:
            self._referee.resume(state.validation)
        self._note(f"going on after iteration {state.iteration}, {state.consumed_train_samples} samples")
        if (
            state.data_fingerprint
            and not self.run.train.skip_train
            and state.data_fingerprint != self.data.fingerprint()
        ):
            self._note("the training data, their split, --seq-length or --seed are not those of the checkpoint")
        if self.run.learning_rate.use_checkpoint_schedule:
            known = {name: value for name, value in state.schedule.items() if name in Schedule.__slots__}
            self._schedule = dataclasses.replace(self._schedule, **known)
        self._warm_again(state, own=own)
        now = dataclasses.asdict(self._schedule)
        changed = [f"{k} {state.schedule[k]} -> {v}" for k, v in now.items() if state.schedule.get(k, v) != v]
        if changed:
            self._note(f"the learning rate's schedule changes: {', '.join(changed)}")
        expected = self._batch_sizes.consumed(state.iteration)
        if self.run.train.train_samples and expected != state.consumed_train_samples:
            self._note(
                f"the {state.iteration} steps so far were of other batch sizes than these, which would have taken "
                f"{expected} samples: the run ends at iteration {self.run.train.num_steps} all the same"
            )
        for line in changed_groups(state.optimizer.get("groups", {}), self.run.optim) if state.optimizer else ():
            self._note(f"the groups of tensors change: {line}")

    def _warm_again(self, state: TrainerState, *, own: bool) -> None:
        """Begin the warm-up after a resume, or go on in the one that the run began."""
        begun = state.schedule.get("rewarmup_start") if own else None
        if self._schedule.rewarmup and begun is None:
            begun = state.consumed_train_samples if self._schedule.unit == "samples" else state.iteration
            self._note(f"the learning rate warms up again, over {self._schedule.rewarmup} {self._schedule.unit}")
        self._schedule = dataclasses.replace(self._schedule, rewarmup_start=begun)

    def train(self, stop: StopRequest | None = None) -> bool:
        """Train to the last iteration, or until somebody asks to stop; then save.

        Args:
            stop: whether this rank was asked to stop; None: nobody asks.

        Returns:
            Whether the run was stopped early.

        Raises:
            WriteError: the last save failed.
        """
        config = self.run.train
        fingerprint, save_interval = self.data.fingerprint(), self.run.checkpoint.save_interval
        self.state = dataclasses.replace(
            self.state, data_fingerprint=fingerprint, schedule=dataclasses.asdict(self._schedule)
        )
        loader = self._loader(self.data.samples("train"), config.micro_batch_size)
        if self.state.iteration >= config.num_steps:
            flag = (
                f"--train-iters {config.train_iters}"
                if config.train_iters
                else f"--train-samples {config.train_samples}"
            )
            self._note(f"{flag} is reached already, at iteration {self.state.iteration}: nothing is left to train")
        reason = self._reason_at_start()
        if stop is not None:
            stop.begin_training()
        with _collecting_garbage(config.manual_gc):
            while self.state.iteration < config.num_steps and not reason:
                reason = self._step(loader, stop)
                iteration = self.state.iteration
                due = config.evaluates_after(iteration)
                save = save_interval and iteration % save_interval == 0
                self._collect_garbage(bool(due or save))
                if due and not reason and iteration < config.num_steps:
                    reason = self._referee.judge(iteration, self.evaluate("valid"))
                if save or self._referee.keeps(iteration):
                    self._save(last=bool(reason) or iteration == config.num_steps)
                elif self._saver is not None and self._saver.finished():
                    self._report(self._saver.wait())
            loader.close()
            if self._log is not None:
                self._log.flush()
            if reason:
                what = "saving" if self._saver is not None else "nothing is saved without --save:"
                self._note(f"{reason}: {what} after iteration {self.state.iteration} and leaving")
            self._finish()
        return bool(reason) and not self._referee.is_over

    def _reason_at_start(self) -> str:
        """Make up for an evaluation that the run owes, since it was left right after the step; say why to leave again."""
        config, iteration = self.run.train, self.state.iteration
        if 0 < iteration < config.num_steps and config.evaluates_after(iteration) and self._referee.misses(iteration):
            self._referee.judge(iteration, self.evaluate("valid"))
            self._referee.mark()
        return self._referee.reason

    def _reason_to_stop(self, asked: bool, late: bool) -> str:
        """Say why the run is to be left after this step, the same on every rank; empty to go on."""
        config = self.run.train
        if asked:
            return "asked to stop"
        if config.exit_interval and self.state.iteration % config.exit_interval == 0:
            return f"--exit-interval {config.exit_interval} divides the iteration"
        return f"--exit-duration-in-mins {config.exit_duration_in_mins:g} are over" if late else ""

    def _collect_garbage(self, pause: bool) -> None:
        config = self.run.train
        due = config.manual_gc_interval and self.state.iteration % config.manual_gc_interval == 0
        if config.manual_gc and (pause or due):
            gc.collect()

    def evaluate_at_end(self) -> None:
        """Evaluate what has been trained, and saved; collective."""
        if not self._referee.is_over:
            self._referee.judge(self.state.iteration, self.evaluate("valid"))
            self._referee.mark()
        if self.data.has("test"):
            self.evaluate("test")

    def evaluate(self, split: str) -> float:
        """Measure and log the loss on each set of a split, and that of the mean of the weights; collective.

        Args:
            split: valid or test.

        Returns:
            The loss, mean over the sets, without the mean of the weights; the same on every rank.
        """
        mean, only = self.run.train.eval_ema, self.run.train.skip_train  # then what was loaded is the mean
        sets = self.data.sets(split)
        losses = [self._evaluate(f"{name} {EMA}" if mean and only else name, samples) for name, samples in sets]
        if mean and not only:
            with self.engine.mean_of_weights():
                for name, samples in self.data.sets(split):
                    self._evaluate(f"{name} {EMA}", samples)
        return sum(losses) / max(len(losses), 1)

    def _evaluate(self, name: str, samples: Samples) -> float:
        """Measure and log the mean cross entropy."""
        config, size = self.run.train, self._batch_sizes.full
        loader = self._loader(samples, config.micro_batch_size)
        count = samples.num_samples if config.eval_iters < 0 else min(samples.num_samples, config.eval_iters * size)
        place = f"evaluation on the {name} set after iteration {self.state.iteration}"
        found = evaluate_set(
            self.engine,
            self.mesh,
            loader,
            count=count,
            size=size,
            bytes_V=self._token_bytes,
            group=self._control,
            doing=lambda first: self._progress(f"{place}, sample {first}"),
        )
        loader.close()
        if self._log is not None:
            self._log.evaluation(
                EvalRecord(
                    iteration=self.state.iteration,
                    split=name,
                    consumed_tokens=self.state.consumed_train_samples * config.seq_length,
                    lm_loss=found.lm_loss,
                    tokens=found.tokens,
                    num_bytes=found.num_bytes,
                    seconds=found.seconds,
                )
            )
        return found.lm_loss

    @cached_property
    def _token_bytes(self) -> Tensor | None:
        return self.data.token_bytes() if counts(self.mesh) else None

    def _loader(self, samples: Samples, micro_batch_size: int) -> Prefetcher:
        rank, size = self.mesh.rank("dp"), self.mesh.size("dp")
        loader = self.data.loader(samples, micro_batch_size=micro_batch_size, dp_rank=rank, dp_size=size)
        return Prefetcher(loader, num_workers=self.run.data.num_workers, pin=self.engine.device.type == "cuda")

    def _step(self, loader: Prefetcher, stop: StopRequest | None) -> str:
        """Do a step.

        Returns:
            Why the run is to be left after it, the same on every rank; empty to go on.
        """
        iteration = self.state.iteration + 1
        self._progress(f"iteration {iteration}")
        start = time.perf_counter()
        batch_size = self._batch_sizes.at(self.state.consumed_train_samples)
        batches = loader.global_batch(self.state.consumed_train_samples, batch_size)
        waited = time.perf_counter() - start
        done = self.state.consumed_train_samples if self._schedule.unit == "samples" else self.state.iteration
        learning_rate = self._schedule.lr(done)
        self.engine.set_lr(learning_rate, self._schedule.decoupled_lr(done))
        axes = ("dp", "cp", "pp", "tp") if self.run.parallel.sp else ("dp", "cp", "pp")
        seed_step(self.state.seed, iteration, *(self.mesh.rank(axis) for axis in axes))
        result = self.engine.train_step(batches)  # waits for the device: the time below is the whole step's
        seconds = time.perf_counter() - start
        consumed = self.state.consumed_train_samples + batch_size
        self.state = dataclasses.replace(self.state, iteration=iteration, consumed_train_samples=consumed)
        # Clocks, memory and signals of ranks differ, so they agree.
        late = 0 < self.run.train.exit_duration_in_mins <= (time.monotonic() - STARTED) / 60
        mine = (stop is not None and stop.received, late, peak_memory(self.engine.device), waited)
        asked, over, memory, longest = max_over_ranks(mine, self._control)
        self._record(result, learning_rate, batch_size, seconds, longest, int(memory))
        return self._reason_to_stop(bool(asked), bool(over))

    def _measure(self) -> dict[str, float]:
        """Measure what is asked for beyond the step's own numbers, at the steps that the log has a line of; collective."""
        config, iteration = self.run.log, self.state.iteration
        if iteration % config.interval and iteration != self.run.train.num_steps:
            return {}
        out: dict[str, float] = {"params_norm": params_norm(self.engine)} if config.params_norm else {}
        return out | ({"num_zeros": num_zeros(self.engine)} if config.num_zeros else {})

    def _record(
        self,
        result: StepResult,
        learning_rate: float,
        batch_size: int,
        seconds: float,
        data_seconds: float,
        memory: int,
    ) -> None:
        measured = self._measure()
        if self.run.train.rampup_batch_size:
            measured["global_batch_size"] = batch_size
        if self._log is None:
            return
        seq_length = self.run.train.seq_length
        self._log.step(
            StepRecord(
                iteration=self.state.iteration,
                consumed_samples=self.state.consumed_train_samples,
                consumed_tokens=self.state.consumed_train_samples * seq_length,
                num_tokens=batch_size * seq_length,
                lm_loss=result.lm_loss,
                grad_norm=result.grad_norm,
                learning_rate=learning_rate,
                skipped=result.skipped,
                repeated=result.repeated,
                seconds=seconds,
                data_seconds=data_seconds,
                memory_bytes=memory,
                routing=result.routing,
                measured=measured,
            )
        )

    def _save(self, *, last: bool) -> None:
        """Save; `last`: the run waits for it in any case, so that a copy of what is written has no use."""
        if self._saver is None:
            return
        iteration = self.state.iteration
        self._progress(f"save after iteration {iteration}", limited=False)  # the one before may still be written
        self._report(self._saver.wait())
        self.state = dataclasses.replace(self.state, optimizer=self.engine.scalars(), validation=self._referee.stored())
        with_optimizer = self.run.checkpoint.save_optim
        items = self.engine.state(with_optimizer)
        files = collect_files(items, self.mesh, self.source.model, self._saver.stage, waits=last)
        state, source, layout, settings = self.state, self.source, self.run.parallel, {RUN_FILE: run_file(self.run)}

        def commit(path: Path, records: list[FileRecord]) -> None:
            commit_checkpoint(path, records, source, layout, state, settings)

        self._saver.save(iteration, files, commit, best=self._referee.keeps(iteration))
        self._saved_iteration = iteration
        if self._saver.synchronous:
            self._report(self._saver.wait())

    def _finish(self) -> None:
        """Save where the last step isn't saved yet, and wait until it is on disk."""
        if self._saver is None:
            return
        if self._saved_iteration != self.state.iteration:
            self._save(last=True)
        self._progress("waiting for the last save", limited=False)
        self._report(self._saver.wait())
        if self._outcome is not None and self._outcome.iteration == self.state.iteration:
            check(self._outcome)

    def _report(self, outcome: Outcome | None) -> None:
        if outcome is None:
            return
        self._outcome = outcome
        if outcome.error is None:
            self._note(f"saved iteration {outcome.iteration} to {outcome.path} in {outcome.seconds:.1f} s")
            return
        last = folders.latest(self.run.checkpoint.save or Path())
        self._note(
            f"SAVE FAILED at iteration {outcome.iteration}: {outcome.error}; the last good checkpoint is {last or 'none yet'}"
        )

    def _note(self, text: str) -> None:
        if self._log is not None:
            self._log.note(text)


@contextlib.contextmanager
def _collecting_garbage(manually: bool) -> Iterator[None]:
    """Keep Python from collecting garbage by itself, so that no rank pauses while the others wait for it."""
    if not manually:
        yield
        return
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
