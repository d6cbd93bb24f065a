"""The host memory of saves: exact bytes, allocated once, never overwritten while a save reads it."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from moeconv.io.manifest import MANIFEST, FileRecord
from moeconv.io.shards import ShardEntry
from moeconv.layout.rect import Rect
from runtime.checkpoint.host_buffer import ALIGNMENT, HostBuffer
from runtime.checkpoint.writer import Saver, check
from runtime.host_memory import HostMemoryError, page_lock

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def make_tensors(device: str = "cpu") -> list[torch.Tensor]:
    """Tensors of every kind of shape and stride, in odd sizes, so that alignment needs gaps."""
    torch.manual_seed(0)
    out = []
    for dtype in FLOATS:
        base = torch.randn(37, 13, device=device).to(dtype)
        out += [base, base.t(), base[:, 3:8], base[::2, ::3], base[5], base[0, 0], base[:1].expand(4, 13)]
        out += [base[:0], base.new_empty(3, 0), torch.nn.Parameter(base[1:2])]
    out += [torch.arange(7, device=device), torch.tensor([True, False, True], device=device)]
    return out


def expected(tensor: torch.Tensor) -> bytes:
    """What numpy says the row-major bytes are; it has no bfloat16, but integers as wide."""
    return tensor.detach().cpu().view(BITS[tensor.element_size()]).numpy().tobytes()


class FakeRuntime:
    """Stands for CUDA's runtime; keeps what it was asked."""

    def __init__(self, status: int = 0) -> None:
        self.status, self.calls = status, list[tuple[str, int]]()

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:
        self.calls.append(("lock", address))
        return self.status

    def cudaHostUnregister(self, address: int) -> int:
        self.calls.append(("unlock", address))
        return 0


def write_manifest(folder: Path, records: list[FileRecord]) -> None:
    (folder / MANIFEST).write_text("{}")


def files_of(saver: Saver, tensor: torch.Tensor) -> dict[str, list[ShardEntry]]:
    (data,) = saver.stage([tensor])
    shape = tuple(tensor.shape)
    return {"weights.safetensors": [ShardEntry("w", "BF16", shape, Rect((0,) * len(shape), shape), data)]}


def written(entry: ShardEntry) -> bytes:
    assert not isinstance(entry.data, np.ndarray)
    return b"".join(piece.tobytes() for piece in entry.data.pieces())


def test_bytes_are_the_tensors_row_major_and_aligned() -> None:
    tensors = make_tensors()
    staged = HostBuffer().stage(tensors)
    for tensor, data in zip(tensors, staged, strict=True):
        assert (data.dtype, data.shape) == (np.uint8, (tensor.nbytes,))
        assert data.tobytes() == expected(tensor), tensor
        assert data.nbytes == 0 or data.ctypes.data % ALIGNMENT == 0
    assert HostBuffer().stage([]) == []
    assert [data.size for data in HostBuffer().stage([torch.empty(0)])] == [0]


def test_the_memory_is_reused_until_more_is_needed() -> None:
    buffer = HostBuffer()
    buffer.stage([torch.zeros(1000), torch.zeros(10)])
    address, size = buffer.memory.data_ptr(), buffer.memory.nbytes
    for tensors in ([torch.ones(1000), torch.ones(10)], [torch.full((10,), 2.0)]):
        staged = buffer.stage(tensors)
        assert [data.tobytes() for data in staged] == [expected(tensor) for tensor in tensors]
        assert (buffer.memory.data_ptr(), buffer.memory.nbytes) == (address, size)
    large = torch.randn(100_000)
    (data,) = buffer.stage([large])
    assert data.tobytes() == expected(large)
    assert buffer.memory.nbytes == large.nbytes


def test_memory_is_locked_once_and_unlocked_before_it_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeRuntime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: fake)
    buffer = HostBuffer()
    buffer.reserve(0, page_locked=True)  # CUDA refuses to lock nothing
    buffer.reserve(1000, page_locked=False)
    assert fake.calls == []
    buffer.reserve(1000, page_locked=True)
    buffer.reserve(500, page_locked=True)
    first = buffer.memory.data_ptr()
    assert fake.calls == [("lock", first)]
    old = buffer.memory  # keeps the address from being handed out again
    buffer.reserve(2**20, page_locked=True)
    second = buffer.memory.data_ptr()
    assert fake.calls == [("lock", first), ("unlock", first), ("lock", second)]
    del buffer, old
    assert fake.calls[3:] == [("unlock", second)]


def test_memory_that_cannot_be_locked_is_used_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, notes = FakeRuntime(status=2), list[str]()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: fake)
    buffer = HostBuffer(notes.append)
    for size in (1000, 1000, 2**20):
        buffer.reserve(size, page_locked=True)
    assert buffer.memory.nbytes == 2**20
    assert len(notes) == 1
    assert "error 2" in notes[0]
    buffer.close()
    assert [what for what, _ in fake.calls] == ["lock"]
    with pytest.warns(UserWarning, match="page-locked"):
        HostBuffer().reserve(1000, page_locked=True)


def test_too_little_memory_says_how_much_is_needed() -> None:
    with pytest.raises(HostMemoryError, match=r"1125899\.9 GB"):
        HostBuffer().reserve(2**50, page_locked=False)


def test_what_was_staged_is_written_whatever_training_does_meanwhile(tmp_path: Path) -> None:
    saver = Saver(tmp_path, None, keep_last=0)
    live = torch.randn(64, 32).bfloat16()
    for iteration in (1, 2):
        before = live.clone()
        files = files_of(saver, live)
        live.copy_(torch.randn(64, 32))
        saver.save(iteration, files, write_manifest)
        live.copy_(torch.randn(64, 32))
        outcome = saver.wait()
        assert outcome is not None
        check(outcome)
        assert outcome.path is not None
        assert torch.equal(load_file(outcome.path / "weights.safetensors")["w"], before)


def test_nothing_is_staged_while_a_save_is_not_waited_for(tmp_path: Path) -> None:
    saver, may_end = Saver(tmp_path, None, keep_last=0), threading.Event()
    first, second = torch.ones(8).bfloat16(), torch.zeros(8).bfloat16()
    files = files_of(saver, first)

    def commit(folder: Path, records: list[FileRecord]) -> None:
        assert may_end.wait(60)
        write_manifest(folder, records)

    saver.save(1, files, commit)
    try:
        with pytest.raises(RuntimeError, match="wait for it first"):
            saver.stage([second])
        with pytest.raises(RuntimeError, match="wait for it first"):
            saver.save(2, files, commit)
        assert written(files["weights.safetensors"][0]) == expected(first)
    finally:
        may_end.set()
    outcome = saver.wait()
    assert outcome is not None
    check(outcome)
    assert written(files_of(saver, second)["weights.safetensors"][0]) == expected(second)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_tensors_of_a_gpu_come_through_page_locked_memory() -> None:
    buffer = HostBuffer()
    tensors = [*make_tensors("cuda"), *make_tensors()]
    wanted = [expected(tensor) for tensor in tensors]
    staged = buffer.stage(tensors)
    for tensor in tensors:
        tensor.detach().untyped_storage().fill_(0)
    torch.cuda.synchronize()
    assert [data.tobytes() for data in staged] == wanted
    assert buffer.memory.is_pinned()
    address = buffer.memory.data_ptr()
    (data,) = buffer.stage([torch.full((9, 5), 3.0, device="cuda").t()])
    assert (data.tobytes(), buffer.memory.data_ptr()) == (np.full(45, 3, np.float32).tobytes(), address)
    large = torch.arange(2**26, device="cuda")
    (data,) = buffer.stage([large])
    assert data.view(np.int64)[-1] == 2**26 - 1  # looked at first: milliseconds late, if nobody waits for the copy
    assert np.array_equal(data.view(np.int64), np.arange(2**26))
    assert buffer.memory.is_pinned()
    memory = buffer.memory
    buffer.close()
    assert not memory.is_pinned()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_refused_page_lock_leaves_no_error_for_the_next_kernel() -> None:
    buffer = HostBuffer()
    buffer.reserve(2**20, page_locked=True)
    assert page_lock(buffer.memory) is not None  # locked already
    assert torch.ones(3, device="cuda").sum().item() == 3
