"""torch.save's archives without torch, and pickles as data: nothing in them is executed."""

from __future__ import annotations

import argparse
import io
import os
import pickle
import struct
import sys
import zipfile
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

from moeconv.errors import SourceError
from moeconv.io.pickling import Call, Instance, dump_pickle
from moeconv.io.torch_archive import lay_out_archive, read_archive, small_archive, tensor_value, whole_tensor
from moeconv.io.unpickle import Opaque, Symbol, TensorRef, load_pickle

PLAIN = {"a": [1, -2, 300, 2**40, -(2**70), 1.5, None, True, False], "b": (1, 2, 3, 4, ()), "c": {"d": "e" * 300}}


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("function", [os.system, eval, exec, __import__, open, sys.exit], ids=str)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_no_code_is_run(tmp_path: Path, function: Any, protocol: int) -> None:
    target = tmp_path / "touched"
    data = pickle.dumps({"model": Evil(function, f"open({str(target)!r}, 'w')")}, protocol=protocol)
    with pytest.raises(SourceError, match=f"calls for .*{function.__name__}.*never executes a pickle"):
        load_pickle(data, "file")
    assert not target.exists()


def test_state_for_a_function_is_refused() -> None:
    """BUILD sets attributes of what is on the stack: a pickle must not reach into our functions."""
    rebuild = Symbol("torch._utils", "_rebuild_tensor_v2")
    data = dump_pickle(rebuild)[:-1] + dump_pickle({"__defaults__": (1,)})[2:-1] + b"b."
    with pytest.raises(SourceError, match="state for the function"):
        load_pickle(data, "file")


@pytest.mark.parametrize("data", [b"", b"\x80\x02", b"garbage", b"\x80\x02}q\x00(X\xff\xff\xff\xff", b"(" * 100 + b"."])
def test_damaged_pickles(data: bytes) -> None:
    with pytest.raises(SourceError, match="file: its pickle"):
        load_pickle(data, "file")


def test_plain_data_in_and_out() -> None:
    assert pickle.loads(dump_pickle(PLAIN)) == PLAIN
    assert load_pickle(dump_pickle(PLAIN), "file") == PLAIN
    for protocol in range(5):
        assert load_pickle(pickle.dumps(PLAIN, protocol=protocol), "file") == PLAIN


def test_absent_classes_are_records() -> None:
    enum = Call(Symbol("megatron.core.transformer.enums", "AttnBackend"), (5,))
    args = Instance(Symbol("argparse", "Namespace"), {"backend": enum, "dtype": Symbol("torch", "bfloat16")})
    before = set(sys.modules)
    read = load_pickle(dump_pickle(args), "file")
    assert set(sys.modules) == before
    assert isinstance(read, Opaque)
    assert read.get("dtype") == Symbol("torch", "bfloat16")
    assert (read.get("backend").name, read.get("backend").args) == ("AttnBackend", (5,))


def test_torch_save_files_are_read(tmp_path: Path) -> None:
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    kinds = [torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn]
    state = {"base": base, "rows": base[1:3], "turned": base.T, "p": torch.nn.Parameter(base.clone())}
    state |= {str(kind): base.to(kind) for kind in kinds}
    torch.save(state, tmp_path / "x.pt")
    archive, raw = read_archive(tmp_path / "x.pt"), (tmp_path / "x.pt").read_bytes()
    for name, value in state.items():
        ref = archive.root[name]
        assert isinstance(ref, TensorRef)
        assert (ref.shape, ref.strides) == (tuple(value.shape), value.stride())
        if value.is_contiguous():
            size = value.numel() * value.element_size()
            begin = archive.begin(ref)
            assert raw[begin : begin + size] == value.detach().view(torch.uint8).numpy().tobytes(), name


def filled(tensors: dict[str, torch.Tensor]) -> bytes:
    kinds = {torch.bfloat16: "BF16", torch.int64: "I64", torch.uint8: "U8"}
    refs = {n: whole_tensor(str(i), kinds[t.dtype], tuple(t.shape)) for i, (n, t) in enumerate(tensors.items())}
    root = {"model": Call(Symbol("collections", "OrderedDict"), ([(n, tensor_value(r)) for n, r in refs.items()],))}
    root["args"] = Instance(Symbol("argparse", "Namespace"), {"x": 1})  # type: ignore[assignment]
    data = [t.contiguous().view(torch.uint8).numpy().tobytes() for t in tensors.values()]
    layout = lay_out_archive("archive", dump_pickle(root), ((str(i), len(d)) for i, d in enumerate(data)))
    out = bytearray(layout.size)
    for position, literal in layout.literals:
        out[position : position + len(literal)] = literal
    for record, content in zip(layout.records, data, strict=True):
        assert record.begin % 64 == 0
        out[record.begin : record.begin + record.size] = content
        for where in record.crc_at:
            struct.pack_into("<I", out, where, zlib.crc32(content))
    return bytes(out)


def test_torch_load_reads_what_we_lay_out(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(7, 5).bfloat16(), "b": torch.arange(9), "empty": torch.empty(0, dtype=torch.uint8)}
    raw = filled(tensors)
    assert zipfile.ZipFile(io.BytesIO(raw)).testzip() is None
    (tmp_path / "x.pt").write_bytes(raw)
    for mmap in (False, True):
        with torch.serialization.safe_globals([argparse.Namespace]):
            loaded = torch.load(tmp_path / "x.pt", weights_only=True, mmap=mmap)
        assert loaded["args"] == argparse.Namespace(x=1)
        assert all(torch.equal(loaded["model"][n], t) for n, t in tensors.items())


def test_archives_beyond_four_gigabytes(tmp_path: Path) -> None:
    """Sparse: nothing is written but headers and the last bytes."""
    size = (4 << 30) + 512
    refs = [whole_tensor("0", "U8", (size,)), whole_tensor("1", "U8", (3,))]
    layout = lay_out_archive("archive", dump_pickle([tensor_value(r) for r in refs]), [("0", size), ("1", 3)])
    path = tmp_path / "big.pt"
    with open(path, "wb") as file:
        file.truncate(layout.size)
        for position, literal in layout.literals:
            file.seek(position)
            file.write(literal)
        file.seek(layout.records[1].begin)
        file.write(b"abc")
        file.seek(layout.records[0].begin + size - 1)
        file.write(b"z")
    archive = read_archive(path)
    assert [archive.begin(r) for r in archive.root] == [r.begin for r in layout.records]
    large, small = torch.load(path, weights_only=True, mmap=True)
    assert (large.numel(), int(large[-1]), bytes(small.tolist())) == (size, ord("z"), b"abc")


def test_refused_archives(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", dump_pickle({}) + b"\0" * 1000)
    with pytest.raises(SourceError, match="compressed"):
        read_archive(path)
    torch.save({"a": torch.zeros(2)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(SourceError, match=r"before torch 1\.6"):
        read_archive(path)
    small = bytearray(small_archive("archive", {"a": 1}))
    path.write_bytes(small[:-30])
    with pytest.raises(SourceError, match="truncated"):
        read_archive(path)
    with pytest.raises(SourceError, match="No such file"):
        read_archive(tmp_path / "absent")
    ref = tensor_value(whole_tensor("0", "F32", (100,)))
    path.write_bytes(small_archive("archive", ref))
    archive = read_archive(path)
    with pytest.raises(SourceError, match="storage 0 is missing"):
        archive.begin(archive.root)
