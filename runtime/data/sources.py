"""From the paths that a run names to opened token files: text is tokenized on first use and kept."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import xxhash

from runtime.data.chat import CHAT_FORMAT, ChatSpec, chat_spec, read_template
from runtime.data.config import MOCK, DataConfig
from runtime.data.errors import DataError
from runtime.data.indexed import TokenFile, open_tokens
from runtime.data.joined import Prepared
from runtime.data.kinds import Kind
from runtime.data.listing import Listing, list_files
from runtime.data.mock import mock_tokens
from runtime.data.prepare import FORMAT, PrepareOptions, Report, Spec, prepare_once, quiet, read_prepared
from runtime.data.token_bytes import token_bytes
from runtime.data.tokenizer import Tokenizer, digest_files, encoder_spec, load_tokenizer

_LONGEST_SIGN = 4
"""Bytes of a sign in UTF-8, each of which may be a token."""


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
                    left_out += _left_out(prepared, conversations=self._config.finetuning)
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

    def decode(self, ids: Sequence[int]) -> list[str]:
        """Give the text that each token adds, special tokens included; a sign of several tokens is given with the last."""
        decode = cast(Any, self._load()).decode
        texts: list[str] = []
        before: list[int] = []
        waiting: list[int] = []
        for token in ids:
            waiting.append(token)
            whole, known = str(decode([*before, *waiting])), str(decode(before)) if before else ""
            if whole.endswith("\ufffd") and len(waiting) < _LONGEST_SIGN:
                texts.append("")
                continue
            texts.append(whole[len(known) :] if whole.startswith(known) else str(decode(waiting)))
            before, waiting = [token], []
        if waiting:
            texts[-1] = str(decode(waiting))
        return texts

    def _listing(self, path: str) -> Listing:
        if path not in self._listings:
            listing = list_files(path)
            if self._config.finetuning:
                _check_conversations(path, listing)
            self._listings[path] = listing
        return self._listings[path]

    def _load(self) -> Tokenizer:
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self._tokenizer_path)
        return self._tokenizer

    def _make_spec(self) -> Spec:
        tokenizer, config = self._load(), self._config
        self._check_size(len(tokenizer))
        if config.finetuning:
            return self._chat_spec(tokenizer)
        return encoder_spec(tokenizer, self._tokenizer_path, append_eod=config.append_eod)

    def _chat_spec(self, tokenizer: Tokenizer) -> ChatSpec:
        config = self._config
        return chat_spec(
            tokenizer,
            self._tokenizer_path,
            template=config.chat_template,
            turns=config.assistant_turns,
            plain_prompts=config.plain_prompts,
            append_eod=config.append_eod,
        )

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
        kind: tuple[object, ...] = (FORMAT, config.text_key, config.append_eod)
        if config.finetuning:
            template = read_template(config.chat_template) if config.chat_template is not None else None
            kind = (FORMAT, CHAT_FORMAT, config.append_eod, template, config.assistant_turns, config.plain_prompts)
        digest = xxhash.xxh3_128(repr(kind).encode())
        own_template = config.finetuning and config.chat_template is None
        digest.update(digest_files(self._tokenizer_path, templates=own_template).encode())
        for file in self._listing(path).files:
            if file.kind is not Kind.TOKENS:
                stat = file.path.stat()
                digest.update(f"{file.path.resolve()} {stat.st_size} {stat.st_mtime_ns}\n".encode())
        return self.cache / f"{digest.hexdigest()}.bin"


def _check_conversations(path: str, listing: Listing) -> None:
    """Refuse files that hold no records, before others of the listing are read for hours."""
    for file in listing.files:
        if file.kind in (Kind.TOKENS, Kind.TEXT):
            raise DataError(
                f"{file.path}: is {file.kind.value}, which holds no conversations (--finetune-data {path}); give JSON Lines, "
                "JSON, Parquet or Arrow, or train on it with --data-path"
            )


def _left_out(prepared: Prepared, *, conversations: bool) -> list[str]:
    found = []
    if prepared.bad:
        found.append(f"{prepared.bad} bad lines (the first: {prepared.messages[0]})")
    if prepared.empty:
        what = "conversations in which the assistant says nothing" if conversations else "documents without text"
        found.append(f"{prepared.empty} {what}")
    if prepared.eod is None and not conversations:
        found.append(
            "no mark between documents: the tokenizer has no end-of-sequence token, or --no-append-eod is given"
        )
    return found
