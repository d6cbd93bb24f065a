"""The same documents in files of every kind, and files of kinds that are not read, each written by its own library."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import pickle
import sqlite3
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import torch
import zstandard
from safetensors.numpy import save_file

from runtime.data.indexed import narrow, publish, write_index


def json_lines(texts: list[str], key: str = "text") -> bytes:
    return "".join(json.dumps({"id": n, key: text}) + "\n" for n, text in enumerate(texts)).encode()


def write_tokens(path: Path, documents: Iterable[Sequence[int]], dtype: np.dtype[np.generic]) -> int:
    """Write documents as Megatron's indexed pair, and count their tokens; empty ones are left out."""
    partial = path.with_suffix(".bin.partial"), path.with_suffix(".idx.partial")
    kept = [np.asarray(document) for document in documents if len(document)]
    with open(partial[0], "wb") as data:
        for document in kept:
            data.write(narrow(document, dtype, path).tobytes())
    lengths = np.array([len(document) for document in kept], np.int64)
    write_index(partial[1], lengths, dtype)
    publish(*partial, path)
    return int(lengths.sum())


def _arrow(path: Path, texts: list[str], stream: bool) -> None:
    schema = pa.schema([("text", pa.large_string()), ("id", pa.int64())])
    with pa.OSFile(str(path), "wb") as sink, (pa.ipc.new_stream if stream else pa.ipc.new_file)(sink, schema) as writer:
        for begin in range(0, len(texts), 7):
            batch = texts[begin : begin + 7]
            writer.write_batch(pa.record_batch({"text": batch, "id": list(range(len(batch)))}, schema=schema))


def _parquet(path: Path, texts: list[str]) -> None:
    parquet.write_table(pa.table({"id": list(range(len(texts))), "text": texts}), path, row_group_size=11)


def _array(texts: list[str], indent: int | None) -> bytes:
    return json.dumps(
        [{"text": text, "n": n} for n, text in enumerate(texts)], indent=indent, ensure_ascii=False
    ).encode()


DOCUMENT_FILES: dict[str, Callable[[Path, list[str]], object]] = {
    "a.jsonl": lambda p, t: p.write_bytes(json_lines(t)),
    "a.json": lambda p, t: p.write_bytes(json_lines(t)),
    "a.ndjson": lambda p, t: p.write_bytes(b"\xef\xbb\xbf" + json_lines(t).replace(b"\n", b"\r\n")),
    "a": lambda p, t: p.write_bytes(b"\n\n" + json_lines(t).replace(b"\n", b"\n\n").rstrip()),
    "a.json.gz": lambda p, t: p.write_bytes(gzip.compress(json_lines(t[:9])) + gzip.compress(json_lines(t[9:]))),
    "a.jsonl.zst": lambda p, t: p.write_bytes(zstandard.compress(json_lines(t[:9])) + zstandard.compress(json_lines(t[9:]))),
    "misnamed.jsonl": lambda p, t: p.write_bytes(gzip.compress(json_lines(t))),
    "array.json": lambda p, t: p.write_bytes(_array(t, None)),
    "pretty.json": lambda p, t: p.write_bytes(_array(t, 2)),
    "array.json.gz": lambda p, t: p.write_bytes(gzip.compress(_array(t, 1))),
    "a.parquet": _parquet,
    "stream.arrow": lambda p, t: _arrow(p, t, True),
    "file.arrow": lambda p, t: _arrow(p, t, False),
    "file.feather": lambda p, t: _arrow(p, t, False),
}  # fmt: skip


def _zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a.txt", "text")


def _tar(path: Path) -> None:
    with tarfile.open(path, "w") as file:
        file.addfile(tarfile.TarInfo("a.txt"), io.BytesIO())


def _sqlite(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("create table t (text)")
    connection.close()


FOREIGN_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a.npy": (lambda p: np.save(p, np.arange(9)), "a NumPy array.*tofile"),
    "a.npz": (lambda p: np.savez(p, a=np.arange(9)), "a zip archive"),
    "a.zip": (_zip, "a zip archive"),
    "a.pt": (lambda p: torch.save({}, p), "a zip archive"),
    "a.tar": (_tar, "a tar archive"),
    "a.txt.bz2": (lambda p: p.write_bytes(bz2.compress(b"text")), "bzip2"),
    "a.jsonl.xz": (lambda p: p.write_bytes(lzma.compress(b"{}")), "xz"),
    "a.db": (_sqlite, "SQLite"),
    "a.pkl": (lambda p: p.write_bytes(pickle.dumps({"text": "a"})), "a Python pickle"),
    "a.safetensors": (lambda p: save_file({"w": np.zeros(3)}, p), "safetensors.*--load"),
    "a.png": (lambda p: p.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(20)), "a PNG image"),
    "a.pdf": (lambda p: p.write_bytes(b"%PDF-1.7\n"), "a PDF"),
    "a.txt": (lambda p: p.write_text("text", encoding="utf-16"), "UTF-16"),
    "a.csv": (lambda p: p.write_text("text,n\na,1\n"), r"a \.csv file.*JSON Lines or Parquet"),
    "a.xml": (lambda p: p.write_text("<a/>"), r"a \.xml file"),
    "lfs.parquet": (lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "Git LFS pointer"),
    "one.json": (lambda p: p.write_text('{\n "text": "a"\n}\n'), "neither JSON Lines nor a JSON array.*jq -c"),
    "a.dat": (lambda p: p.write_bytes(bytes(range(256))), "binary data of an unknown kind"),
    "a.xyz": (lambda p: p.write_text("who knows"), "of a kind that is not read"),
    "packed.npy.gz": (lambda p: p.write_bytes(gzip.compress(b"\x93NUMPY\x01\0")), "a NumPy array"),
    "a.idx": (lambda p: p.write_bytes(b"MMIDIDX\0\0"), "an index"),
    "empty.jsonl": (lambda p: p.write_bytes(b""), "empty"),
    "cut.jsonl.gz": (lambda p: p.write_bytes(gzip.compress(b'{"text": "a"}\n' * 99)[:-12]), "truncated or damaged"),
}  # fmt: skip
