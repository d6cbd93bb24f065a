"""The checkpoint's own tokenizer: the ids that `tokenizer(text)` gives, whatever state its file keeps."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import xxhash

from moeconv.extras import needed
from moeconv.families import family_of
from runtime.data.errors import DataError, need

_FILES = (
    "tokenizer*",
    "tekken.json",
    "tiktoken.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
)
_TEMPLATES = ("chat_template*", "additional_chat_templates/*")
_PROBES = (
    "Hello world",
    " two  spaces\nand a line\t",
    "d\u00e9j\u00e0 vu \u4e2d\u6587 \U0001f600 \u00a0x",
    "<s> </s> <|endoftext|> [INST]",
    "x",
)


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that is used here."""

    eos_token_id: int | None

    def __call__(self, text: list[str]) -> Any: ...

    def __len__(self) -> int: ...


@dataclass(frozen=True, slots=True)
class EncoderSpec:
    """All that another process needs to tokenize as this one does."""

    backend: str | None
    """The JSON of a `tokenizers.Tokenizer` without truncation and padding; None: load `folder` with transformers."""
    folder: str
    split_special: bool
    """Whether special tokens inside a text are taken for text."""
    eod: int | None
    """Id that is put at the end of each document; None puts none."""
    vocab_size: int
    max_id: int

    @property
    def num_values(self) -> int:
        """Ids are below it."""
        return self.max_id + 1

    @property
    def identity(self) -> dict[str, Any]:
        """What the ids of a text depend on."""
        return {"tokenizer": self.backend or self.folder, "special tokens": [self.split_special, self.eod]}


def load_tokenizer(path: Path) -> Tokenizer:
    """Load a tokenizer without ever running code that comes with it.

    Args:
        path: a folder with tokenizer files (a checkpoint), a tokenizer.json, or a sentencepiece model.

    Returns:
        The tokenizer; a bare sentencepiece model (tokenizer.model without other files) is Llama's.

    Raises:
        DataError: there is no tokenizer, transformers can't load it, or a library for it is missing.
    """
    # Imported here: transformers takes a second to load, and a run whose tokens are kept already doesn't need it.
    with needed("reading a tokenizer"):
        from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

    if not path.exists():
        raise DataError(
            f"{path}: no such file or folder; --tokenizer-model takes a folder, a tokenizer.json or tokenizer.model"
        )
    folder = path if path.is_dir() else path.parent
    model = path if path.suffix == ".model" else folder / "tokenizer.model"
    described = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
    bare = model.is_file() and not described and _is_llama_like(folder)
    if bare:
        _check_sentencepiece(model)
    try:
        if path.is_file() and path.suffix == ".json" and not (folder / "tokenizer_config.json").is_file():
            make = cast(Callable[..., Tokenizer], PreTrainedTokenizerFast)
            return make(tokenizer_file=str(path))
        if bare:
            # transformers' generic class would drop the space that begins a text; the family's own doesn't.
            return cast(Tokenizer, LlamaTokenizer.from_pretrained(str(model.parent), vocab_file=str(model)))
        return cast(Tokenizer, AutoTokenizer.from_pretrained(folder, trust_remote_code=False))
    except Exception as error:  # transformers and tokenizers raise bare Exceptions for malformed files
        raise DataError(
            f"{path}: no usable tokenizer ({type(error).__name__}: {error}); name one with --tokenizer-model, "
            "or give token files (.bin)"
        ) from error


def _is_llama_like(folder: Path) -> bool:
    """Whether a bare `tokenizer.model` is to be read as Llama's: the config.json beside it says so, or there is none."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf8"))
        return family_of(config).sentencepiece
    except (OSError, ValueError, TypeError, AttributeError):
        return not (folder / "config.json").is_file()


def _check_sentencepiece(model: Path) -> None:
    with open(model, "rb") as file:
        head = file.read(64)
    if re.match(rb"[A-Za-z0-9+/]+=* \d+\n", head):
        raise DataError(
            f"{model}: is a tiktoken vocabulary without its pattern and special tokens; give a folder that has "
            "tokenizer.json (the checkpoint in Hugging Face's format)"
        )
    try:
        import sentencepiece  # noqa: F401
    except ImportError:
        raise need("sentencepiece", f"{model} (without a tokenizer.json beside it)") from None


def tokenizer_files(folder: Path, *, templates: bool = True) -> list[Path]:
    """List the files of a folder that make a tokenizer, in a fixed order, chat templates included or not."""
    patterns = (*_FILES, *(_TEMPLATES if templates else ()))
    return [part for pattern in patterns for part in sorted(folder.glob(pattern)) if part.is_file()]


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """Give the rows that an embedding needs for a tokenizer: one more than its largest id, which need not be its length."""
    ids: Iterable[int] = tokenizer.get_vocab().values() if hasattr(tokenizer, "get_vocab") else ()
    return max((*(index + 1 for index in ids), len(tokenizer)))


def digest_files(path: Path, *, templates: bool = False) -> str:
    """Name a tokenizer by the content of its files: a checkpoint that a run saves has the name of the one it began with.

    Args:
        path: as `load_tokenizer` takes it.
        templates: whether its chat templates matter, too.

    Returns:
        A hexadecimal digest.
    """
    digest = xxhash.xxh3_128(path.name.encode() if path.is_file() else b"")
    folder = path.parent if path.is_file() else path
    for part in tokenizer_files(folder, templates=templates):
        digest.update(part.name.encode() + part.read_bytes())
    # What the family says chooses the class; nothing else of the model's configuration matters.
    digest.update(str(_is_llama_like(folder)).encode())
    return str(digest.hexdigest())


def encoder_spec(tokenizer: Tokenizer, path: Path, *, append_eod: bool) -> EncoderSpec:
    """Fix how texts become ids.

    Args:
        tokenizer: the tokenizer.
        path: where it came from.
        append_eod: whether each document ends with the tokenizer's end-of-sequence token.

    Returns:
        What workers tokenize with.

    Raises:
        DataError: the tokenizer draws at random (BPE dropout).
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    split_special = bool(getattr(tokenizer, "split_special_tokens", False))
    text: str | None = None
    eod = tokenizer.eos_token_id if append_eod else None
    max_id = vocabulary_size(tokenizer) - 1
    if backend is not None:
        backend.no_truncation()
        backend.no_padding()
        text = backend.to_str()
        check_repeatable(tokenizer, path)
    spec = EncoderSpec(text, str(path), split_special, eod, len(tokenizer), max_id)
    if text is not None:
        # A class may change the text before its backend sees it: then its own way is taken, at half the speed.
        expected = [list(ids) for ids in tokenizer(list(_PROBES))["input_ids"]]
        if Encoder(spec).encode(list(_PROBES)) != expected:
            return EncoderSpec(None, str(path), split_special, eod, len(tokenizer), max_id)
    return spec


def check_repeatable(tokenizer: Tokenizer, path: Path) -> None:
    """Refuse a tokenizer that draws at random.

    Args:
        tokenizer: the tokenizer.
        path: where it came from.

    Raises:
        DataError: it has a BPE dropout.
    """
    dropout = getattr(getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None), "dropout", None)
    if dropout:
        raise DataError(
            f"{path}: its tokenizer.json keeps a BPE dropout of {dropout}: the ids of a text would "
            'differ from run to run; set "dropout" to null in it'
        )


class Encoder:
    """Turns texts into ids, as a call of the tokenizer does."""

    def __init__(self, spec: EncoderSpec) -> None:
        self.spec = spec
        self._call: Tokenizer | None = None
        self._backend: Any = None
        if spec.backend is None:
            self._call = load_tokenizer(Path(spec.folder))
            return
        from tokenizers import Tokenizer as Backend

        self._backend = Backend.from_str(spec.backend)
        self._backend.encode_special_tokens = spec.split_special
        # Neither is serialised reliably by every version: what the file kept must not come back.
        self._backend.no_truncation()
        self._backend.no_padding()

    def encode(self, texts: list[str], *, special: bool = True) -> list[list[int]]:
        """Give the ids of `tokenizer(text)` for each text, neither padded nor cut.

        Args:
            texts: the texts.
            special: whether the tokenizer's own special tokens (such as one for the beginning) are added.

        Returns:
            Ids for each text.
        """
        if self._backend is not None:
            encodings = self._backend.encode_batch_fast(texts, add_special_tokens=special)
            return [encoding.ids for encoding in encodings]
        assert self._call is not None
        call = cast(Any, self._call)
        found = call(texts, add_special_tokens=special, padding=False, truncation=False, verbose=False)["input_ids"]
        return [list(ids) for ids in found]

    def frame(self) -> tuple[list[int], list[int]]:
        """Give the special tokens before and after each text."""
        for text in ("a", "0", "the"):
            [whole], [bare] = self.encode([text]), self.encode([text], special=False)
            for begin in range(len(whole) - len(bare) + 1):
                if bare and whole[begin : begin + len(bare)] == bare:
                    return whole[:begin], whole[begin + len(bare) :]
        return [], []

    def end(self, ids: list[int]) -> list[int]:
        """Put the end-of-document token behind a document unless it is there already."""
        eod = self.spec.eod
        return ids if eod is None or (ids and ids[-1] == eod) else [*ids, eod]
