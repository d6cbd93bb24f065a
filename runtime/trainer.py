"""The training loop: data, learning rate, engine, logs, evaluation, checkpoints."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import torch.distributed as dist

from moeconv.checkpoint import Checkpoint
from runtime.checkpoint import folder as folders
from runtime.checkpoint.position import TrainerState, seed_step
from runtime.checkpoint.rank_files import collect_files, commit_checkpoint
from runtime.checkpoint.writer import Outcome, Saver, check
from runtime.data.loader import DataSource, Loader
from runtime.engine import Engine, StepResult
from runtime.errors import require
from runtime.job.processes import STARTED, max_over_ranks, peak_memory
from runtime.job.signals import StopRequest
from runtime.job.watchdog import Progress
from runtime.log.metrics import MetricLog
from runtime.log.records import EvalRecord, StepRecord
from runtime.parallel.mesh import ParallelMesh
from runtime.settings.run import RunConfig


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
        dp_size = mesh.size("dp")
        self._global_batch_size = run.train.num_microbatches(dp_size) * run.train.micro_batch_size * dp_size
        self._control = dist.new_group(backend="gloo")
        self._saver: Saver | None = None
        if run.checkpoint.save is not None:
            _ = source.carried_bytes  # read now: the folder may be removed by the time of a save (--keep-last)
            group = dist.new_group(backend="gloo")
            note = log.note if log is not None else None
            self._saver = Saver(run.checkpoint.save, group, keep_last=run.checkpoint.keep_last, note=note)
        self._saved_iteration = -1

    def resume(self, state: TrainerState, *, own: bool) -> None:
        """Go on from a checkpoint's position.

        Args:
            state: what the checkpoint's trainer.json says.
            own: whether the checkpoint is in the folder that this run saves to.
        """
        self.engine.load_scalars(state.optimizer)
        self.state = state
        self._saved_iteration = state.iteration if own else -1
        self._note(f"going on after iteration {state.iteration}, {state.consumed_train_samples} samples")
        if state.data_fingerprint and not self.run.skip_train and state.data_fingerprint != self.data.fingerprint():
            self._note("the training data, their split, --seq-length or --seed are not those of the checkpoint")
        now = dataclasses.asdict(self.run.schedule)
        changed = [f"{k} {state.schedule[k]} -> {v}" for k, v in now.items() if state.schedule.get(k, v) != v]
        if changed:
            self._note(f"the learning rate's schedule changes: {', '.join(changed)}")

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
        fingerprint = self.data.fingerprint()
        self.state = dataclasses.replace(
            self.state, data_fingerprint=fingerprint, schedule=dataclasses.asdict(self.run.schedule)
        )
        loader = self._loader("train", config.micro_batch_size)
        reason = ""
        if stop is not None:
            stop.begin_training()
        while self.state.iteration < config.train_iters and not reason:
            reason = self._step(loader, stop)
            iteration, stopped = self.state.iteration, bool(reason)
            due = config.eval_iters and config.eval_interval and iteration % config.eval_interval == 0
            if due and not stopped and iteration < config.train_iters:
                self.evaluate("valid")
            if config.save_interval and iteration % config.save_interval == 0:
                self._save()
            elif self._saver is not None and self._saver.finished():
                self._report(self._saver.wait())
        if self._log is not None:
            self._log.flush()
        if reason:
            what = "saving" if self._saver is not None else "nothing is saved without --save:"
            self._note(f"{reason}: {what} after iteration {self.state.iteration} and leaving")
        self._finish()
        return bool(reason)

    def evaluate(self, split: str) -> float:
        """Measure the loss on a split; collective.

        Args:
            split: valid or test.

        Returns:
            Mean cross entropy, nats a token.
        """
        start = time.perf_counter()
        config, size = self.run.train, self._global_batch_size
        loader = self._loader(split, config.micro_batch_size)
        samples = self.data.samples(split).num_samples
        if config.eval_iters >= 0:
            samples = min(samples, config.eval_iters * size)
        loss = 0.0
        for first in range(0, samples, size):
            self._progress(f"evaluation on the {split} split after iteration {self.state.iteration}, sample {first}")
            share = min(size, samples - first) / samples
            loss += share * float(self.engine.evaluate(loader.global_batch(first, size, limit=samples)))
        if self._log is not None:
            self._log.evaluation(
                EvalRecord(
                    iteration=self.state.iteration,
                    split=split,
                    consumed_tokens=self.state.consumed_train_samples * config.seq_length,
                    lm_loss=loss,
                    tokens=samples * config.seq_length,
                    seconds=time.perf_counter() - start,
                )
            )
        return loss

    def _loader(self, split: str, micro_batch_size: int) -> Loader:
        return Loader(
            samples=self.data.samples(split),
            micro_batch_size=micro_batch_size,
            dp_rank=self.mesh.rank("dp"),
            dp_size=self.mesh.size("dp"),
        )

    def _step(self, loader: Loader, stop: StopRequest | None) -> str:
        """Do a step.

        Returns:
            Why the run is to leave after it, the same on every rank; empty where it goes on.
        """
        iteration = self.state.iteration + 1
        self._progress(f"iteration {iteration}")
        start = time.perf_counter()
        batches = loader.global_batch(self.state.consumed_train_samples, self._global_batch_size)
        waited = time.perf_counter() - start
        learning_rate = self.run.schedule.lr(self.state.iteration)
        self.engine.set_lr(learning_rate)
        axes = ("dp", "cp", "pp", "tp") if self.run.parallel.sp else ("dp", "cp", "pp")
        seed_step(self.state.seed, iteration, *(self.mesh.rank(axis) for axis in axes))
        result = self.engine.train_step(batches)  # waits for the device: the time below is the whole step's
        seconds = time.perf_counter() - start
        consumed = self.state.consumed_train_samples + self._global_batch_size
        self.state = dataclasses.replace(self.state, iteration=iteration, consumed_train_samples=consumed)
        config, minutes = self.run.train, (time.monotonic() - STARTED) / 60
        late = float(0 < config.exit_duration_in_mins <= minutes)
        mine = (stop is not None and stop.received, late, peak_memory(self.engine.device), waited)
        asked, late, memory, waited = max_over_ranks(mine, self._control)
        self._record(result, learning_rate, seconds, waited, int(memory))
        if asked:
            return "asked to stop"
        if late:
            return f"--exit-duration-in-mins {config.exit_duration_in_mins:g}"
        if config.exit_interval and iteration % config.exit_interval == 0 and iteration < config.train_iters:
            return f"--exit-interval {config.exit_interval}"
        return ""

    def _record(
        self, result: StepResult, learning_rate: float, seconds: float, data_seconds: float, memory: int
    ) -> None:
        if self._log is None:
            return
        seq_length = self.run.train.seq_length
        self._log.step(
            StepRecord(
                iteration=self.state.iteration,
                consumed_samples=self.state.consumed_train_samples,
                consumed_tokens=self.state.consumed_train_samples * seq_length,
                num_tokens=self._global_batch_size * seq_length,
                lm_loss=result.lm_loss,
                grad_norm=result.grad_norm,
                learning_rate=learning_rate,
                skipped=result.skipped,
                seconds=seconds,
                data_seconds=data_seconds,
                memory_bytes=memory,
                routing=result.routing,
            )
        )

    def _save(self) -> None:
        if self._saver is None:
            return
        iteration = self.state.iteration
        self._progress(f"save after iteration {iteration}", limited=False)  # the one before may still be written
        self._report(self._saver.wait())
        self.state = dataclasses.replace(self.state, optimizer=self.engine.scalars())
        with_optimizer = self.run.checkpoint.save_optim
        files = collect_files(self.engine, self.mesh, self.source, self._saver.stage, with_optimizer=with_optimizer)
        state, source, layout = self.state, self.source, self.run.parallel
        self._saver.save(
            iteration, files, lambda path, records: commit_checkpoint(path, records, source, layout, state)
        )
        self._saved_iteration = iteration

    def _finish(self) -> None:
        """Save where the last step isn't saved yet, and wait until it is on disk."""
        if self._saver is None:
            return
        if self._saved_iteration != self.state.iteration:
            self._save()
        self._progress("waiting for the last save", limited=False)
        outcome = self._saver.wait()
        self._report(outcome)
        if outcome is not None:
            check(outcome)

    def _report(self, outcome: Outcome | None) -> None:
        if outcome is None:
            return
        if outcome.error is None:
            self._note(f"saved iteration {outcome.iteration} to {outcome.path} in {outcome.seconds:.1f} s")
            return
        last = folders.latest(self.run.checkpoint.save or Path())
        self._note(f"SAVE FAILED at iteration {outcome.iteration}: {outcome.error}; the last good checkpoint is {last}")

    def _note(self, text: str) -> None:
        if self._log is not None:
            self._log.note(text)


def check_splits(run: RunConfig, data: DataSource) -> None:
    """Open every split that the run will need, so that what is missing is noticed before the first step.

    Args:
        run: the settings.
        data: the samples.

    Raises:
        DataError: data can't be read or are too few.
        ConfigError: a split that is needed has no data.
    """
    if not run.skip_train:
        data.samples("train")
    if run.train.eval_iters:
        data.samples("valid")
        if data.has("test"):
            data.samples("test")
    require(
        not run.skip_train or run.train.eval_iters != 0,
        "--skip-train evaluates only: say on how many global batches with --eval-iters (-1: the whole split)",
    )
