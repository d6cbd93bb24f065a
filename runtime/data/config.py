"""Where a run's tokens come from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from runtime.errors import require
from runtime.flag import flag


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Where a run's tokens come from."""

    paths: tuple[Path, ...] = flag((), "--data", "--data-path", metavar="PATH")
    """Files or folders that --split divides: text, .jsonl, .bin (bare ids, or with .idx), or folders of these."""
    split: tuple[float, ...] = flag((969.0, 30.0, 1.0), metavar="TRAIN,VALID,TEST")
    """Relative sizes of the train, valid and test parts, in tokens, in this order."""
    train_paths: tuple[Path, ...] = flag((), "--train-data-path", metavar="PATH")
    """Files or folders to train on, instead of --data and --split."""
    valid_paths: tuple[Path, ...] = flag((), "--valid-data-path", metavar="PATH")
    """Files or folders to evaluate on during training, instead of --data and --split."""
    test_paths: tuple[Path, ...] = flag((), "--test-data-path", metavar="PATH")
    """Files or folders to evaluate on at the end, instead of --data and --split."""
    mock: bool = flag(False, "--mock-data")
    """Train on made-up tokens, to try a layout and its speed without data."""
    tokenizer: Path | None = flag(None, "--tokenizer-model")
    """Folder or file of the tokenizer; by default the checkpoint's own."""
    cache: Path | None = flag(None, "--data-cache-path")
    """Folder for tokenized text; by default ~/.cache/moeconv."""
    seq_length: int
    seed: int = 1234
    vocab_size: int

    def __post_init__(self) -> None:
        require(
            1 <= len(self.split) <= 3 and min(self.split) >= 0 and sum(self.split) > 0,
            f"--split is {','.join(map(str, self.split))}; expected up to three numbers (train,valid,test), not all 0",
        )
        require(
            not (self.mock and (self.paths or any(self.split_paths))),
            "--mock-data excludes --data and --train-data-path, --valid-data-path, --test-data-path: give one",
        )
        require(
            not (self.paths and any(self.split_paths)),
            "--data excludes --train-data-path, --valid-data-path and --test-data-path: give one or the other",
        )
        require(
            bool(self.mock or self.paths or any(self.split_paths)),
            "no data: name files or folders with --data (or --mock-data to try a layout)",
        )

    @property
    def split_paths(self) -> tuple[tuple[Path, ...], ...]:
        """Files or folders of the train, valid and test parts, where they are not shares of `paths`."""
        return self.train_paths, self.valid_paths, self.test_paths
