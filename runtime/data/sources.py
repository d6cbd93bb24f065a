"""From the paths that a run names to opened token files: text is tokenized on first use and kept."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from runtime.data.config import MOCK, DataConfig
from runtime.data.errors import DataError
from runtime.data.indexed import TokenFile, open_tokens
from runtime.data.joined import Prepared
from runtime.data.kinds import Kind
from runtime.data.listing import Listing, list_files
from runtime.data.mock import mock_tokens
from runtime.data.prepare import FORMAT, PrepareOptions, Report, prepare_once, quiet, read_prepared
from runtime.data.token_bytes import token_bytes
from runtime.data.tokenizer import EncoderSpec, Tokenizer, digest_files, encoder_spec, load_tokenizer


def default_cache() -> Path:
    """Give the folder for tokenized text: moeconv/tokens under XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moeconv" / "tokens"


@dataclass(frozen=True, slots=True)
class Source:
    """What one path of a run holds."""

    path: str
    files: tuple[TokenFile, ...]
    """All text in one, in the order of the listing, then each .bin file."""
    left_out: tuple[str, ...]
    """What is not read, in words."""


class Sources:
    """The paths of a run, each opened once."""

    def __init__(self, config: DataConfig, checkpoint: Path) -> None:
        """Know where data and tokenizer are; nothing is read yet.

        Args:
            config: the settings.
            checkpoint: has the tokenizer unless the settings name another.
        """
        self._config = config
        self._tokenizer_path = config.tokenizer_model or checkpoint
        self.cache = config.data_cache_path or default_cache()
        self._tokenizer: Tokenizer | None = None
        self._listings: dict[str, Listing] = {}
        self._opened: dict[str, Source] = {}

    def prepare(self, path: str, report: Report = quiet) -> None:
        """Tokenize a path's text unless the cache has it; where other processes do so already, wait for them.

        Args:
            path: as `list_files` takes it.
            report: told about once a second how far it is.

        Raises:
            DataError: data can't be read; names the file and line.
        """
        text = [] if path == MOCK else [file for file in self._listing(path).files if file.kind is not Kind.TOKENS]
        if text:
            try:
                self.cache.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise DataError(
                    f"{self.cache}: can't keep tokens there ({error.strerror}); name a folder with --data-cache-path"
                ) from None
            prepare_once(text, self._target(path), self._make_spec, self._options(), report)

    def open(self, path: str) -> Source:
        """Open a path's tokens; its text is tokenized first where it isn't yet.

        Args:
            path: as `list_files` takes it.

        Raises:
            DataError: data can't be read, or the tokenizer is larger than the model.
        """
        if path == MOCK and path not in self._opened:
            self._opened[path] = Source(path, (mock_tokens(self._config.vocab_size),), ())
        if path not in self._opened:
            self.prepare(path)
            listing = self._listing(path)
            files, left_out = [], list(listing.left_out)
            if any(file.kind is not Kind.TOKENS for file in listing.files):
                target = self._target(path)
                prepared = read_prepared(target)
                if prepared is not None:
                    self._check_size(prepared.vocab_size)
                    left_out += _left_out(prepared)
                files.append(open_tokens(target))
            dtype = self._config.bare_dtype
            files += [open_tokens(file.path, dtype) for file in listing.files if file.kind is Kind.TOKENS]
            self._opened[path] = Source(path, tuple(files), tuple(left_out))
        return self._opened[path]

    def eod(self) -> int:
        """Give the end-of-document token.

        Raises:
            DataError: the tokenizer has none.
        """
        if self._config.eod_token_id is not None:
            return self._config.eod_token_id
        eod = self._load().eos_token_id
        if eod is None:
            raise DataError(
                f"{self._tokenizer_path}: the tokenizer has no end-of-sequence token; name one with --eod-token-id"
            )
        return eod

    def token_bytes(self) -> npt.NDArray[np.int64] | None:
        """Give the bytes of text that each token stands for; None where there is no tokenizer, or it doesn't tell."""
        try:
            return token_bytes(self._load())
        except DataError:
            return None

    def _listing(self, path: str) -> Listing:
        if path not in self._listings:
            self._listings[path] = list_files(path)
        return self._listings[path]

    def _load(self) -> Tokenizer:
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self._tokenizer_path)
        return self._tokenizer

    def _make_spec(self) -> EncoderSpec:
        tokenizer = self._load()
        self._check_size(len(tokenizer))
        return encoder_spec(tokenizer, self._tokenizer_path, append_eod=self._config.append_eod)

    def _check_size(self, size: int) -> None:
        if size > self._config.vocab_size:
            raise DataError(
                f"the tokenizer {self._tokenizer_path} has {size} tokens, the model {self._config.vocab_size}; "
                "name the model's own with --tokenizer-model"
            )

    def _options(self) -> PrepareOptions:
        config = self._config
        return PrepareOptions(
            text_key=config.text_key, skip_bad_lines=config.skip_bad_lines, workers=config.tokenize_workers
        )

    def _target(self, path: str) -> Path:
        """The token file of a path's text; its name changes with the tokenizer, and with each file's path, size or time."""
        config = self._config
        digest = xxhash.xxh3_128(repr((FORMAT, config.text_key, config.append_eod)).encode())
        digest.update(digest_files(self._tokenizer_path).encode())
        for file in self._listing(path).files:
            if file.kind is not Kind.TOKENS:
                stat = file.path.stat()
                digest.update(f"{file.path.resolve()} {stat.st_size} {stat.st_mtime_ns}\n".encode())
        return self.cache / f"{digest.hexdigest()}.bin"


def _left_out(prepared: Prepared) -> list[str]:
    found = []
    if prepared.bad:
        found.append(f"{prepared.bad} bad lines (the first: {prepared.messages[0]})")
    if prepared.empty:
        found.append(f"{prepared.empty} documents without text")
    if prepared.eod is None:
        found.append(
            "no mark between documents: the tokenizer has no end-of-sequence token, or --no-append-eod is given"
        )
    return found
