"""Text to token files: every kind of file the same ids, bad lines, stopping and going on, any number of processes."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import threading
import time
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from runtime.data import units
from runtime.data.errors import DataError
from runtime.data.indexed import open_tokens
from runtime.data.joined import Prepared
from runtime.data.listing import list_files
from runtime.data.prepare import PrepareOptions, PrepareProgress, prepare, prepare_once, read_prepared
from runtime.data.tokenizer import EncoderSpec, encoder_spec, load_tokenizer
from tests.runtime.data.files import DOCUMENT_FILES, json_lines
from tests.runtime.words import real_text

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def spec(tokenizer_folder: Path) -> EncoderSpec:
    return encoder_spec(load_tokenizer(tokenizer_folder), tokenizer_folder, append_eod=True)


@pytest.fixture(scope="module")
def expected(tokenizer_folder: Path, texts: list[str]) -> list[list[int]]:
    reference = AutoTokenizer.from_pretrained(tokenizer_folder)
    return [[*reference(text)["input_ids"], 1] for text in texts]


def run(path: Path, out: Path, spec: EncoderSpec, **options: Any) -> Prepared:
    return prepare(list_files(str(path)).files, out, spec, PrepareOptions(**{"workers": 1, **options}))


def documents(out: Path) -> list[list[int]]:
    file = open_tokens(out)
    return [part.tolist() for part in np.split(file.tokens, file.document_ends[:-1])]


@pytest.mark.parametrize("name", DOCUMENT_FILES)
@pytest.mark.parametrize("unit_bytes", [300, 1 << 22])
def test_every_kind_gives_the_ids_of_the_tokenizer(
    tmp_path: Path, spec: EncoderSpec, texts: list[str], expected: list[list[int]], name: str, unit_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(units, "UNIT_BYTES", unit_bytes)
    monkeypatch.setattr(units, "_ARROW_BYTES", unit_bytes)
    DOCUMENT_FILES[name](tmp_path / name, texts)
    result = run(tmp_path / name, tmp_path / "out.bin", spec)
    assert documents(tmp_path / "out.bin") == expected
    assert (result.documents, result.tokens) == (len(texts), sum(map(len, expected)))
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("out.")) == [
        "out.bin",
        "out.idx",
        "out.prepare.json",
    ]
    assert read_prepared(tmp_path / "out.bin") == result


def test_other_field_and_no_mark(
    tmp_path: Path, tokenizer_folder: Path, texts: list[str], expected: list[list[int]]
) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines(texts, "content"))
    spec = encoder_spec(load_tokenizer(tokenizer_folder), tokenizer_folder, append_eod=False)
    assert run(tmp_path / "a.jsonl", tmp_path / "out.bin", spec, text_key="content").eod is None
    assert documents(tmp_path / "out.bin") == [ids[:-1] for ids in expected]


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("unit_bytes", [2_000, 1 << 22])
def test_a_text_is_one_document_cut_where_lines_end(
    tmp_path: Path, spec: EncoderSpec, tokenizer_folder: Path, compressed: bool, unit_bytes: int, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(units, "UNIT_BYTES", unit_bytes)
    text = real_text().replace("e", "\u00e9")
    path = tmp_path / ("a.txt.gz" if compressed else "a.txt")
    path.write_bytes(gzip.compress(text.encode()) if compressed else text.encode())
    run(path, tmp_path / "out.bin", spec)
    [ids] = documents(tmp_path / "out.bin")
    reference = AutoTokenizer.from_pretrained(tokenizer_folder)
    assert reference.decode(ids[:-1]) == text
    assert ids.count(1) == 1
    if unit_bytes > len(text) * 2:
        assert ids[:-1] == reference(text)["input_ids"]


def test_long_documents_are_cut_and_stay_one(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The special tokens around a text are put once."""
    monkeypatch.setattr("runtime.data.documents.LONGEST_PIECE", 500)
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for file in tokenizer_folder.iterdir():
        values = json.loads(file.read_text())
        (folder / file.name).write_text(
            json.dumps({**values, **({"add_bos_token": True} if "config" in file.name else {})})
        )
    spec = encoder_spec(load_tokenizer(folder), folder, append_eod=True)
    longs = [real_text()[:5_000], "no line end " * 100, "a" * 3_000, "short"]
    (tmp_path / "a.jsonl").write_bytes(json_lines(longs))
    run(tmp_path / "a.jsonl", tmp_path / "out.bin", spec)
    reference = AutoTokenizer.from_pretrained(folder)
    framed = reference("short")["input_ids"][0] == 0
    for text, ids in zip(longs, documents(tmp_path / "out.bin"), strict=True):
        assert reference.decode(ids, skip_special_tokens=True) == text
        assert (ids.count(0), ids.count(1)) == (int(framed), 1)


def test_any_number_of_processes_gives_the_same_bytes(
    tmp_path: Path, spec: EncoderSpec, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", 20_000)
    monkeypatch.setattr("runtime.data.prepare._SMALL", 0)
    (tmp_path / "a.jsonl").write_bytes(json_lines(texts * 5))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(json_lines(texts * 3)))
    files = [*list_files(str(tmp_path / "a.jsonl")).files, *list_files(str(tmp_path / "b.jsonl.gz")).files]
    told: list[PrepareProgress] = []
    for workers in (1, 3):
        prepare(files, tmp_path / f"{workers}.bin", spec, PrepareOptions(workers=workers), told.append)
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"1{suffix}").read_bytes() == (tmp_path / f"3{suffix}").read_bytes()


BAD = [
    (b'{"text": \n', "not JSON"),
    (b'{"content": "a"}\n', 'expected an object with a "text" key that holds a string .*it has content'),
    (b"[1]\n", 'expected an object with a "text" key'),
    (b'{"text": null}\n', 'its "text" is NoneType; expected a string'),
    (b'{"text": "\xe9"}\n', "not UTF-8"),
    (b'{"text": "\\ud800"}\n', "its text holds a lone surrogate"),
]


@pytest.mark.parametrize(("line", "message"), BAD)
@pytest.mark.parametrize("packed", [False, True])
def test_a_bad_line_is_named(
    tmp_path: Path, spec: EncoderSpec, line: bytes, message: str, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", 200)
    good = json_lines([f"number {n}" for n in range(40)])
    content = good + b"\n" + line + good
    path = tmp_path / ("a.jsonl.gz" if packed else "a.jsonl")
    path.write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(DataError, match=rf"a\.jsonl\S*, line 42: {message}.*--skip-bad-lines"):
        run(path, tmp_path / "out.bin", spec)
    assert not (tmp_path / "out.bin").exists()
    result = run(path, tmp_path / "out.bin", spec, skip_bad_lines=1)  # the advice, obeyed
    assert (result.documents, result.bad) == (80, 1)
    assert ", line 42: " in result.messages[0]


def test_no_more_bad_lines_than_are_allowed(tmp_path: Path, spec: EncoderSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", 50)
    good = json_lines(["x"] * 9)
    (tmp_path / "a.jsonl").write_bytes((good + b"{bad\n") * 3)
    with pytest.raises(DataError, match=r"line 30: not JSON .*\(bad line 3; --skip-bad-lines is 2\)"):
        run(tmp_path / "a.jsonl", tmp_path / "out.bin", spec, skip_bad_lines=2)
    assert run(tmp_path / "a.jsonl", tmp_path / "out.bin", spec, skip_bad_lines=3).bad == 3


def test_bad_rows_and_elements(tmp_path: Path, spec: EncoderSpec) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    parquet.write_table(pa.table({"text": ["a", None, "b"], "other": [1, 2, 3]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet, row group 0, row 2: its \"text\" is NoneType"):
        run(tmp_path / "a.parquet", tmp_path / "out.bin", spec)
    with pytest.raises(DataError, match=r"has no column 'body'; name one of text, other with --text-key"):
        run(tmp_path / "a.parquet", tmp_path / "other.bin", spec, text_key="body")
    (tmp_path / "a.json").write_text('[{"text": "a"}, 7, {"text": "b"}]')
    with pytest.raises(DataError, match=r"a\.json, element 2: expected an object"):
        run(tmp_path / "a.json", tmp_path / "array.bin", spec)
    (tmp_path / "b.json").write_text('[{"text": "a"}, {"text": "b"]')
    with pytest.raises(DataError, match=r"b\.json, element 2: not JSON"):
        run(tmp_path / "b.json", tmp_path / "broken.bin", spec)
    (tmp_path / "c.json").write_text('[{"text": "a"}, {"text": "b"}')
    with pytest.raises(DataError, match=r"c\.json, element \d: not JSON \(the array doesn't end\)"):
        run(tmp_path / "c.json", tmp_path / "endless.bin", spec)


def test_text_that_is_none(tmp_path: Path, spec: EncoderSpec) -> None:
    (tmp_path / "a.txt").write_bytes("caf\u00e9".encode("latin-1"))
    with pytest.raises(DataError, match=r"a\.txt: not UTF-8 at byte 3 \(0xe9\); convert it.*iconv"):
        run(tmp_path / "a.txt", tmp_path / "out.bin", spec)
    (tmp_path / "b.jsonl").write_bytes(b"\n \n" + json_lines(["", ""]))
    with pytest.raises(DataError, match="no text in the 1 file"):
        run(tmp_path / "b.jsonl", tmp_path / "empty.bin", spec)
    (tmp_path / "c.jsonl").write_bytes(json_lines(["", "a", ""]))
    result = run(tmp_path / "c.jsonl", tmp_path / "some.bin", spec)
    assert (result.documents, result.empty) == (1, 2)


def test_damaged_files(tmp_path: Path, spec: EncoderSpec, texts: list[str]) -> None:
    for name in ("a.parquet", "stream.arrow", "a.jsonl.zst", "a.json.gz"):
        path = tmp_path / name
        DOCUMENT_FILES[name](path, texts * 20)
        raw = path.read_bytes()
        path.write_bytes(raw[: len(raw) // 2])
        with pytest.raises(DataError, match=f"{name}: is truncated or damaged"):
            run(path, tmp_path / f"{name}.out.bin", spec)


PROGRAM = """
import sys
from pathlib import Path
import runtime.data.prepare as prepare_module
from runtime.data import units
from runtime.data.listing import list_files
from runtime.data.prepare import PrepareOptions, prepare
from runtime.data.tokenizer import encoder_spec, load_tokenizer
units.UNIT_BYTES, prepare_module._SMALL = 20_000, 0
path, out, tokenizer, workers = map(Path, sys.argv[1:])
spec = encoder_spec(load_tokenizer(tokenizer), tokenizer, append_eod=True)
prepare(list_files(str(path)).files, out, spec, PrepareOptions(workers=int(str(workers))))
"""


def test_a_killed_run_goes_on_with_what_it_has(
    tmp_path: Path,
    spec: EncoderSpec,
    tokenizer_folder: Path,
    texts: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", 20_000)
    path = tmp_path / "a.jsonl"
    path.write_bytes(json_lines(texts * 12))
    files = list_files(str(path)).files
    prepare(files, tmp_path / "whole.bin", spec, PrepareOptions(workers=1))
    out = tmp_path / "out.bin"
    command = [sys.executable, "-c", PROGRAM, str(path), str(out), str(tokenizer_folder), "2"]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)})
    parts = tmp_path / "out.parts"
    deadline = time.monotonic() + 60
    while len(list(parts.glob("*.ids"))) < 6 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert parts.is_dir(), "killed in the middle"
    kept = len(list(parts.glob("[0-9]*.json")))
    assert kept >= 3
    made: list[int] = []
    from runtime.data import pool

    own = pool.tokenize_unit
    monkeypatch.setattr(pool, "tokenize_unit", lambda unit, *rest: (made.append(unit.index), own(unit, *rest))[1])
    prepare(files, out, spec, PrepareOptions(workers=1))
    assert len(made) <= -(-path.stat().st_size // 20_000) - kept + 2
    for suffix in (".bin", ".idx", ".prepare.json"):
        assert out.with_suffix(suffix).read_bytes() == (tmp_path / f"whole{suffix}").read_bytes()
    assert not parts.exists()


def test_a_checkpoint_of_what_is_joined(
    tmp_path: Path, spec: EncoderSpec, texts: list[str], expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after every unit once: what is laid to the others is on disk, and its parts are gone."""
    monkeypatch.setattr(units, "UNIT_BYTES", 3_000)
    monkeypatch.setattr("runtime.data.joined._CHECKPOINT_SECONDS", 0.0)
    (tmp_path / "a.jsonl").write_bytes(json_lines(texts))
    from runtime.data import pool

    own = pool.tokenize_unit

    class Stopped(Exception):
        pass

    attempts = 0
    while not (tmp_path / "out.bin").exists():
        count = 0

        def stopping(unit: Any, *rest: Any) -> Any:
            nonlocal count
            count += 1
            if count > 2:
                raise Stopped
            return own(unit, *rest)

        monkeypatch.setattr(pool, "tokenize_unit", stopping)
        try:
            run(tmp_path / "a.jsonl", tmp_path / "out.bin", spec)
        except Stopped:
            attempts += 1
            assert len(list((tmp_path / "out.parts").glob("[0-9]*"))) <= 3
    assert attempts > 3
    assert documents(tmp_path / "out.bin") == expected


def test_other_input_is_not_gone_on_with(tmp_path: Path, spec: EncoderSpec, texts: list[str]) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines(texts) + b"{\n")
    with pytest.raises(DataError, match="not JSON"):
        run(tmp_path / "a.jsonl", tmp_path / "out.bin", spec)
    (tmp_path / "a.jsonl").write_bytes(json_lines(texts))
    with pytest.raises(DataError, match=r"out\.parts: was begun with other files; remove it to start anew"):
        run(tmp_path / "a.jsonl", tmp_path / "out.bin", spec)


def test_a_worker_that_dies_is_reported_and_nothing_is_lost(
    tmp_path: Path, spec: EncoderSpec, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", 20_000)
    monkeypatch.setattr("runtime.data.prepare._SMALL", 0)
    (tmp_path / "a.jsonl").write_bytes(json_lines(texts * 12))
    files = list_files(str(tmp_path / "a.jsonl")).files
    killed: list[int] = []
    from runtime.data import pool

    class Killing(pool._Pool):
        def _receive(self, connection: Any) -> Any:
            answer = super()._receive(connection)
            if not killed:
                killed.append(1)
                for process in self._workers.values():
                    process.send_signal(signal.SIGKILL)
            return answer

    with monkeypatch.context() as patch:
        patch.setattr(pool, "_Pool", Killing)
        with pytest.raises(DataError, match=r"was killed by signal 9 .*what is done is kept"):
            prepare(files, tmp_path / "out.bin", spec, PrepareOptions(workers=2))
    prepare(files, tmp_path / "out.bin", spec, PrepareOptions(workers=1))
    prepare(files, tmp_path / "whole.bin", spec, PrepareOptions(workers=1))
    assert (tmp_path / "out.bin").read_bytes() == (tmp_path / "whole.bin").read_bytes()


def test_a_full_disk_says_so_and_keeps_what_is_done(
    tmp_path: Path, spec: EncoderSpec, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines(texts))
    with monkeypatch.context() as patch:

        def full(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        patch.setattr("runtime.data.joined.shutil.copyfileobj", full)
        with pytest.raises(DataError, match=r"out\.parts: can't be written: No space left on device; make room"):
            run(tmp_path / "a.jsonl", tmp_path / "out.bin", spec)
    assert len(list((tmp_path / "out.parts").glob("*.ids"))) == 1
    run(tmp_path / "a.jsonl", tmp_path / "out.bin", spec)


def test_one_works_and_the_others_wait(
    tmp_path: Path, spec: EncoderSpec, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long it takes; and when the one fails, another goes on."""
    (tmp_path / "a.jsonl").write_bytes(json_lines(texts))
    files = list_files(str(tmp_path / "a.jsonl")).files
    monkeypatch.setattr("runtime.data.prepare._WAIT_SECONDS", 0.02)
    calls: list[int] = []
    waited = threading.Event()

    def make_spec() -> EncoderSpec:
        calls.append(1)
        assert waited.wait(20)
        if len(calls) == 1:
            raise DataError("the first one fails")
        return spec

    errors: list[str] = []

    def rank() -> None:
        try:
            prepare_once(
                files,
                tmp_path / "out.bin",
                make_spec,
                PrepareOptions(workers=1),
                lambda progress: waited.set() if progress.waiting else None,
            )
        except DataError as error:
            errors.append(str(error))

    ranks = [threading.Thread(target=rank) for _ in range(4)]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join(60)
    assert errors == ["the first one fails"]
    assert len(calls) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "out.bin", "out.idx", "out.prepare.json"]
    with pytest.raises(DataError, match="can't be written"):
        prepare_once(files, tmp_path / "missing" / "out.bin", make_spec, PrepareOptions())


def test_ids_of_several_files_follow_each_other(
    tmp_path: Path, spec: EncoderSpec, texts: list[str], expected: list[list[int]]
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_bytes(json_lines(texts))
    (tmp_path / "in" / "b.txt").write_text("the end")
    run(tmp_path / "in", tmp_path / "out.bin", spec)
    [*first, last] = documents(tmp_path / "out.bin")
    assert first == expected
    assert open_tokens(tmp_path / "out.bin").tokens.tolist() == list(chain.from_iterable([*expected, last]))
