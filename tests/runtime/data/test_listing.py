"""What files are, by their content; what a folder holds; nothing unknown is read as text."""

from __future__ import annotations

import sys
from pathlib import Path

import datasets
import numpy as np
import pytest

from runtime.data.errors import DataError
from runtime.data.kinds import Kind, recognise
from runtime.data.listing import _load_hub, list_files
from tests.runtime.data.files import DOCUMENT_FILES, FOREIGN_FILES, json_lines, write_tokens

TEXTS = [f"text {n}" for n in range(30)]


@pytest.mark.parametrize("name", DOCUMENT_FILES)
def test_known_kinds(tmp_path: Path, name: str) -> None:
    DOCUMENT_FILES[name](tmp_path / name, TEXTS)
    kind = recognise(tmp_path / name).kind
    if "array" in name or "pretty" in name:
        assert kind is Kind.JSON_ARRAY
    elif "arrow" in name or "feather" in name:
        assert kind is Kind.ARROW
    else:
        assert kind is (Kind.PARQUET if "parquet" in name else Kind.JSON_LINES)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "plain words"),
        ("a.md", "{not json}"),
        ("a.py", "[1, 2]\n"),
        ("a.txt", "{a brace\n"),
        ("a.txt", "[1] Knuth\n"),
    ],
)
def test_text(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    assert recognise(tmp_path / name).kind is Kind.TEXT


@pytest.mark.parametrize("name", FOREIGN_FILES)
def test_what_is_not_read_is_named(tmp_path: Path, name: str) -> None:
    write, message = FOREIGN_FILES[name]
    write(tmp_path / name)
    with pytest.raises(DataError, match=message) as caught:
        recognise(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


def test_a_folder_says_what_it_leaves_out(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.parquet", "sub/c.arrow"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        DOCUMENT_FILES[{"a": "a.jsonl", "b": "a.parquet", "c": "file.arrow"}[Path(name).stem]](tmp_path / name, TEXTS)
    FOREIGN_FILES["a.png"][0](tmp_path / "d.png")
    (tmp_path / "README.md").write_text("# About")
    (tmp_path / ".hidden").write_text("x")
    write_tokens(tmp_path / "e.bin", [[1, 2]], np.dtype(np.uint16))
    found = list_files(str(tmp_path))
    assert [file.path.name for file in found.files] == ["a.jsonl", "b.parquet", "e.bin", "c.arrow"]
    assert len(found.left_out) == 2
    assert any("README.md: goes with the data" in what for what in found.left_out)
    assert any("d.png: is a PNG image" in what for what in found.left_out)


def test_a_folder_without_data(tmp_path: Path) -> None:
    FOREIGN_FILES["a.png"][0](tmp_path / "d.png")
    with pytest.raises(DataError, match=r"no data files in this folder; left out: .*d\.png: is a PNG image"):
        list_files(str(tmp_path))
    with pytest.raises(DataError, match=r"no such file or folder, and no missing\.bin"):
        list_files(str(tmp_path / "missing"))


def test_a_prefix_comes_before_megatrons_cache_of_the_same_name(tmp_path: Path) -> None:
    write_tokens(tmp_path / "a.bin", [[1, 2]], np.dtype(np.uint16))
    cache = tmp_path / "a" / "cache" / "GPTDataset_indices"
    cache.mkdir(parents=True)
    (cache / "0-description.txt").write_text("not data")
    assert [file.path.name for file in list_files(str(tmp_path / "a")).files] == ["a.bin"]
    assert [file.path.name for file in list_files(str(tmp_path)).files] == ["a.bin"]


def test_missing_halves(tmp_path: Path) -> None:
    write_tokens(tmp_path / "a.bin", [[1, 2]], np.dtype(np.uint16))
    (tmp_path / "a.bin").rename(tmp_path / "b.bin")
    for path in (tmp_path / "a", tmp_path):
        with pytest.raises(DataError, match=r"a\.bin: is missing; its index a\.idx is there"):
            list_files(str(path))
    with pytest.raises(DataError, match=r"b\.idx: is missing; b\.bin is there"):
        list_files(str(tmp_path / "b"))


def test_a_missing_shard(tmp_path: Path) -> None:
    for number in (0, 1, 3):
        (tmp_path / f"train-{number:05d}-of-00004.jsonl").write_bytes(json_lines(TEXTS))
    with pytest.raises(DataError, match=r"1 of 4 files are missing: train-00002-of-00004\.jsonl;.*name the files"):
        list_files(str(tmp_path))
    for path in sorted(tmp_path.iterdir()):  # the advice, obeyed
        assert len(list_files(str(path)).files) == 1
    (tmp_path / "train-00002-of-00004.jsonl").write_bytes(json_lines(TEXTS))
    assert len(list_files(str(tmp_path)).files) == 4


def test_saved_datasets(tmp_path: Path) -> None:
    train = datasets.Dataset.from_dict({"text": TEXTS})
    train.save_to_disk(tmp_path / "one", num_shards=3)
    assert [file.path.name for file in list_files(str(tmp_path / "one")).files] == [
        f"data-{n:05d}-of-00003.arrow" for n in range(3)
    ]
    datasets.DatasetDict({"train": train, "test": train}).save_to_disk(tmp_path / "both")
    with pytest.raises(DataError, match=r"splits test, train; name one: .*both/test"):
        list_files(str(tmp_path / "both"))
    assert len(list_files(str(tmp_path / "both" / "train")).files) == 1
    (tmp_path / "one" / "data-00001-of-00003.arrow").unlink()
    with pytest.raises(DataError, match=r"data-00001-of-00003\.arrow of this saved dataset is missing"):
        list_files(str(tmp_path / "one"))


def test_hub_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library loads a folder as it does a repository of the hub; what it gives is read from its cache."""
    (tmp_path / "repo").mkdir()
    DOCUMENT_FILES["a.parquet"](tmp_path / "repo" / "train-0.parquet", TEXTS)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    found = _load_hub(datasets, "hf://x/y", str(tmp_path / "repo"), None, "train")
    assert [file.kind for file in found.files] == [Kind.ARROW]
    assert tmp_path / "cache" in found.files[0].path.parents
    with pytest.raises(DataError, match="can't be loaded from the hub"):
        _load_hub(datasets, "hf://x/y", str(tmp_path / "repo"), None, "absent")
    for wrong in ("hf://", "hf://only", "hf://a/b/c/d", "hf://a/b:train[:1%]"):
        with pytest.raises(DataError, match=r"expected hf://OWNER/NAME"):
            list_files(wrong)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"needs the library datasets.*pip install 'moeconv\[data\]'"):
        list_files("hf://x/y")


def test_missing_libraries_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    DOCUMENT_FILES["a.jsonl.zst"](tmp_path / "a.jsonl.zst", TEXTS)
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(DataError, match=r"needs the library zstandard.*pip install 'moeconv\[data\]'"):
        list_files(str(tmp_path / "a.jsonl.zst"))
