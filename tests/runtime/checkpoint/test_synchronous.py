"""Saves without copies: the same files as with them, in a little memory, and by themselves where memory is short."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint import HuggingFaceStorageReader, load

from moeconv.checking import verify
from moeconv.checkpoint import open_checkpoint
from moeconv.io.manifest import MANIFEST
from runtime import trainer
from runtime.checkpoint import bounce, host_buffer, writer
from runtime.checkpoint.bounce import Bounce, Staged
from runtime.host_memory import available_memory
from runtime.parallel.masters import join, split
from tests.runtime.checkpoint.test_host_buffer import expected, make_tensors
from tests.runtime.launch import run_here
from tests.runtime.tiny import make_checkpoint

COMMON = "--seq-length 16 --micro-batch-size 2 --lr 3e-3 --mock-data --num-workers 0 --bf16 --moments-dtype bfloat16"
REMAINDERS = "--master-weights remainder"
HOST = "--optimizer-cpu-offload"


def written(tensors: tuple[torch.Tensor, ...]) -> list[bytes]:
    return [piece.tobytes() for piece in Staged(tensors, Bounce()).pieces()]


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(bounce, "PIECE", 96)
    return 96


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


def test_pieces_are_the_tensors_row_major(small_pieces: int) -> None:
    deep = torch.arange(4 * 5 * 6 * 7).view(4, 5, 6, 7).transpose(0, 2)
    for tensor in [*make_tensors(), deep, deep[1], deep[:, :, 1:3]]:
        pieces = written((tensor,))
        assert b"".join(pieces) == expected(tensor), tensor.shape
        assert all(len(piece) <= small_pieces for piece in pieces)
        assert len(pieces) <= max(1, tensor.nbytes)


def test_masters_are_put_together_piece_by_piece(small_pieces: int) -> None:
    masters = torch.randn(37, 13)
    weight, remainder = split(masters)
    spread = torch.empty(37, 26, dtype=torch.bfloat16)[:, ::2].copy_(weight)
    for halves in ((weight, remainder), (spread, remainder)):
        pieces = written(halves)
        assert b"".join(pieces) == join(weight, remainder).numpy().tobytes() == masters.numpy().tobytes()
        assert len(pieces) > 10
        assert all(len(piece) <= small_pieces for piece in pieces)


def train(model: Path, save: Path, words: str) -> list[str]:
    """A run in this process, as its only rank; what it printed."""
    return run_here(["--load", model, "--save", save, *COMMON.split(), *words.split()])


def files(path: Path) -> dict[str, bytes]:
    """All that a checkpoint holds of tensors, and what its manifest says of them."""
    manifest = json.loads((path / MANIFEST).read_text())
    return {file.name: file.read_bytes() for file in sorted(path.glob("*.safetensors"))} | {
        MANIFEST: json.dumps(manifest["files"], sort_keys=True).encode()
    }


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_files_are_those_of_asynchronous_saves(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    allocate = host_buffer.allocate
    monkeypatch.setattr(host_buffer, "allocate", lambda size: taken.append(size) or allocate(size))
    steps = f"--train-iters 3 --save-interval 1 {REMAINDERS}"
    train(model, tmp_path / "with", steps)
    assert taken, "the first save had a copy"
    taken.clear()
    train(model, tmp_path / "flag", f"{steps} --no-async-save")
    train(model, tmp_path / "host", f"{steps} {HOST}")
    (tmp_path / "machine/proc").mkdir(parents=True)
    (tmp_path / "machine/proc/meminfo").write_text("MemTotal: 24684084 kB\nMemAvailable: 70 kB\n")
    available = partial(available_memory, tmp_path / "machine")
    monkeypatch.setattr(trainer, "Saver", partial(writer.Saver, available=available))
    printed = train(model, tmp_path / "short", steps)
    assert not taken
    for i in (1, 2, 3):
        want = files(tmp_path / "with" / f"iter_000000{i}")
        assert all(files(tmp_path / name / f"iter_000000{i}") == want for name in ("flag", "host", "short"))
    notes = [line for line in printed if "this save is synchronous" in line]
    assert len(notes) == 2, "the run waits for its last save in any case"
    assert "which has 0.00 GB available" in notes[0]
    last = tmp_path / "flag" / "latest"
    found = {name: tensor for file in last.glob("*.safetensors") for name, tensor in load_file(file).items()}
    ours = open_checkpoint(last)
    assert verify(ours) > 0
    state = {name: torch.zeros_like(tensor) for name, tensor in found.items()}
    load(state, storage_reader=HuggingFaceStorageReader(str(last)), no_dist=True)
    assert any(name.startswith("optimizer.master.") for name in found)
    for name, tensor in found.items():
        assert torch.equal(state[name], tensor)
        assert ours.read(name).tobytes() == expected(tensor)


LIMITED = """
import json, resource, sys
from pathlib import Path
import torch
from moeconv.io.manifest import MANIFEST
from moeconv.io.shards import ShardEntry
from moeconv.layout.rect import Rect
from runtime.checkpoint.writer import Saver

root, SIZE, ROOM = Path(sys.argv[1]), 1 << 27, 96 << 20
tensor = torch.arange(SIZE // 4, dtype=torch.int32).view(-1, 1024).t()
notes = []
saver = Saver(root, None, keep_last=1, note=notes.append)

def save(iteration):
    shape = tuple(tensor.shape)
    (data,) = saver.stage([tensor])
    entry = ShardEntry("w", "I32", shape, Rect((0, 0), shape), data)
    saver.save(iteration, {"w.safetensors": [entry]}, lambda folder, _: (folder / MANIFEST).write_text("{}"))
    return saver.wait()

virtual = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (virtual + ROOM, resource.RLIM_INFINITY))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
first = save(1)
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE // 2, resource.RLIM_INFINITY))
second = save(2)
synchronous = saver.synchronous
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
latest = (root / "latest").resolve().name
left = [path.name for path in root.iterdir()]
third = save(3)
print(json.dumps({"errors": [o.error for o in (first, second, third)], "grown": grown, "notes": notes, "latest": latest,
    "left": left, "synchronous": [synchronous, saver.synchronous]}))
"""


def test_a_process_without_the_memory_saves_all_the_same(tmp_path: Path) -> None:
    # Every thread would take 64 MiB of addresses for memory of its own, and with it the next one's room.
    env = os.environ | {"MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, "-c", LIMITED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    first, second, third = found["errors"]
    assert first is third is None
    assert "File too large" in second
    assert found["grown"] < 32 << 20, "two pieces, and not the tensor's 128 MiB"
    assert len(found["notes"]) == 2
    assert "0.1 GB of host memory are needed here: Cannot allocate memory" in found["notes"][0]
    assert found["latest"] == "iter_0000001"
    assert sorted(found["left"]) == ["iter_0000001", "latest"]
    assert found["synchronous"] == [True, False]
    (path,) = tmp_path.glob("iter_*")
    want = torch.arange(1 << 25, dtype=torch.int32).view(-1, 1024).t()
    assert torch.equal(load_file(path / "w.safetensors")["w"], want)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_tensors_of_a_gpu_come_through_two_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    own = Bounce()
    large = torch.arange(5 << 20, device="cuda") * 3
    masters = torch.randn(3 << 22, device="cuda")
    weight, remainder = split(masters)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for tensors in ((large,), (weight, remainder), (weight, remainder.cpu())):
        pieces = [piece.tobytes() for piece in Staged(tensors, own).pieces()]
        want = expected(large if len(tensors) == 1 else masters)
        assert b"".join(pieces) == want
        assert len(pieces) == -(-len(want) // bounce.PIECE) > 4
    assert torch.cuda.max_memory_allocated() == before
    assert own.nbytes < 2.01 * bounce.PIECE
    assert own._buffer.memory.is_pinned()
    reading = own.read([large])
    next(reading)  # broken off, as by a full disk
    assert b"".join(piece.tobytes() for piece in Staged((weight, remainder), own).pieces()) == expected(masters)
    monkeypatch.setattr(bounce, "PIECE", 96)
    for tensor in make_tensors("cuda"):
        assert b"".join(piece.tobytes() for piece in Staged((tensor,), Bounce()).pieces()) == expected(tensor)


SECOND_GPU = """
import sys
from pathlib import Path
import torch
from moeconv.io.manifest import MANIFEST
from moeconv.io.shards import ShardEntry
from moeconv.layout.rect import Rect
from runtime.checkpoint.writer import Saver, check

torch.cuda.set_device(1)
tensor = torch.arange(1 << 22, device="cuda", dtype=torch.int32)
saver = Saver(Path(sys.argv[1]), None, keep_last=1, asynchronous=False)
entry = ShardEntry("w", "I32", (1 << 22,), Rect((0,), (1 << 22,)), *saver.stage([tensor]))
saver.save(1, {"w.safetensors": [entry]}, lambda folder, _: (folder / MANIFEST).write_text("{}"))
check(saver.wait())
print([torch._C._cuda_hasPrimaryContext(number) for number in (0, 1)])
"""


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
def test_a_rank_saves_without_touching_the_first_gpu(tmp_path: Path) -> None:
    words = [sys.executable, "-c", SECOND_GPU, str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[False, True]", done.stderr
    stored = load_file(tmp_path / "latest" / "w.safetensors")["w"]
    assert torch.equal(stored, torch.arange(1 << 22, dtype=torch.int32))
