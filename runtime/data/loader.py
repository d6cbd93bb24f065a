"""From data files to the micro-batches of a rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from runtime.data.batch import IGNORED_LABEL, Batch
from runtime.data.blend import Blend
from runtime.data.blended import BlendedSamples, ExhaustiveSamples
from runtime.data.config import DEFAULT_SPLIT, SPLITS, DataConfig
from runtime.data.errors import DataError
from runtime.data.megatron_order import MegatronSamples
from runtime.data.packing import Documents, PackedSamples, Samples, no_documents, split_bounds
from runtime.data.prepare import Report, quiet
from runtime.data.rows import ConversationRows
from runtime.data.sources import Source, Sources
from runtime.data.stream import TokenStream
from runtime.errors import require


class DataSource:
    """The samples of each split; a split is opened when it is first asked for."""

    def __init__(self, config: DataConfig, checkpoint: Path, sizes: Sequence[int | None] = (None, None, None)) -> None:
        """Know what data there are; nothing is read yet.

        Args:
            config: the settings.
            checkpoint: has the tokenizer unless the settings name another.
            sizes: samples of train, valid and test that the whole run takes, for --data-order megatron only.
        """
        self.config = config
        self._sources = Sources(config, checkpoint)
        self._blends = config.blends()
        self._sizes = tuple(sizes)
        self._samples: dict[tuple[str, int | None], Samples] = {}

    def blend(self, split: str) -> Blend | None:
        """Give the paths and weights of a split; None where it has no data."""
        return self._blends[SPLITS.index(split)]

    def prepare(self, report: Report = quiet) -> None:
        """Tokenize all text that isn't yet; takes as long as it takes, and is no collective: ranks wait at a lock file.

        Args:
            report: told about once a second how far it is.

        Raises:
            DataError: data can't be read; names the file and line. What is done is kept.
        """
        for path in dict.fromkeys(path for blend in self._blends if blend for path in blend.paths):
            self._sources.prepare(path, report)

    def has(self, split: str) -> bool:
        """Say whether a split has documents.

        Args:
            split: train, valid or test.
        """
        blend = self.blend(split)
        return blend is not None and all(self._has_documents(path, split) for path in blend.paths)

    def _has_documents(self, path: str, split: str) -> bool:
        stream = self._stream([self._sources.open(path)])
        return len(self._part(stream, 0, len(stream.files), split).starts) > 0

    def samples(self, split: str) -> Samples:
        """Open the samples of a split; text is tokenized unless the cache has it.

        Args:
            split: train (shuffled), valid or test (in the order of the files, but in Megatron's with --data-order).

        Returns:
            The samples.

        Raises:
            DataError: data can't be read, or the split has no documents.
            ConfigError: the split has no data.
        """
        key = (split, None)
        if key not in self._samples:
            blend = self.blend(split)
            require(blend is not None, f"the {split} split has no data: name some with --{split}-data-path")
            assert blend is not None
            self._samples[key] = self._blended(blend, split)
        return self._samples[key]

    def sets(self, split: str) -> list[tuple[str, Samples]]:
        """Open the sets of a split that have a loss of their own.

        Args:
            split: train, valid or test.

        Returns:
            Each set's name and samples: one by the split's name, or with --multiple-validation-sets one for each path.

        Raises:
            DataError, ConfigError: as `samples`.
        """
        blend = self.blend(split)
        if split != "valid" or not self.config.multiple_validation_sets or blend is None or len(blend.paths) == 1:
            return [(split, self.samples(split))]
        names = [Path(path).name or path for path in blend.paths]
        found = []
        for place, path in enumerate(blend.paths):
            if (split, place) not in self._samples:
                self._samples[split, place] = self._of([path], split, self._sizes[SPLITS.index(split)])
            name = names[place] if names.count(names[place]) == 1 else path
            found.append((name, self._samples[split, place]))
        return found

    def _blended(self, blend: Blend, split: str) -> Samples:
        size = self._sizes[SPLITS.index(split)]
        megatron = self.config.data_order == "megatron"
        if blend.weights is None:
            if not megatron or len(blend.paths) == 1:
                return self._of(blend.paths, split, size)
            return ExhaustiveSamples([self._of([path], split, None) for path in blend.paths], size)
        if len(blend.paths) == 1 and (not megatron or self.config.own_splits):
            return self._of(blend.paths, split, size)
        pairs = list(zip(blend.paths, blend.shares, strict=True))
        return BlendedSamples(
            [self._of([path], split, self._surplus(size, share)) for path, share in pairs], blend.shares
        )

    def _surplus(self, size: int | None, share: float) -> int | None:
        """Samples that Megatron makes of one source of a blend.

        Source:
            https://github.com/NVIDIA/Megatron-LM/blob/d98e8a6/megatron/core/datasets/blended_megatron_dataset_builder.py
            (_get_size_per_split_per_dataset), mid_level_dataset_surplus
        """
        require(
            self.config.data_order != "megatron" or size is not None,
            "--data-order megatron with weights needs the length of the run: --train-iters, and --eval-iters of 1 or more",
        )
        return None if size is None else int(np.ceil(np.ceil(size * share) * (1 + 0.005)))

    def _stream(self, sources: Sequence[Source]) -> TokenStream:
        files = [file for source in sources for file in source.files]
        return TokenStream(
            files, self.config.vocab_size * (2 if self.config.finetuning else 1)
        )  # marked ids are twice as many

    def _of(self, paths: Sequence[str], split: str, size: int | None) -> Samples:
        """Samples of a split's documents of some paths, which make one row."""
        sources = [self._sources.open(path) for path in paths]
        stream = self._stream(sources)
        parts, first = [], 0
        for source in sources:
            last = first + len(source.files)
            part = self._part(stream, first, last, split)
            if len(paths) == 1 and not len(part.starts):
                total = len(stream.document_ends(first, last))
                raise self._nothing(source.path, split, total)
            parts.append(part)
            first = last
        documents = Documents(
            np.concatenate([part.starts for part in parts]), np.concatenate([part.lengths for part in parts])
        )
        if not len(documents.starts):
            total = len(stream.document_ends(0, len(stream.files)))
            raise self._nothing(", ".join(paths), split, total)
        length, seed = self.config.seq_length, self.config.seed
        if self.config.finetuning:
            options = {"shuffle": split == "train", "drop_long": self.config.drop_long}
            return ConversationRows(stream, documents, seq_length=length, seed=seed, **options)
        if self.config.data_order == "megatron":
            return MegatronSamples(stream, documents, size, seq_length=length, seed=seed)
        cache = self._sources.cache
        return PackedSamples(stream, documents, seq_length=length, seed=seed, shuffle=split == "train", cache=cache)

    def _nothing(self, where: str, split: str, total: int) -> DataError:
        config = self.config
        return no_documents(where, split, total, config.split or DEFAULT_SPLIT, conversations=config.finetuning)

    def _part(self, stream: TokenStream, first: int, last: int, split: str) -> Documents:
        """The documents of some files that belong to a split."""
        ends = stream.document_ends(first, last, sequences=self.config.data_order == "megatron")
        begin, behind = stream.begin(first), stream.begin(last)
        starts = np.concatenate([[begin], ends[:-1]]).astype(np.int64)
        if self.config.own_splits:
            return Documents(starts, ends - starts)
        weights = (*(self.config.split or DEFAULT_SPLIT), 0.0, 0.0)[:3]
        if len(ends) == 1 and not self.config.finetuning:  # there are no documents to share out
            low, high = split_bounds(behind - begin, weights)[SPLITS.index(split)]
            return Documents(np.array([begin + low] * (high > low)), np.array([high - low] * (high > low)))
        low, high = split_bounds(len(ends), weights)[SPLITS.index(split)]
        return Documents(starts[low:high], ends[low:high] - starts[low:high])

    def loader(self, samples: Samples, *, micro_batch_size: int = 1, dp_rank: int = 0, dp_size: int = 1) -> Loader:
        """Make what deals samples out as the settings say.

        Args:
            samples: of a split.
            micro_batch_size: samples of a micro-batch.
            dp_rank: the data-parallel rank.
            dp_size: the number of them.
        """
        config = self.config
        return Loader(
            samples=samples,
            micro_batch_size=micro_batch_size,
            dp_rank=dp_rank,
            dp_size=dp_size,
            eod=self.eod(),
            marked=config.finetuning,
            reset_position_ids=config.restarts_positions,
            reset_attention_mask=config.separates_documents,
            eod_mask_loss=config.eod_mask_loss,
        )

    def decode(self, ids: Sequence[int]) -> list[str]:
        """Give the text of each token by itself."""
        return self._sources.decode(ids)

    def left_out(self) -> list[str]:
        """Say what of the data that are open is not read, each with the reason."""
        paths = dict.fromkeys(path for blend in self._blends if blend for path in blend.paths)
        return [what for path in paths for what in self._sources.open(path).left_out]

    def eod(self) -> int | None:
        """Give the end-of-document token where samples are made with knowledge of it; None where they aren't.

        Raises:
            DataError: the tokenizer has none.
        """
        return self._sources.eod() if self.config.needs_eod else None

    def token_bytes(self) -> torch.Tensor | None:
        """Give the bytes of text that each token stands for, [V] int64; None where no tokenizer tells."""
        if self.config.mock_data:
            return None
        found = self._sources.token_bytes()
        if found is None or len(found) > self.config.vocab_size:
            return None
        return torch.from_numpy(np.pad(found, (0, self.config.vocab_size - len(found))))

    def fingerprint(self) -> str:
        """Name the training samples: equal for runs that see the same tokens in the same order."""
        return self.samples("train").digest()


@dataclass(frozen=True, kw_only=True, slots=True)
class Loader:
    """Deals samples out to the data-parallel ranks; only `first` says where in the data a batch is."""

    samples: Samples
    micro_batch_size: int
    dp_rank: int
    dp_size: int
    eod: int | None = None
    """End-of-document token, for the three flags below."""
    marked: bool = False
    """Samples are of marked ids (runtime.data.chat): only what is marked is a label."""
    reset_position_ids: bool = False
    reset_attention_mask: bool = False
    eod_mask_loss: bool = False

    def global_batch(self, first: int, size: int, limit: int | None = None) -> list[Batch]:
        """Give this rank's micro-batches of one global batch.

        Args:
            first: index of the batch's first sample.
            size: samples of the global batch, a multiple of micro_batch_size * dp_size.
            limit: samples from here on don't count: their labels are ignored. None counts all.

        Returns:
            Micro-batches of micro_batch_size samples, as many on every rank; together the ranks have each sample once.
        """
        one_pass = self.micro_batch_size * self.dp_size
        assert size % one_pass == 0
        begins = range(first + self.dp_rank * self.micro_batch_size, first + size, one_pass)
        return [self._batch(range(begin, begin + self.micro_batch_size), limit) for begin in begins]

    def _batch(self, indices: Sequence[int], limit: int | None) -> Batch:
        wanted = [index if limit is None else index % limit for index in indices]
        resets = self.reset_position_ids or self.reset_attention_mask
        begins_BS: npt.NDArray[np.bool_] | None = None
        if resets:
            found = [self.samples.sample_with_begins(index) for index in wanted]
            rows = np.stack([ids for ids, _ in found])
            begins_BS = self._begins(rows, [places for _, places in found])
        else:
            rows = np.stack([self.samples.sample(index) for index in wanted])
        rows_BS1 = torch.from_numpy(rows >> 1 if self.marked else rows)
        tokens_BS, labels_BS = rows_BS1[:, :-1].contiguous(), rows_BS1[:, 1:].clone()
        if self.marked:
            labels_BS[torch.from_numpy(rows[:, 1:] & 1 == 0)] = IGNORED_LABEL
        if self.eod_mask_loss:
            labels_BS[tokens_BS == self.eod] = IGNORED_LABEL
        if limit is not None:
            labels_BS[[row for row, index in enumerate(indices) if index >= limit]] = IGNORED_LABEL
        positions = (
            torch.from_numpy(_positions(begins_BS)) if begins_BS is not None and self.reset_position_ids else None
        )
        documents = None
        if begins_BS is not None and self.reset_attention_mask:
            documents = torch.from_numpy(np.cumsum(begins_BS, axis=1, dtype=np.int32))
        return Batch(tokens=tokens_BS, labels=labels_BS, position_ids=positions, document_ids=documents)

    def _begins(self, rows: npt.NDArray[np.int64], places: Sequence[Sequence[int]]) -> npt.NDArray[np.bool_]:
        """Mark the inputs that begin a document: by the files' own bounds, and behind each end-of-document token."""
        begins_BS = np.zeros((len(rows), rows.shape[1] - 1), np.bool_)
        for row, found in enumerate(places):
            begins_BS[row, [place for place in found if place < begins_BS.shape[1]]] = True
        if self.eod is not None:
            begins_BS[:, 1:] |= rows[:, :-2] == self.eod
        begins_BS[:, 0] = False
        return begins_BS


def _positions(begins_BS: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Count from 0 in each row, and again from each mark."""
    places_S = np.arange(begins_BS.shape[1], dtype=np.int64)
    return places_S - np.maximum.accumulate(np.where(begins_BS, places_S, 0), axis=1)
