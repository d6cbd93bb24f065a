"""export-megatron and import-megatron are whole or not there: kills at any point, and resuming."""

from __future__ import annotations

import hashlib
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from moeconv import convert as convert_room
from moeconv.checking import compare
from moeconv.checkpoint import open_checkpoint
from moeconv.convert import Options
from moeconv.errors import MoeconvError, WriteError
from moeconv.formats import open_any
from moeconv.io.staging import JOURNAL, Staging
from moeconv.layout.degrees import Degrees
from moeconv.megatron.checkpoint import as_checkpoint
from moeconv.megatron.convert import export_megatron, open_megatron
from tests.megatron.converting import convert
from tests.upcycle.hub import make_folder

ROOT = Path(__file__).parents[2]
FORMS = ["torch", "torch_dist", "shards"]
# argv: source, output, form, resume, the number of the file system call that kills (0: never)
PROGRAM = """
import os, signal, sys, threading, time
from pathlib import Path
from tests.megatron import converting

source, out, form, resume, fatal = *sys.argv[1:4], sys.argv[4] == "resume", int(sys.argv[5])
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

sys.addaudithook(watch)
os.pwrite = write
print("begun", flush=True)
converting.convert(Path(source), Path(out), form, resume, lambda _: time.sleep(0.002) if not fatal else None)
print(calls, flush=True)
"""


def digests(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != JOURNAL)
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def start(source: Path, out: Path, form: str, resume: str = "", fatal: int = 0) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", PROGRAM, str(source), str(out), form, resume, str(fatal)]
    return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def references(tmp_path_factory: Any, hf_bf16: Path) -> dict[str, tuple[Path, dict[str, str]]]:
    """For each form of output the source, and the digests of a run that nothing interrupted."""
    work: Path = tmp_path_factory.mktemp("atomic")
    out = {}
    for form in FORMS:
        source = work / "torch" if form == "shards" else hf_bf16
        convert(source, work / form, form, False)
        out[form] = source, digests(work / form)
    return out


def check_killed(out: Path, whole: dict[str, str]) -> set[str]:
    """Check that a kill left a complete result or nothing that a reader accepts; give the files that were finished."""
    partial = out.with_name(out.name + ".partial")
    if out.exists():
        assert digests(out) == whole
        assert not partial.exists()
        return set()
    if not partial.exists():
        return set()
    left = digests(partial)
    finished = {name for name in left if not name.endswith(".writing")}
    assert {name: left[name] for name in finished} == {name: whole[name] for name in finished}
    try:
        open_any(partial)
    except MoeconvError:
        return finished
    assert finished == set(whole)  # the tracker file, or the manifest, is the last
    return finished


def finish(source: Path, out: Path, form: str, whole: dict[str, str], finished: set[str]) -> None:
    """Resume, and check that it gives the whole result and writes finished files of tensors no second time."""
    if out.exists():
        return
    tensors = (".pt", ".distcp", ".safetensors")
    partial = out.with_name(out.name + ".partial")
    before = {name: (partial / name).stat().st_ino for name in finished if name.endswith(tensors)}
    convert(source, out, form, True)
    assert digests(out) == whole
    assert not partial.exists()
    redone = [name for name, inode in before.items() if (out / name).stat().st_ino != inode and "common.pt" not in name]
    assert len(redone) <= 2  # named just before the kill, but not yet in the journal


@pytest.mark.parametrize("form", FORMS)
def test_kill_at_each_stage_of_the_files(references: Any, tmp_path: Path, form: str) -> None:
    source, whole = references[form]
    with start(source, tmp_path / "counted", form) as process:
        assert process.stdout is not None
        calls = int(process.stdout.read().split()[-1])
    assert digests(tmp_path / "counted") == whole
    points = {1, 3, *random.Random().sample(range(4, calls - 4), 2), *range(calls - 3, calls)}
    for fatal in sorted(points):
        out = tmp_path / f"out{fatal}"
        with start(source, out, form, fatal=fatal) as process:
            process.communicate()
        assert process.returncode == -signal.SIGKILL
        finish(source, out, form, whole, check_killed(out, whole))


@pytest.mark.parametrize("form", FORMS)
def test_kill_at_random_times_and_again_while_resuming(references: Any, tmp_path: Path, form: str) -> None:
    source, whole = references[form]
    interrupted, draw, latest = 0, random.Random(), 0.4
    for number in range(4):
        out = tmp_path / f"out{number}"
        for resume in ("", "resume"):
            if resume and not out.with_name(out.name + ".partial").exists():
                continue
            with start(source, out, form, resume) as process:
                assert process.stdout is not None
                assert process.stdout.readline() == "begun\n"
                time.sleep(draw.uniform(0, latest))
                process.send_signal(signal.SIGKILL)
            finished = check_killed(out, whole)
            interrupted += not out.exists()
            if out.exists():  # a faster machine: kill earlier
                latest /= 2
        finish(source, out, form, whole, finished)
    assert interrupted


@pytest.mark.parametrize("form", FORMS)
def test_what_an_unfinished_run_was_begun_with(references: Any, tmp_path: Path, hf_bf16: Path, form: str) -> None:
    source, _ = references[form]
    out = tmp_path / "out"
    with start(source, out, form, fatal=60) as process:
        process.communicate()
    left = digests(tmp_path / "out.partial")
    with pytest.raises(WriteError, match="--resume, or remove it"):
        convert(source, out, form, False)
    other = "torch" if form == "torch_dist" else "torch_dist"
    with pytest.raises(WriteError, match="begun with other"):
        convert(hf_bf16, out, other, True)
    assert not out.exists()
    assert digests(tmp_path / "out.partial") == left


@pytest.mark.parametrize("damaged", [False, True])
def test_records_that_are_filled_column_by_column_are_found_whole_or_damaged(
    damaged: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gpt-oss's experts are turned on the way; their records' own CRC-32s are of the bytes as they lie."""
    source, out = make_folder(tmp_path / "hf", "gpt_oss"), tmp_path / "out"
    settings: dict[str, Any] = {"degrees": Degrees(), "spec": "te", "experts": "grouped"}

    def killed(staging: Staging) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Staging, "commit", killed)
        with pytest.raises(KeyboardInterrupt):
            export_megatron(source, out, fmt="torch", options=Options(), **settings)
    (file,) = (tmp_path / "out.partial").rglob("model_optim_rng.pt")
    if damaged:
        data = bytearray(file.read_bytes())
        weight = torch.load(file, weights_only=False)["model"]["decoder.layers.0.mlp.experts.linear_fc1.weight1"]
        at = data.index(weight.numpy().tobytes())
        data[at + 8] ^= 1
        file.write_bytes(data)
    redone: list[list[str]] = []
    check = convert_room.check_done

    def told(*args: Any, **options: Any) -> list[str]:
        redone.append(check(*args, **options))
        return redone[-1]

    monkeypatch.setattr(convert_room, "check_done", told)
    export_megatron(source, out, fmt="torch", options=Options(resume=True), **settings)
    assert redone == [[file.relative_to(tmp_path / "out.partial").as_posix()] if damaged else []]
    assert next(compare(as_checkpoint(open_megatron(out)), open_checkpoint(source)), None) is None
