"""`moeconv prepare-data`: what it writes and what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from cli.main import main
from runtime.data.indexed import open_tokens
from tests.runtime.data.files import DOCUMENT_FILES, json_lines


@pytest.fixture
def data(tmp_path: Path, texts: list[str]) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    DOCUMENT_FILES["a.jsonl.zst"](folder / "a.jsonl.zst", texts)
    DOCUMENT_FILES["a.parquet"](folder / "b.parquet", texts)
    (folder / "c.png").write_bytes(b"\x89PNG")
    return folder


def run(*words: object) -> Result:
    return CliRunner().invoke(main, ["prepare-data", *map(str, words)])


def test_it_writes_token_files(data: Path, tmp_path: Path, tokenizer_folder: Path, texts: list[str]) -> None:
    out = tmp_path / "out"
    dry = run(data, out, "--tokenizer", tokenizer_folder, "--dry-run", "--json")
    planned = json.loads(dry.output)
    assert list(planned["files"].values()) == ["JSON Lines, zstd", "Parquet"]
    assert (planned["vocabulary"], planned["eod"]) == (384, 1)
    assert not list(tmp_path.glob("out*"))
    result = run(data, out, "--tokenizer", tokenizer_folder, "--json")
    made = json.loads(result.output)
    assert made["documents"] == 2 * len(texts)
    assert "c.png: is a PNG image" in made["left_out"][0]
    assert len(open_tokens(tmp_path / "out.bin").tokens) == made["tokens"]
    again = run(data, out, "--tokenizer", tokenizer_folder)
    assert again.exit_code == 1
    assert "out.bin: exists; choose another name, or remove it" in again.output
    named = run(data, tmp_path / "named.bin", "--tokenizer", tokenizer_folder)
    assert f"{tmp_path}/named.bin: {2 * len(texts)} documents, " in named.output
    assert (tmp_path / "named.bin").read_bytes() == (tmp_path / "out.bin").read_bytes()
    assert "holds token ids already" in run(out, tmp_path / "x", "--tokenizer", tokenizer_folder).output


def test_a_run_that_stopped_goes_on(tmp_path: Path, tokenizer_folder: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines(["one", "two"]) + b"{\n")
    words = (tmp_path / "a.jsonl", tmp_path / "out", "--tokenizer", tokenizer_folder)
    failed = run(*words)
    assert failed.exit_code == 1
    assert "a.jsonl, line 3: not JSON" in failed.output
    assert "--skip-bad-lines N leaves out up to N such lines" in failed.output
    assert "go on with --resume, or remove it" in run(*words).output
    result = run(*words, "--resume", "--skip-bad-lines", 1)
    assert result.exit_code == 0, result.output
    assert "bad line: " in result.output
    assert "left out: 1 bad lines" in result.output
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out.bin", "out.idx", "out.prepare.json"]


def test_a_dry_run_tries_the_first_document(tmp_path: Path, tokenizer_folder: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines(["one"], "content"))
    words = (tmp_path / "a.jsonl", tmp_path / "out", "--tokenizer", tokenizer_folder, "--dry-run")
    assert (
        'expected an object with a "text" key that holds a string (--text-key); it has content, id'
        in run(*words).output
    )
    assert run(*words, "--text-key", "content").exit_code == 0  # the advice, obeyed
