"""What a data file is, by its content; what isn't known is named, never read as text."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import IO, Any, Literal, cast

from runtime.data.errors import DataError, need

Compression = Literal["gzip", "zstd"]


class Kind(Enum):
    """The kinds of data files that are read."""

    JSON_LINES = "JSON Lines"
    JSON_ARRAY = "JSON array"
    TEXT = "plain text"
    PARQUET = "Parquet"
    ARROW = "Arrow"
    TOKENS = "token ids"


@dataclass(frozen=True, slots=True)
class DataFile:
    """A data file that can be read."""

    path: Path
    kind: Kind
    compression: Compression | None = None


JSON_SUFFIXES = (".jsonl", ".ndjson", ".jsonlines", ".jl", ".json")
TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst", ".tex", ".py", ".c", ".h", ".cc", ".cpp", ".cu", ".go", ".java", ".js", ".ts",
                 ".rs", ".sh", ".rb")  # fmt: skip
_COMPRESSED_SUFFIXES = (".gz", ".zst", ".zstd")
_HEAD = 1 << 16
_ZSTD_CHUNK = 1 << 14
_GZIP, _ZSTD, _PARQUET = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PAR1"
_ARROW_FILE, _ARROW_STREAM = b"ARROW1\0\0", b"\xff\xff\xff\xff"
_TO_PLAIN = "unpack it, or pack it as .gz or .zst"
_WEIGHTS = "weights are loaded with --load"
# Bytes at an offset -> what such a file is, and what to do.
_FOREIGN: tuple[tuple[int, bytes, str, str], ...] = (
    (0, b"\x93NUMPY", "a NumPy array", "save the ids as a bare .bin file: numpy.load(FILE).tofile(OUT), and say --bare-dtype"),
    (0, b"PK\x03\x04", "a zip archive (or .npz, .docx, a PyTorch file)", "unpack it, and give the data files in it"),
    (0, b"BZh", "bzip2", _TO_PLAIN),
    (0, b"\xfd7zXZ\0", "xz", _TO_PLAIN),
    (0, b"\x04\x22\x4d\x18", "lz4", _TO_PLAIN),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", _TO_PLAIN),
    (257, b"ustar", "a tar archive", "unpack it, and give the data files in it"),
    (0, b"\x89HDF\r\n\x1a\n", "HDF5", "write its text as JSON Lines or Parquet"),
    (0, b"SQLite format 3\0", "an SQLite database", "write its text as JSON Lines or Parquet"),
    (0, b"ORC", "ORC", "write it as Parquet"),
    (0, b"Obj\x01", "Avro", "write it as Parquet"),
    (0, b"%PDF", "a PDF", "extract its text"),
    (0, b"\x89PNG", "a PNG image", "only text is read"),
    (0, b"\xff\xd8\xff", "a JPEG image", "only text is read"),
    (0, b"GIF8", "a GIF image", "only text is read"),
    (0, b"\x7fELF", "a program", "only text is read"),
    (0, b"GGUF", "GGUF weights", _WEIGHTS),
    (0, b"\x80\x02", "a Python pickle", "write its text as JSON Lines; pickles are never executed"),
    (0, b"\x80\x04", "a Python pickle", "write its text as JSON Lines; pickles are never executed"),
    (0, b"\xff\xfe", "UTF-16 text", "convert it: iconv -f UTF-16 -t UTF-8"),
    (0, b"\xfe\xff", "UTF-16 text", "convert it: iconv -f UTF-16 -t UTF-8"),
    (0, b"version https://git-lfs", "a Git LFS pointer: the file itself was not downloaded", "git lfs pull"),
    (0, b"MMIDIDX", "an index of Megatron's token files", "give the .bin file, or both without a suffix"),
)  # fmt: skip
_TABLES = (".csv", ".tsv", ".xml", ".html", ".htm", ".yaml", ".yml", ".toml", ".ini", ".log", ".xlsx", ".xls")


def recognise(path: Path) -> DataFile:
    """Find out what a file is.

    Args:
        path: an existing file.

    Returns:
        The file with its kind.

    Raises:
        DataError: it is of a kind that isn't read; says which and what to do.
    """
    suffix = _plain_suffix(path)
    if path.suffix == ".bin":
        return DataFile(path, Kind.TOKENS)
    head = _head(path)
    if not head:
        raise DataError(f"{path}: empty; expected data")
    compression: Compression | None = None
    if head.startswith((_GZIP, _ZSTD)):
        compression = "gzip" if head.startswith(_GZIP) else "zstd"
        packed = DataFile(path, Kind.TEXT, compression)
        with open(path, "rb") as raw, decompressing(path), open_bytes(raw, packed) as stream:
            head = stream.read(_HEAD)
    elif head.startswith(_PARQUET):
        return DataFile(path, Kind.PARQUET)
    elif head.startswith((_ARROW_FILE, _ARROW_STREAM)):
        return DataFile(path, Kind.ARROW)
    return DataFile(path, _of_content(path, suffix, head), compression)


def _plain_suffix(path: Path) -> str:
    """The suffix that says what is inside a compressed file, lower case."""
    name = path.name.lower()
    for packed in _COMPRESSED_SUFFIXES:
        name = name.removesuffix(packed)
    return Path(name).suffix


def _head(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(_HEAD)
    except OSError as error:
        raise DataError(f"{path}: can't be read: {error.strerror or error}") from None


def _of_content(path: Path, suffix: str, head: bytes) -> Kind:
    for offset, magic, name, remedy in _FOREIGN:
        if head[offset:].startswith(magic):
            raise DataError(f"{path}: is {name}, which is not read as training data; {remedy}")
    if head[8:10] == b'{"' and int.from_bytes(head[:8], "little") < 1 << 30:
        raise DataError(f"{path}: is safetensors, which is not read as training data; {_WEIGHTS}")
    if suffix in _TABLES:
        raise DataError(
            f"{path}: is a {suffix} file, which is not read as training data; write its text as JSON Lines or Parquet, "
            "or name it .txt where it is to be read as it stands"
        )
    if b"\0" in head:
        raise DataError(f"{path}: holds binary data of an unknown kind; {_readable()}")
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if suffix in TEXT_SUFFIXES[1:] or (suffix == ".txt" and not _is_json_line(head)):
        return Kind.TEXT
    if suffix in JSON_SUFFIXES and suffix != ".json":
        return Kind.JSON_LINES
    if start == b"[" and not _is_json_line(head):
        return Kind.JSON_ARRAY
    if start == b"{" and _is_json_line(head):
        return Kind.JSON_LINES
    if suffix == ".json":
        raise DataError(
            f"{path}: is neither JSON Lines nor a JSON array (its first line is no whole object); "
            "write one object a line: jq -c . FILE"
        )
    raise DataError(f"{path}: is of a kind that is not read as training data; {_readable()}")


def _readable() -> str:
    return (
        "JSON Lines, JSON arrays, plain text (.txt), all of them as .gz or .zst too, Parquet, Arrow and Megatron's "
        ".bin with .idx are read"
    )


def _is_json_line(head: bytes) -> bool:
    """Whether the first line that isn't blank is a whole JSON object; one that is longer than the head counts as one."""
    line, newline, _ = head.removeprefix(b"\xef\xbb\xbf").lstrip().partition(b"\n")
    if not line.startswith(b"{"):
        return False
    if not newline and len(head) == _HEAD:
        return True
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def open_bytes(raw: IO[bytes], file: DataFile) -> IO[bytes]:
    """Read a file decompressed.

    Args:
        raw: the open file.
        file: says how it is compressed.

    Returns:
        The stream of its content; closing it may close `raw`.

    Raises:
        DataError: the library that decompresses isn't installed.
    """
    if file.compression is None:
        return raw
    if file.compression == "gzip":
        return cast(IO[bytes], gzip.GzipFile(fileobj=raw, mode="rb"))
    try:
        import zstandard
    except ImportError:
        raise need("zstandard", f"{file.path} (compressed with zstd)") from None
    return io.BufferedReader(_Frames(raw, zstandard.ZstdDecompressor().decompressobj), 1 << 20)


class _Frames(io.RawIOBase):
    """Zstandard frames, one behind the other. The library's own reader takes a file that was cut off for a whole one."""

    def __init__(self, raw: IO[bytes], begin_frame: Callable[[], Any]) -> None:
        self._raw, self._begin_frame = raw, begin_frame
        self._frame: Any = None
        self._waiting = b""

    def readable(self) -> bool:
        """Say that it can be read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer with what comes next; 0 at the end.

        Raises:
            EOFError: the file ends within a frame.
        """
        while not self._waiting:
            packed = self._frame.unused_data if self._frame is not None and self._frame.eof else b""
            packed = packed or self._raw.read(_ZSTD_CHUNK)
            if not packed:
                if self._frame is not None and not self._frame.eof:
                    raise EOFError("it ends within a frame")
                return 0
            if self._frame is None or self._frame.eof:
                self._frame = self._begin_frame()
            self._waiting = self._frame.decompress(packed)
        count = min(len(buffer), len(self._waiting))
        buffer[:count], self._waiting = self._waiting[:count], self._waiting[count:]
        return count


@contextmanager
def decompressing(path: Path) -> Iterator[None]:
    """Turn what decompressors raise for damaged files into an error that names the file.

    Args:
        path: the file.

    Raises:
        DataError: the file is truncated or damaged.
    """
    try:
        yield
    except Exception as error:
        # zstandard may not be installed, so its error is known by its name.
        if isinstance(error, EOFError | gzip.BadGzipFile | zlib.error) or type(error).__name__ == "ZstdError":
            raise DataError(f"{path}: is truncated or damaged ({error}); copy or download it again") from None
        raise
