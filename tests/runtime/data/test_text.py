"""Text through the checkpoint's tokenizer: what is tokenized, what is kept, what is refused."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from runtime.data.indexed import DataError, TokenFile
from runtime.data.text import open_sources
from tests.runtime.words import VOCAB_SIZE, real_text


def tokenize(paths: list[Path], folder: Path, cache: Path) -> list[TokenFile]:
    return open_sources(paths, folder, VOCAB_SIZE, cache)


def test_jsonl_and_text_are_documents_that_end(tmp_path: Path, tokenizer_folder: Path) -> None:
    texts = ["def f():\n    return 1\n", "a \u00e9 word", real_text()]
    lines = [json.dumps({"text": text, "other": 1}) for text in texts[:2]]
    (tmp_path / "a.jsonl").write_text("\n".join([lines[0], "", lines[1], json.dumps({"text": ""})]))
    (tmp_path / "b.txt").write_text(texts[2])
    [file] = tokenize([tmp_path / "a.jsonl", tmp_path / "b.txt"], tokenizer_folder, tmp_path / "cache")
    reference = AutoTokenizer.from_pretrained(tokenizer_folder)
    expected = [[*reference(text)["input_ids"], 1] for text in texts]
    assert file.tokens.tolist() == list(chain.from_iterable(expected))
    assert file.document_ends.tolist() == np.cumsum([len(ids) for ids in expected]).tolist()


def test_more_documents_than_a_batch(tmp_path: Path, tokenizer_folder: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"number {i}"}) + "\n" for i in range(1000)))
    [file] = tokenize([tmp_path / "a.jsonl"], tokenizer_folder, tmp_path / "cache")
    reference = AutoTokenizer.from_pretrained(tokenizer_folder)
    expected = ([*reference(f"number {i}")["input_ids"], 1] for i in range(1000))
    assert file.tokens.tolist() == list(chain.from_iterable(expected))


def test_cache_is_used_and_follows_the_file(tmp_path: Path, tokenizer_folder: Path) -> None:
    source, cache = tmp_path / "a.txt", tmp_path / "cache"
    source.write_text("one two")
    [first] = tokenize([source], tokenizer_folder, cache)
    [again] = tokenize([source], tokenizer_folder, cache)
    assert again.path == first.path
    source.write_text("one two three")
    [changed] = tokenize([source], tokenizer_folder, cache)
    assert len(changed.tokens) > len(first.tokens)
    assert not list(cache.glob("*.partial"))


def test_folder_prefix_and_bin(tmp_path: Path, tokenizer_folder: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "b.md").write_text("text")
    (folder / "ignored.png").write_bytes(b"\x89PNG")
    np.arange(9, dtype=np.uint16).tofile(folder / "c.bin")
    text, ids = tokenize([folder], tokenizer_folder, tmp_path / "cache")
    assert ids.tokens.tolist() == list(range(9))
    assert text.path.parent == tmp_path / "cache"
    [by_prefix] = tokenize([folder / "c"], tmp_path, tmp_path / "cache")  # no tokenizer there: none is needed
    assert by_prefix.path == folder / "c.bin"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text": \n', "line 2: not JSON"),
        ('{"content": "a"}\n', 'line 1: expected an object with a "text" key'),
        ("[1]\n", 'line 1: expected an object with a "text" key'),
        ("\n\n", "no text in the 1 file"),
    ],
)
def test_bad_jsonl(tmp_path: Path, tokenizer_folder: Path, content: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        tokenize([tmp_path / "a.jsonl"], tokenizer_folder, tmp_path / "cache")


def test_bad_sources(tmp_path: Path, tokenizer_folder: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(DataError, match="no such file or folder"):
        tokenize([tmp_path / "missing"], tokenizer_folder, tmp_path)
    with pytest.raises(DataError, match="no usable tokenizer"):
        tokenize([tmp_path / "a.txt"], tmp_path, tmp_path)
    with pytest.raises(DataError, match="384 tokens, the model 100"):
        open_sources([tmp_path / "a.txt"], tokenizer_folder, 100, tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no \.jsonl, text"):
        tokenize([tmp_path / "empty"], tokenizer_folder, tmp_path)
