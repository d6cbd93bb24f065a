"""Documents that share the rows of a batch, and in the forms in which attention takes them.

Everything is derived from document numbers on the host, so that no kernel is waited for, once for all layers.

Legend: B rows, S positions, Sq queries, Sk keys, N documents.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_MIN_ROOM = 128
"""Positions that a flash kernel computes at a time: room for fewer saves nothing."""


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
class Room:
    """For which documents a captured micro-batch has room; powers of two, so that few captures serve all."""

    documents: int
    """So many; what is missing are documents without positions."""
    longest: int
    """Positions of each, at most."""


class Packed:
    """The documents of some consecutive queries and of all keys up to the last of them."""

    def __init__(self, document_ids_BS: Tensor, begin: int, device: torch.device, room: Room | None) -> None:
        """Know them; nothing is computed yet.

        Args:
            document_ids_BS: [B, Sk] on the host, not falling in a row.
            begin: first position that is a query, up to the last one.
            device: where the results go.
            room: what the results have room for; None: for these.
        """
        self._ids_BS, self._begin, self._device, self._room = document_ids_BS, begin, device, room
        self._masks: dict[int | None, Tensor] = {}
        self._bounds: Bounds | None = None

    def mask(self, window: int | None) -> Tensor:
        """Say which keys each query sees.

        Args:
            window: positions that a query looks back, itself included; None is all of its document.

        Returns:
            [B, 1, Sq, Sk] bool.
        """
        if window not in self._masks:
            self._masks[window] = self._make_mask(window)
        return self._masks[window]

    def _make_mask(self, window: int | None) -> Tensor:
        ids_BS = self._sent(self._ids_BS)
        key = torch.arange(ids_BS.shape[1], device=self._device)
        query = key[self._begin :].unsqueeze(1)
        seen = key <= query if window is None else (key <= query) & (key > query - window)
        same = ids_BS[:, self._begin :].unsqueeze(2) == ids_BS.unsqueeze(1)
        return (same & seen).unsqueeze(1)

    def bounds(self) -> Bounds:
        """Give where documents begin among queries and keys."""
        if self._bounds is None:
            self._bounds = self._make_bounds()
        return self._bounds

    def _make_bounds(self) -> Bounds:
        starts, lengths = self._documents()
        positions = self._ids_BS.shape[1]
        first = starts % positions
        queries = (first + lengths - first.clamp(min=self._begin)).clamp(min=0)
        return self._on_device(queries, lengths)

    def _documents(self) -> tuple[Tensor, Tensor]:
        """Where each begins, and its length; those that the room is kept for begin at the end."""
        starts, lengths = document_bounds(self._ids_BS)
        missing = 0 if self._room is None else self._room.documents - len(starts)
        return F.pad(starts, (0, missing), value=self._ids_BS.numel()), F.pad(lengths, (0, missing))

    def take(self, document_ids_BS: Tensor) -> None:
        """Go over to other documents that there is room for: what has been given out holds theirs from now on.

        Args:
            document_ids_BS: as at first.
        """
        self._ids_BS = document_ids_BS
        for window, mask in self._masks.items():
            mask.copy_(self._make_mask(window))
        if self._bounds is not None:
            new = self._make_bounds()
            self._bounds.queries.copy_(new.queries)
            self._bounds.keys.copy_(new.keys)

    def _on_device(self, queries: Tensor, keys: Tensor) -> Bounds:
        sums = [torch.cat([x.new_zeros(1), x.cumsum(0)]).to(torch.int32) for x in (queries, keys)]
        longest = (int(queries.max()), int(keys.max())) if self._room is None else 2 * (self._room.longest,)
        return Bounds(self._sent(sums[0]), self._sent(sums[1]), max(2, longest[0]), longest[1])

    def _sent(self, x: Tensor) -> Tensor:
        if self._device.type == "cuda":
            x = x.pin_memory()  # else the copy waits for the device
        return x.to(self._device, non_blocking=True)


class Documents:
    """The documents of a micro-batch: a position attends to those of its own alone."""

    def __init__(self, document_ids_BS: Tensor, device: torch.device, room: Room | None = None) -> None:
        """Know them.

        Args:
            document_ids_BS: [B, S] as in runtime.data.batch.Batch; on the host, or it is fetched from the device.
            device: where attention computes.
            room: what tensors have room for, so that they can go over to other documents; None: for these.
        """
        self._ids_BS, self._device, self._room = document_ids_BS.cpu(), device, room
        self._parts: dict[tuple[int, int], Packed] = {}

    def part(self, begin: int, end: int) -> Packed:
        """Give the documents for queries at positions `begin` to `end` and keys from 0 to `end`."""
        if (begin, end) not in self._parts:
            self._parts[begin, end] = Packed(self._ids_BS[:, :end], begin, self._device, self._room)
        return self._parts[begin, end]

    def room(self) -> Room:
        """The least room that these fit into."""
        lengths = document_bounds(self._ids_BS)[1]
        return Room(_power_of_two(len(lengths)), max(_MIN_ROOM, _power_of_two(int(lengths.max()))))

    def with_room(self, room: Room) -> Documents:
        """The same, in tensors that have room for others."""
        return Documents(self._ids_BS, self._device, room)

    def take(self, other: Documents) -> None:
        """Go over to other documents that there is room for: what has been given out holds theirs from now on."""
        self._ids_BS = other._ids_BS
        for (_, end), part in self._parts.items():
            part.take(self._ids_BS[:, :end])


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()
