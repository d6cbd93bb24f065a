"""Rows of whole conversations: as many in each as fit, none cut in two.

Which conversations share a row is settled once, from the seed; an epoch takes the rows in an order of its own. So the
position in the data is again one number, and an epoch has the same number of rows each time.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import xxhash

from runtime.data.errors import DataError
from runtime.data.packing import Documents, digest_samples, permutation, with_begins
from runtime.data.stream import Ids, TokenStream

_KEPT_EPOCHS = 3
_PADDING = 0


@dataclass(frozen=True, slots=True)
class RowReport:
    """What conversations and rows there are."""

    conversations: int
    """Those in the rows."""
    tokens: int
    """Theirs, without what was cut."""
    trained: int
    """Those that are learned."""
    rows: int
    capacity: int
    """Tokens that fit into a row."""
    cut: int
    """Conversations longer than a row, of which the first tokens are kept."""
    cut_tokens: int
    """What was cut of them."""
    dropped: int
    """Conversations longer than a row, left out (--drop-long)."""
    untrained: int
    """Conversations left out because all that would be learned of them was cut."""

    @property
    def padding(self) -> float:
        """Share of the rows that holds no conversation."""
        return 1 - self.tokens / (self.rows * self.capacity)

    def plus(self, other: RowReport) -> RowReport:
        """Add those of another set of rows as long."""
        names = [name for name in self.__slots__ if name != "capacity"]
        sums = {name: getattr(self, name) + getattr(other, name) for name in names}
        return RowReport(**sums, capacity=self.capacity)


class ConversationRows:
    """Samples of seq_length + 1 marked ids (see runtime.data.chat): whole conversations, and padding behind them."""

    def __init__(
        self,
        stream: TokenStream,
        documents: Documents,
        *,
        seq_length: int,
        seed: int,
        shuffle: bool,
        drop_long: bool,
    ) -> None:
        """Lay conversations into rows.

        Args:
            stream: has the marked ids.
            documents: which of its conversations.
            seq_length: tokens of a sample; one more fits, which is only a label.
            seed: selects which conversations share a row, and the order of rows.
            shuffle: whether each epoch has an order of rows of its own; else it is always the same.
            drop_long: leave out conversations that don't fit into a row, instead of cutting them.

        Raises:
            DataError: none is left.
        """
        self._stream, self._seed, self._shuffle = stream, seed, shuffle
        self._settings = (seq_length, seed, shuffle, drop_long)
        capacity = seq_length + 1
        fits = documents.lengths <= capacity
        lengths = np.minimum(documents.lengths, capacity)
        trained = stream.count_marks(documents.starts, documents.starts + lengths)
        kept = (trained > 0) & (fits | (not drop_long))
        self._starts, self._lengths = documents.starts[kept], lengths[kept]
        self._report = RowReport(
            conversations=int(kept.sum()),
            tokens=int(self._lengths.sum()),
            trained=int(trained[kept].sum()),
            rows=0,
            capacity=capacity,
            cut=int((kept & ~fits).sum()),
            cut_tokens=int((documents.lengths - lengths)[kept].sum()),
            dropped=int((~fits).sum()) if drop_long else 0,
            untrained=int(((trained == 0) & (fits | (not drop_long))).sum()),
        )
        if not len(self._starts):
            raise DataError(
                f"{stream.files[0].path}: none of the {len(fits)} conversations has a learned token within "
                f"--seq-length {seq_length}{' (--drop-long leaves out those that are longer)' if drop_long else ''}"
            )
        row_of = pack(self._lengths, capacity, permutation(len(self._starts), seed, 2))
        self._in_rows = np.argsort(row_of, kind="stable")
        self._row_ends = np.cumsum(np.bincount(row_of))
        self._orders: dict[int, Ids] = {}
        self._lock = threading.Lock()
        self.num_samples = len(self._row_ends)
        self.num_tokens, self.num_documents = self._report.tokens, self._report.conversations

    @property
    def report(self) -> RowReport:
        """What conversations and rows there are."""
        values = {name: getattr(self._report, name) for name in self._report.__slots__}
        return RowReport(**values | {"rows": self.num_samples})

    def epochs(self, count: int) -> float:
        """Give how many passes over the data `count` samples are."""
        return count / self.num_samples

    def sample(self, index: int) -> Ids:
        """Give the marked ids [seq_length + 1] of a row."""
        return self.sample_with_begins(index)[0]

    def sample_with_begins(self, index: int) -> tuple[Ids, Sequence[int]]:
        """Give the marked ids of a row, and the places in it where conversations and the padding begin."""
        epoch, place = divmod(index, self.num_samples)
        row = int(self._order(epoch if self._shuffle else 0)[place])
        members = self._in_rows[self._row_ends[row - 1] if row else 0 : self._row_ends[row]]
        starts, lengths = self._starts[members].tolist(), self._lengths[members].tolist()
        spans = [(start, start + length, True) for start, length in zip(starts, lengths, strict=True)]
        ids, begins = with_begins(self._stream, spans)
        missing = self._report.capacity - len(ids)
        if missing:
            begins = [*begins, len(ids)]
            ids = np.concatenate([ids, np.full(missing, _PADDING, np.int64)])
        return ids, begins

    def digest(self) -> str:
        """Name the rows: equal for the same conversations in the same order."""
        lengths = xxhash.xxh3_128(np.ascontiguousarray(self._lengths).data).hexdigest()
        return digest_samples(self, repr(self._settings) + str(lengths))

    def _order(self, epoch: int) -> Ids:
        with self._lock:
            if epoch not in self._orders:
                while len(self._orders) >= _KEPT_EPOCHS:
                    del self._orders[min(self._orders, key=lambda kept: -abs(kept - epoch))]
                self._orders[epoch] = permutation(self.num_samples, self._seed, epoch, 3)
            return self._orders[epoch]


def pack(lengths: Ids, capacity: int, order: Ids) -> npt.NDArray[np.int64]:
    """Choose a row for each document: the longest first, each into the fullest row that has room for it.

    Args:
        lengths: [D] tokens of each, at most `capacity`.
        capacity: tokens that fit into a row.
        order: [D] permutation: in which order documents of one length come.

    Returns:
        [D] number of the row of each, from 0.

    Source: best-fit decreasing; D. S. Johnson, Near-optimal bin packing algorithms, 1973.
    """
    row_of = np.empty(len(lengths), np.int64)
    by_length = order[np.argsort(-lengths[order], kind="stable")]
    rows: list[list[int]] = [[] for _ in range(capacity + 1)]
    """By the room that is left: rows."""
    some = 0
    """A bit for each room that some row has."""
    count = 0
    for document, length in zip(by_length.tolist(), lengths[by_length].tolist(), strict=True):
        fitting = some >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = rows[room].pop()
            if not rows[room]:
                some &= ~(1 << room)
        else:
            room, row, count = capacity, count, count + 1
        row_of[document] = row
        rows[room - length].append(row)
        some |= 1 << (room - length)
    return row_of
