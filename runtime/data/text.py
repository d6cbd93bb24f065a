"""Text to tokens: plain and JSONL files through the checkpoint's own tokenizer, tokenized once and kept."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, Protocol, cast

import xxhash

from runtime.data.indexed import DataError, TokenFile, open_tokens, token_dtype, write_tokens

JSON_LINES = (".jsonl", ".ndjson")
PLAIN_TEXT = (".txt", ".md", ".rst", ".py")
_TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "config.json",
)
_BATCH = 256
_MAX_CHARACTERS = 1 << 20
_FORMAT = 1


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that is used here."""

    eos_token_id: int | None

    def __call__(self, text: list[str]) -> Any: ...

    def __len__(self) -> int: ...


def load_tokenizer(path: Path) -> Tokenizer:
    """Load a tokenizer without ever running code that comes with it.

    Args:
        path: a folder with tokenizer files (a checkpoint), or a tokenizer.json.

    Returns:
        The tokenizer.

    Raises:
        DataError: there is no tokenizer, or transformers can't load it.
    """
    # Imported here: transformers takes a second to load, and a run whose tokens are kept already doesn't need it.
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        if path.is_file() and path.suffix == ".json":
            make = cast(Callable[..., Tokenizer], PreTrainedTokenizerFast)
            return make(tokenizer_file=str(path))
        folder = path.parent if path.is_file() else path
        return cast(Tokenizer, AutoTokenizer.from_pretrained(folder, trust_remote_code=False))
    except Exception as error:  # transformers and tokenizers raise bare Exceptions for malformed files
        raise DataError(
            f"{path}: no usable tokenizer ({type(error).__name__}: {error}); name one with --tokenizer-model, "
            "or give token files (.bin)"
        ) from error


def list_files(paths: Sequence[Path]) -> list[Path]:
    """List the data files that paths name, folders searched through in the order of names.

    Args:
        paths: files, folders, or Megatron's prefixes (a .bin and .idx pair without its suffix).

    Returns:
        The files, each of a known kind.

    Raises:
        DataError: a path doesn't exist, a folder holds no data, or a file is of an unknown kind.
    """
    files: list[Path] = []
    for path in paths:
        prefixed = path.with_name(path.name + ".bin")
        if path.is_dir():
            found = sorted(f for f in path.rglob("*") if f.is_file() and f.suffix in (*JSON_LINES, *PLAIN_TEXT, ".bin"))
            if not found:
                raise DataError(f"{path}: no .jsonl, text ({', '.join(PLAIN_TEXT)}) or .bin file in this folder")
            files += found
        elif path.is_file():
            files.append(path)
        elif prefixed.is_file():
            files.append(prefixed)
        else:
            raise DataError(f"{path}: no such file or folder, and no {prefixed.name}")
    return files


def open_sources(paths: Sequence[Path], tokenizer_path: Path, vocab_size: int, cache: Path) -> list[TokenFile]:
    """Open data as tokens; text is tokenized on first use and kept in the cache.

    Args:
        paths: files or folders, as `list_files` takes them.
        tokenizer_path: what turns text into ids, as for `load_tokenizer`; token files (.bin) don't need it.
        vocab_size: size of the model's vocabulary.
        cache: folder for tokenized text.

    Returns:
        The token files: all text in one, in the order of the paths, then each .bin file.

    Raises:
        DataError: data can't be read; names the file and line.
    """
    files = list_files(paths)
    text = [file for file in files if file.suffix != ".bin"]
    opened = [open_tokens(file, vocab_size) for file in files if file.suffix == ".bin"]
    if not text:
        return opened
    target = cache / f"{_cache_key(text, tokenizer_path, vocab_size)}.bin"
    if not target.is_file():
        tokenizer = load_tokenizer(tokenizer_path)
        if len(tokenizer) > vocab_size:
            raise DataError(
                f"the tokenizer {tokenizer_path} has {len(tokenizer)} tokens, the model {vocab_size}; "
                "name the model's own with --tokenizer-model"
            )
        try:
            cache.mkdir(parents=True, exist_ok=True)
            if not write_tokens(target, _tokenize(_documents(text), tokenizer), token_dtype(vocab_size)):
                raise DataError(f"{text[0]}: no text in the {len(text)} file(s) given")
        except OSError as error:
            raise DataError(
                f"{cache}: can't keep tokens there ({error.strerror}); name a folder with --data-cache-path"
            ) from None
    return [open_tokens(target, vocab_size), *opened]


def _cache_key(files: Sequence[Path], tokenizer_path: Path, vocab_size: int) -> str:
    """A name that changes with the tokenizer's files, and with each data file's path, size or time."""
    digest = xxhash.xxh3_128(f"{_FORMAT} {vocab_size}\n".encode())
    folder = tokenizer_path.parent if tokenizer_path.is_file() else tokenizer_path
    for pattern in _TOKENIZER_FILES:
        for part in sorted(folder.glob(pattern)):
            digest.update(part.name.encode() + part.read_bytes())
    for file in files:
        stat = file.stat()
        digest.update(f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return str(digest.hexdigest())


def _documents(files: Iterable[Path]) -> Iterator[str]:
    parts = (_json_lines(file) if file.suffix in JSON_LINES else _plain_text(file) for file in files)
    return filter(None, chain.from_iterable(parts))


def _json_lines(file: Path) -> Iterator[str]:
    with open(file, encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{file}, line {number}: not JSON ({error.msg} at column {error.colno})") from None
            if not isinstance(record, dict) or not isinstance(record.get("text"), str):
                raise DataError(f'{file}, line {number}: expected an object with a "text" key that holds a string')
            yield record["text"]


def _plain_text(file: Path) -> Iterator[str]:
    """A file is one document; a very long one is cut at line ends, so that memory stays bounded."""
    with open(file, encoding="utf-8", errors="replace") as stream:
        while lines := stream.readlines(_MAX_CHARACTERS):
            yield "".join(lines)


def _tokenize(documents: Iterator[str], tokenizer: Tokenizer) -> Iterator[Sequence[int]]:
    """Give each document's ids with the tokenizer's own special tokens, and an end-of-sequence token at its end."""
    end = tokenizer.eos_token_id
    while batch := list(islice(documents, _BATCH)):
        for ids in _encode(batch, tokenizer):
            if end is not None and (not ids or ids[-1] != end):
                ids = [*ids, end]
            yield ids


def _encode(texts: list[str], tokenizer: Tokenizer) -> Sequence[Sequence[int]]:
    """Give the same ids as calling the tokenizer does, more than twice as fast: nothing but ids is made."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return cast(list[list[int]], tokenizer(texts)["input_ids"])
    return [encoding.ids for encoding in backend.encode_batch_fast(texts)]


def default_cache() -> Path:
    """Give the folder for tokenized text: moeconv/tokens under XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moeconv" / "tokens"
