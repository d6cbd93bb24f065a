"""Batches read ahead by threads, so that a step never waits for the disk."""

from __future__ import annotations

import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

from runtime.data.batch import Batch
from runtime.data.loader import Loader


class Prefetcher:
    """A loader that has the next global batches ready; the batches are those of the loader itself."""

    def __init__(self, loader: Loader, *, num_workers: int, ahead: int = 2, pin: bool = False) -> None:
        """Begin to read when the first batch is asked for.

        Args:
            loader: makes the batches.
            num_workers: threads; 0 makes batches when they are asked for.
            ahead: global batches that are read ahead.
            pin: whether batches are put into page-locked memory, from where GPUs copy them while they compute.
        """
        self._loader, self._ahead, self._pin = loader, max(ahead, num_workers), pin
        self._pool = ThreadPoolExecutor(num_workers, "data") if num_workers else None
        self._due: deque[tuple[tuple[int, int, int | None], Future[list[Batch]]]] = deque()
        self.wait_seconds = 0.0
        """Time that the last batch was waited for."""

    def global_batch(self, first: int, size: int, limit: int | None = None) -> list[Batch]:
        """Give this rank's micro-batches of one global batch, and read on behind it.

        Args:
            first: index of the batch's first sample; the next batch is expected to follow it, anything else is read anew.
            size: samples of the global batch.
            limit: samples from here on don't count.

        Returns:
            As `Loader.global_batch`.

        Raises:
            DataError: an id is outside the vocabulary, or a file can't be read.
        """
        begin = time.perf_counter()
        if self._pool is None:
            batches = self._make(first, size, limit)
        else:
            batches = self._take(self._pool, first, size, limit)
        self.wait_seconds = time.perf_counter() - begin
        return batches

    def _take(self, pool: ThreadPoolExecutor, first: int, size: int, limit: int | None) -> list[Batch]:
        key = (first, size, limit)
        if not self._due or self._due[0][0] != key:
            self._drop()
            self._due.append((key, pool.submit(self._make, *key)))
        while len(self._due) <= self._ahead:
            (last, *_), _ = self._due[-1]
            if limit is not None and last + size >= limit:
                break
            following = (last + size, size, limit)
            self._due.append((following, pool.submit(self._make, *following)))
        _, future = self._due.popleft()
        return future.result()

    def _make(self, first: int, size: int, limit: int | None) -> list[Batch]:
        batches = self._loader.global_batch(first, size, limit)
        return [batch.pin_memory() for batch in batches] if self._pin else batches

    def _drop(self) -> None:
        for _, future in self._due:
            future.cancel()
        self._due.clear()

    def close(self) -> None:
        """Stop reading."""
        self._drop()
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
