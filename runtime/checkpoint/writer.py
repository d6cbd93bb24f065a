"""Saves: tensors are copied to the host, then written by a thread of each rank while training goes on.

Where training waits for the save anyway, where it is asked for (--no-async-save), and where some host lacks the memory for
the copies, all ranks write without them: tensors go to their files piece by piece, and training waits. Files are the same.

A checkpoint counts only when every rank has written its part: then the first rank writes the manifest, renames the
folder and moves `latest`. Whatever goes wrong before that leaves the last good checkpoint as it is.
"""

from __future__ import annotations

import shutil
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from moeconv.errors import MoeconvError, WriteError
from moeconv.io.manifest import FileRecord
from moeconv.io.shards import ShardEntry, write_shard_file
from runtime.checkpoint import folder as folders
from runtime.checkpoint.bounce import Bounce, Staged
from runtime.checkpoint.host_buffer import HostBuffer
from runtime.checkpoint.room import Need, host_name, shortage
from runtime.host_memory import available_memory

T = TypeVar("T")
Commit = Callable[[Path, list[FileRecord]], None]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a save ended."""

    iteration: int
    path: Path | None
    """The checkpoint; None if it failed."""
    seconds: float
    error: str | None = None


class Saver:
    """Writes checkpoints of one run; every rank has one and calls it at the same iterations."""

    def __init__(
        self,
        root: Path,
        group: dist.ProcessGroup | None,
        *,
        keep_last: int,
        asynchronous: bool = True,
        note: Callable[[str], None] | None = None,
        available: Callable[[], int | None] = available_memory,
    ) -> None:
        """Make a saver.

        Args:
            root: the save folder.
            group: a gloo group of all ranks that nothing else uses, since the writing thread talks over it; None for
                a single process.
            keep_last: checkpoints that are kept; 0 keeps all.
            asynchronous: whether training goes on while a save is written, where there is memory for it; the same on
                every rank.
            note: told once if saves are slower than they could be, and of the first rank each time that a save has not the
                memory to be asynchronous; None warns.
            available: gives the bytes of memory that this rank's host has, None where nothing tells.
        """
        self.root, self._group, self._keep_last = root, group, keep_last
        self._rank = dist.get_rank(group) if group is not None else 0
        self._asynchronous, self._available, self._note = asynchronous, available, note or warnings.warn
        self._buffer, self._bounce = HostBuffer(note), Bounce(note)
        self.synchronous = not asynchronous
        """Whether training has to wait for what `stage` was last called for: `save` returns when it is at its end."""
        self._device: torch.device | None = None
        self._thread: threading.Thread | None = None
        self._outcome: Outcome | None = None

    def stage(self, tensors: Sequence[Tensor], *, waits: bool = False) -> list[Staged]:
        """Copy what the next save writes to the host, or leave it where it is; collective, after `wait` for an earlier one.

        Args:
            tensors: any dtypes, strides and devices; training may change them as soon as this returns, or where the saver
                is then `synchronous`, as soon as `save` does.
            waits: training waits for this save in any case, so that copies have no use.

        Returns:
            What is to be written of each; all saves share the memory, so it is valid until the next call.

        Raises:
            RuntimeError: an earlier save was not waited for, and may still be reading the memory.
        """
        self._require_idle()
        self.synchronous = not self._asynchronous or self._must_wait(tensors, waits)
        if not self.synchronous:
            copies = [torch.from_numpy(data) for data in self._buffer.stage(tensors)]
            tensors = [copy.view(t.dtype).view(t.shape) for copy, t in zip(copies, tensors, strict=True)]
        else:
            self._buffer.close()
            for self._device in {tensor.device for tensor in tensors if tensor.is_cuda}:
                torch.cuda.current_stream(self._device).synchronize()  # the thread that reads them may have another one
        return [Staged((tensor,), self._bounce) for tensor in tensors]

    def save(
        self, iteration: int, files: Mapping[str, Iterable[ShardEntry]], commit: Commit, *, best: bool = False
    ) -> None:
        """Start a save, or where the saver is `synchronous`, do it; an earlier one must have been waited for.

        Args:
            iteration: the checkpoint's iteration.
            files: this rank's files with their tensors, as `stage` gave them.
            commit: called on rank 0 with the folder and the records of all ranks' files; writes everything else, the
                manifest last.
            best: whether `best` names it from then on.

        Raises:
            RuntimeError: an earlier save was not waited for.
        """
        self._require_idle()
        arguments = (iteration, files, commit, best)
        self._thread = threading.Thread(target=self._run, args=arguments, name="checkpoint", daemon=True)
        self._thread.start()
        if self.synchronous:
            self._thread.join()

    def finished(self) -> bool:
        """Say whether a save was started and has come to its end on this rank."""
        return self._thread is not None and not self._thread.is_alive()

    def wait(self) -> Outcome | None:
        """Wait for the save under way.

        Returns:
            How it ended, the same on every rank; None if there was none.
        """
        if self._thread is None:
            return None
        self._thread.join()
        self._thread, outcome, self._outcome = None, self._outcome, None
        assert outcome is not None
        return outcome

    def _require_idle(self) -> None:
        # No assertion: with python -O one save would silently overwrite what another is writing.
        if self._thread is not None:
            raise RuntimeError("a save is under way: wait for it first")

    def _must_wait(self, tensors: Sequence[Tensor], waits: bool) -> bool:
        """Find out with all ranks whether there is no use in copies, or no room; take the memory if there is."""
        needs = self._all_gather(Need(host_name(), self._buffer.missing(tensors), self._available(), waits))
        if any(need.waits for need in needs):
            return True
        lack = shortage(needs)
        if lack is None and any(need.num_bytes for need in needs):
            _, error = _attempt(lambda: self._buffer.reserve_for(tensors))  # limits of a process show only here
            lack = _failures(self._all_gather(error))
        if lack is not None and self._rank == 0:
            self._note(f"this save is synchronous, training waits for it, since memory is short: {lack}")
        return lack is not None

    def _run(self, iteration: int, files: Mapping[str, Iterable[ShardEntry]], commit: Commit, best: bool) -> None:
        start = time.monotonic()
        path, error = None, None
        try:
            if self._device is not None:  # else a new thread takes the first GPU, and memory of it for a context
                torch.cuda.set_device(self._device)
            path, error = self._write(iteration, files, commit, best)
        except Exception as failure:  # whatever it is, it must reach the log and not die with the thread
            error = _describe(failure)
        self._outcome = Outcome(iteration, path, time.monotonic() - start, error)

    def _write(
        self, iteration: int, files: Mapping[str, Iterable[ShardEntry]], commit: Commit, best: bool
    ) -> tuple[Path | None, str | None]:
        prepared, error = _attempt(lambda: folders.prepare(self.root, iteration) if self._rank == 0 else None)
        if error := self._broadcast(error):
            return None, error
        partial = prepared or self.root / (folders.folder_name(iteration) + folders.PARTIAL)
        records, error = _attempt(lambda: [write_shard_file(partial, name, list(e)) for name, e in files.items()])
        everyone = self._gather((records or [], error))
        final: Path | None = None
        if self._rank == 0:
            error = _failures([why for _, why in everyone])
            if error is None:
                all_records = [record for mine, _ in everyone for record in mine]
                final, error = _attempt(lambda: self._commit(partial, all_records, commit, best))
            if error:
                shutil.rmtree(partial, ignore_errors=True)
        error = self._broadcast(error)
        return (None if error else final or self.root / folders.folder_name(iteration)), error

    def _commit(self, partial: Path, records: list[FileRecord], commit: Commit, best: bool) -> Path:
        commit(partial, records)
        final = folders.publish(partial)
        if best:
            folders.point(folders.BEST, final)
        folders.prune(self.root, self._keep_last)
        return final

    def _broadcast(self, error: str | None) -> str | None:
        """Give rank 0's word to every rank."""
        if self._group is None:
            return error
        box = [error]
        dist.broadcast_object_list(box, group_src=0, group=self._group)
        return box[0]

    def _all_gather(self, mine: T) -> list[T]:
        if self._group is None:
            return [mine]
        everyone: list[Any] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(everyone, mine, group=self._group)
        return everyone

    def _gather(self, mine: tuple[list[FileRecord], str | None]) -> list[tuple[list[FileRecord], str | None]]:
        """Collect what the ranks wrote on rank 0; elsewhere the list stays empty."""
        if self._group is None:
            return [mine]
        size = dist.get_world_size(self._group)
        everyone: list[Any] | None = [None] * size if self._rank == 0 else None
        dist.gather_object(mine, everyone, group_dst=0, group=self._group)
        return everyone or []


def _attempt(action: Callable[[], T]) -> tuple[T | None, str | None]:
    try:
        return action(), None
    except Exception as failure:  # reported through the outcome on every rank
        return None, _describe(failure)


def _failures(errors: Sequence[str | None]) -> str | None:
    """Put together what the ranks report; None if all is well."""
    return "; ".join(f"rank {rank}: {why}" for rank, why in enumerate(errors) if why) or None


def _describe(failure: Exception) -> str:
    return str(failure) if isinstance(failure, MoeconvError) else f"{type(failure).__name__}: {failure}"


def check(outcome: Outcome) -> None:
    """Refuse a save that failed, where nothing comes after it.

    Args:
        outcome: how it ended.

    Raises:
        WriteError: it failed.
    """
    if outcome.error is not None:
        raise WriteError(f"the checkpoint of iteration {outcome.iteration} was not saved: {outcome.error}")
