"""Documents that share the rows of a batch, and in the forms in which attention takes them.

Everything is derived from document numbers on the host, so that no kernel is waited for, once for all layers.

Legend: B rows, S positions, Sq queries, Sk keys, N documents.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def document_bounds(document_ids_BS: Tensor) -> tuple[Tensor, Tensor]:
    """Find the documents of a batch laid row behind row.

    Args:
        document_ids_BS: [B, S] as in runtime.data.batch.Batch.

    Returns:
        [N] int64 where each document begins, and [N] its length.
    """
    begins_BS = torch.ones_like(document_ids_BS, dtype=torch.bool)
    begins_BS[:, 1:] = document_ids_BS[:, 1:] != document_ids_BS[:, :-1]
    starts = begins_BS.flatten().nonzero().flatten()
    return starts, torch.cat([starts, starts.new_tensor([begins_BS.numel()])]).diff()


@dataclass(frozen=True, slots=True)
class Bounds:
    """Where the documents of some queries and keys begin, row laid behind row."""

    queries: Tensor
    """[N + 1] int32 on the device: first query of each document, and the number of all; a document may have none."""
    keys: Tensor
    """[N + 1] int32 on the device: first key of each document, and the number of all."""
    most_queries: int
    """Of a document, at least 2: for 1 flash attention takes it that each document has exactly one."""
    most_keys: int


@dataclass(frozen=True, slots=True)
class SinkPlaces:
    """Where keys lie when each document begins with one more: a sink of its own."""

    bounds: Bounds
    keys: Tensor
    """[B * Sk] int64 on the device: new place of each key."""
    sinks: Tensor
    """[N] int64 on the device: place of each document's sink."""


class Packed:
    """The documents of some consecutive queries and of all keys up to the last of them."""

    def __init__(self, document_ids_BS: Tensor, begin: int, device: torch.device) -> None:
        """Know them; nothing is computed yet.

        Args:
            document_ids_BS: [B, Sk] on the host, not falling in a row.
            begin: first position that is a query, up to the last one.
            device: where the results go.
        """
        self._ids_BS, self._begin, self._device = document_ids_BS, begin, device
        self._masks: dict[int | None, Tensor] = {}
        self._bounds: Bounds | None = None
        self._sinks: SinkPlaces | None = None

    def mask(self, window: int | None) -> Tensor:
        """Say which keys each query sees.

        Args:
            window: positions that a query looks back, itself included; None is all of its document.

        Returns:
            [B, 1, Sq, Sk] bool.
        """
        if window not in self._masks:
            ids_BS = self._sent(self._ids_BS)
            key = torch.arange(ids_BS.shape[1], device=self._device)
            query = key[self._begin :].unsqueeze(1)
            seen = key <= query if window is None else (key <= query) & (key > query - window)
            same = ids_BS[:, self._begin :].unsqueeze(2) == ids_BS.unsqueeze(1)
            self._masks[window] = (same & seen).unsqueeze(1)
        return self._masks[window]

    def bounds(self) -> Bounds:
        """Give where documents begin among queries and keys."""
        if self._bounds is None:
            starts, lengths = document_bounds(self._ids_BS)
            positions = self._ids_BS.shape[1]
            first = starts % positions
            queries = (first + lengths - first.clamp(min=self._begin)).clamp(min=0)
            self._bounds = self._on_device(queries, lengths)
        return self._bounds

    def sink_places(self) -> SinkPlaces:
        """Give where keys lie when each document begins with a sink."""
        if self._sinks is None:
            starts, lengths = document_bounds(self._ids_BS)
            number = torch.arange(len(starts))
            keys = torch.arange(self._ids_BS.numel()) + torch.repeat_interleave(number + 1, lengths)
            plain = self.bounds()
            more = torch.arange(len(plain.keys), dtype=torch.int32)
            bounds = Bounds(plain.queries, plain.keys + self._sent(more), plain.most_queries, plain.most_keys + 1)
            self._sinks = SinkPlaces(bounds, self._sent(keys), self._sent(starts + number))
        return self._sinks

    def _on_device(self, queries: Tensor, keys: Tensor) -> Bounds:
        sums = [torch.cat([x.new_zeros(1), x.cumsum(0)]).to(torch.int32) for x in (queries, keys)]
        return Bounds(self._sent(sums[0]), self._sent(sums[1]), max(2, int(queries.max())), int(keys.max()))

    def _sent(self, x: Tensor) -> Tensor:
        if self._device.type == "cuda":
            x = x.pin_memory()  # else the copy waits for the device
        return x.to(self._device, non_blocking=True)


class Documents:
    """The documents of a micro-batch: a position attends to those of its own alone."""

    def __init__(self, document_ids_BS: Tensor, device: torch.device) -> None:
        """Know them.

        Args:
            document_ids_BS: [B, S] as in runtime.data.batch.Batch; on the host, or it is fetched from the device.
            device: where attention computes.
        """
        self._ids_BS, self._device = document_ids_BS.cpu(), device
        self._parts: dict[tuple[int, int], Packed] = {}

    def part(self, begin: int, end: int) -> Packed:
        """Give the documents for queries at positions `begin` to `end` and keys from 0 to `end`."""
        if (begin, end) not in self._parts:
            self._parts[begin, end] = Packed(self._ids_BS[:, :end], begin, self._device)
        return self._parts[begin, end]
