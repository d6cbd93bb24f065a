"""A conversion is whole or not there: kills at any point, resuming, and outputs that can't be written."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from moeconv.checkpoint import open_checkpoint
from moeconv.convert import Options, write_hf, write_sharded
from moeconv.errors import IntegrityError, MoeconvError, SourceError, WriteError
from moeconv.io.staging import JOURNAL
from moeconv.layout.degrees import Degrees
from tests.moeconv.models import Spec, digests, make_folder

ROOT = Path(__file__).parents[2]
DEGREES = Degrees(tp=2, ep=2, pp=2)
# argv: source, output, "shards" or "hf", resume, the number of the file system call that kills (0: never)
PROGRAM = """
import os, signal, sys, threading, time
from pathlib import Path
from moeconv.checkpoint import open_checkpoint
from moeconv.convert import Options, write_hf, write_sharded
from moeconv.layout.degrees import Degrees

source, out, form, resume, fatal = *map(str, sys.argv[1:4]), sys.argv[4] == "resume", int(sys.argv[5])
calls = 0

def watch(event, args):
    global calls
    if event == "open" and args[2] & os.O_DIRECTORY and threading.current_thread() is not threading.main_thread():
        return  # how often a worker opens a file anew depends on who takes which tensor
    if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.truncate", "write") and str(args[0]).startswith(out):
        calls += 1
        if calls == fatal:
            os.kill(os.getpid(), signal.SIGKILL)

def write(*args, pwrite=os.pwrite):
    watch("write", (out,))
    return pwrite(*args)

def progress(total):
    return lambda count: time.sleep(0.004) if not fatal else None

checkpoint = open_checkpoint(source)
options = Options(workers=2, resume=resume, progress=progress)
sys.addaudithook(watch)
os.pwrite = write
print("begun", flush=True)
if form == "hf":
    write_hf(checkpoint, Path(out), None, options)
else:
    write_sharded(checkpoint, Path(out), Degrees(tp=2, ep=2, pp=2), options)
print(calls, flush=True)
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "source", Spec(files=3, index=True, layers=4))


def start(source: Path, out: Path, form: str, resume: str = "", fatal: int = 0) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", PROGRAM, str(source), str(out), form, resume, str(fatal)]
    return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def kill_at(fatal: int, source: Path, out: Path, form: str, resume: str = "") -> None:
    with start(source, out, form, resume, fatal) as process:
        process.communicate()
    assert process.returncode == -signal.SIGKILL


def inodes(folder: Path) -> dict[str, tuple[int, int]]:
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in folder.glob("*.safetensors")}


def check_killed(out: Path, whole: dict[str, str]) -> dict[str, tuple[int, int]]:
    """Check that a killed run left a complete result or nothing that a reader accepts; give the finished files."""
    partial = out.with_name(out.name + ".partial")
    if out.exists():  # killed after the rename: complete, but for the journal's removal
        assert {n: d for n, d in digests(out).items() if n != JOURNAL} == whole
        assert not partial.exists()
        return {}
    if not partial.exists():
        return {}
    finished = inodes(partial)
    assert {n: digests(partial)[n] for n in finished} == {n: whole[n] for n in finished}
    try:
        accepted = open_checkpoint(partial)
    except MoeconvError:
        return finished
    assert accepted.kind == "sharded"  # its manifest comes last, so everything is there
    assert digests(partial).items() >= whole.items()
    return finished


def finish(source: Path, out: Path, form: str, whole: dict[str, str], finished: dict[str, tuple[int, int]]) -> None:
    """Resume a killed run in this process, and check that it gives the whole result and keeps what was finished."""
    if not out.exists():
        options = Options(resume=True)
        checkpoint = open_checkpoint(source)
        write_hf(checkpoint, out, None, options) if form == "hf" else write_sharded(checkpoint, out, DEGREES, options)
        assert digests(out) == whole
        # A file may have got its name just before the kill, without its line in the journal: at most one a worker is redone.
        redone = [name for name, before in finished.items() if inodes(out)[name] != before]
        assert len(redone) <= 2
    assert not out.with_name(out.name + ".partial").exists()


def reference(tmp_path: Path, source: Path, form: str) -> tuple[Path, dict[str, str]]:
    """Convert without interruption; give the input that the form of output takes, and the output's digests."""
    write_sharded(open_checkpoint(source), tmp_path / "shards", DEGREES, Options())
    if form == "shards":
        return source, digests(tmp_path / "shards")
    return tmp_path / "shards", digests(source)


@pytest.mark.parametrize("form", ["shards", "hf"])
def test_kill_at_random_times(tmp_path: Path, form: str) -> None:
    source = make_folder(tmp_path / "source", Spec(files=3, index=True, layers=4))
    path, whole = reference(tmp_path, source, form)
    before = digests(path)
    draw = random.Random()
    interrupted = 0
    for number in range(8):
        out = tmp_path / f"out{number}"
        with start(path, out, form) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "begun\n"
            time.sleep(draw.uniform(0, 0.2))
            process.send_signal(signal.SIGKILL)
        interrupted += not out.exists()
        finish(path, out, form, whole, check_killed(out, whole))
    assert interrupted
    assert digests(path) == before


@pytest.mark.parametrize("form", ["shards", "hf"])
def test_kill_at_each_stage_of_the_files(tmp_path: Path, form: str) -> None:
    """Kill on the way into a file system call: the first ones, the last ones (the commit's) and some between."""
    source = make_folder(tmp_path / "source", Spec(files=3, index=True, layers=2))
    path, whole = reference(tmp_path, source, form)
    with start(path, tmp_path / "counted", form) as process:
        assert process.stdout is not None
        calls = int(process.stdout.read().split()[-1])
    assert digests(tmp_path / "counted") == whole
    points = {1, 2, 3, *random.Random().sample(range(4, calls - 5), 3), *range(calls - 5, calls)}
    for fatal in sorted(points):
        out = tmp_path / f"out{fatal}"
        kill_at(fatal, path, out, form)
        finish(path, out, form, whole, check_killed(out, whole))


def test_killed_again_while_resuming(tmp_path: Path, source: Path) -> None:
    path, whole = reference(tmp_path, source, "shards")
    out, resume, kept = tmp_path / "out", "", dict[str, tuple[int, int]]()
    for fatal in (60, 60, 50, 40):
        kill_at(fatal, path, out, "shards", resume)
        now = check_killed(out, whole)
        assert len(now) >= len(kept)
        resume, kept = "resume", now
    finish(path, out, "shards", whole, kept)


@contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    """Let no file of this process grow beyond `limit` bytes: writing fails as on a full disk, and no signal is sent."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("limit", [0, 100, 5000, 9000])
def test_writing_fails_midway(tmp_path: Path, source: Path, limit: int) -> None:
    path, whole = reference(tmp_path, source, "shards")
    before, out = digests(source), tmp_path / "out"
    with file_size_limit(limit), pytest.raises(WriteError, match=r"out\.partial.*can't be written: File too large"):
        write_sharded(open_checkpoint(path), out, DEGREES, Options())
    assert not out.exists()
    assert digests(source) == before
    write_sharded(open_checkpoint(path), out, DEGREES, Options(resume=True))
    assert digests(out) == whole


def test_full_disk(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(WriteError, match=r"bytes are needed and 1,000 are free"):
        write_sharded(open_checkpoint(source), tmp_path / "out", DEGREES, Options())
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()
    write_sharded(open_checkpoint(source), tmp_path / "out", DEGREES, Options(resume=True))


def begun(tmp_path: Path, source: Path) -> tuple[Path, dict[str, str]]:
    """Leave a run behind in the middle."""
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    # Files are finished on a thread of their own: later and later, until a kill finds some finished and some not.
    for fatal in range(90, 200, 10):
        shutil.rmtree(partial, ignore_errors=True)
        kill_at(fatal, source, out, "shards")
        if list(partial.glob("*.safetensors")):
            break
    assert list(partial.glob("*.safetensors"))
    return out, digests(partial)


@pytest.mark.parametrize("change", ["content", "time", "replaced", "carried"])
def test_changed_source_is_noticed_on_resume(tmp_path: Path, source: Path, change: str) -> None:
    out, left = begun(tmp_path, source)
    path = source / "model-00002-of-00003.safetensors"
    if change == "content":  # same size, and the old modification time put back
        stat = path.stat()
        raw = bytearray(path.read_bytes())
        raw[-1] ^= 1
        path.write_bytes(raw)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    elif change == "time":
        os.utime(path)
    elif change == "replaced":
        shutil.copy2(path, tmp_path / "copy")
        os.replace(tmp_path / "copy", path)
    else:
        (source / "tokenizer.json").write_text("another")
    word = "small files" if change == "carried" else "source files"
    with pytest.raises(WriteError, match=rf"begun with other {word}"):
        write_sharded(open_checkpoint(source), out, DEGREES, Options(resume=True))
    assert not out.exists()
    assert digests(tmp_path / "out.partial") == left


def test_other_degrees_are_noticed_on_resume(tmp_path: Path, source: Path) -> None:
    out, left = begun(tmp_path, source)
    with pytest.raises(WriteError, match="begun with other options"):
        write_sharded(open_checkpoint(source), out, Degrees(tp=4), Options(resume=True))
    with pytest.raises(WriteError, match="--resume, or remove it"):
        write_sharded(open_checkpoint(source), out, DEGREES, Options())
    assert digests(tmp_path / "out.partial") == left


def test_source_that_changes_while_being_read(tmp_path: Path, source: Path) -> None:
    path = source / "model-00003-of-00003.safetensors"
    checkpoint = open_checkpoint(source)
    with pytest.raises(SourceError, match=r"model-00003-of-00003.safetensors changed while being read"):
        write_sharded(checkpoint, tmp_path / "out", DEGREES, Options(progress=lambda _: lambda _: os.utime(path)))
    assert not (tmp_path / "out").exists()


def test_two_runs_into_one_folder(tmp_path: Path, source: Path) -> None:
    seen: list[str] = []

    def second(_: int) -> None:
        if not seen:
            with pytest.raises(WriteError, match="another run is writing it") as caught:
                write_sharded(open_checkpoint(source), tmp_path / "out", DEGREES, Options(resume=True))
            seen.append(str(caught.value))

    options = Options(workers=1, progress=lambda _: second)
    write_sharded(open_checkpoint(source), tmp_path / "out", DEGREES, options)
    assert seen
    open_checkpoint(tmp_path / "out")


@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
def test_existing_output(tmp_path: Path, source: Path, kind: str) -> None:
    out = tmp_path / "out"
    if kind == "folder":
        out.mkdir()
        (out / "mine").write_text("precious")
    elif kind == "file":
        out.write_text("precious")
    else:
        out.symlink_to(tmp_path / "nowhere")
    before = digests(tmp_path)
    with pytest.raises(WriteError, match="exists; choose another name"):
        write_sharded(open_checkpoint(source), out, DEGREES, Options(resume=True))
    assert digests(tmp_path) == before
    assert not (tmp_path / "nowhere").exists()


def test_parent_that_can_not_hold_it(tmp_path: Path, source: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    for out in (tmp_path / "file" / "out", tmp_path / "nowhere" / "out", Path("/proc/out")):
        with pytest.raises(WriteError, match=r"no such folder to write out into|can't be written"):
            write_sharded(open_checkpoint(source), out, DEGREES, Options())
    with pytest.raises(WriteError, match="inside the source"):
        write_sharded(open_checkpoint(source), source / "out", DEGREES, Options())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "source"]


def test_damaged_shard_met_midway_leaves_no_output(tmp_path: Path, source: Path) -> None:
    write_sharded(open_checkpoint(source), tmp_path / "shards", DEGREES, Options())
    path = sorted((tmp_path / "shards").glob("experts-*"))[-1]
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(IntegrityError, match=path.name):
        write_hf(open_checkpoint(tmp_path / "shards"), tmp_path / "export", None, Options())
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize("form", ["shards", "hf"])
def test_what_counts_is_on_the_disk_first(
    tmp_path: Path, source: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default every file, then the folders, are synchronised before the output has its name; with sync off, nothing is."""
    path, whole = reference(tmp_path, source, form)
    out, synced, fsync = tmp_path / "out", [], os.fsync

    def watch(fd: int) -> None:
        synced.append((Path(f"/proc/self/fd/{fd}").resolve(), out.exists()))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", watch)
    for sync in (True, False):
        options = Options(sync=sync)
        checkpoint = open_checkpoint(path)
        write_hf(checkpoint, out, None, options) if form == "hf" else write_sharded(checkpoint, out, DEGREES, options)
        assert digests(out) == whole
        if sync:
            early = {place for place, finished in synced if not finished}
            partial = out.with_name(out.name + ".partial")
            files = [partial / name for name in whole]
            folders = {folder for file in files for folder in file.parents if folder.is_relative_to(partial)}
            assert early == {*folders, partial / JOURNAL, *(file.with_name(file.name + ".writing") for file in files)}
            assert synced[-1] == (tmp_path, True)
            shutil.rmtree(out)
            synced.clear()
    assert not synced
