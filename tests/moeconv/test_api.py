"""The library's front door: what its docstring shows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import moeconv
from tests.moeconv.models import Spec, digests, make_folder


def test_there_and_back(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "hf", Spec(files=2, index=True))
    sharded = moeconv.import_hf(source, tmp_path / "ckpt", moeconv.Degrees(tp=2, ep=2))
    assert (sharded.read("model.norm.weight") == moeconv.open(source).read("model.norm.weight")).all()
    moeconv.reshard(tmp_path / "ckpt", tmp_path / "other", moeconv.Degrees(ep=4, etp=1))
    moeconv.export_hf(tmp_path / "other", tmp_path / "back")
    assert digests(tmp_path / "back") == digests(source)
    assert moeconv.verify(tmp_path / "ckpt") == moeconv.verify(source)


def test_wrong_doors_say_which_is_right(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "hf", Spec())
    moeconv.import_hf(source, tmp_path / "ckpt", moeconv.Degrees())
    with pytest.raises(moeconv.MoeconvError, match="reshard"):
        moeconv.import_hf(tmp_path / "ckpt", tmp_path / "x", moeconv.Degrees())
    with pytest.raises(moeconv.MoeconvError, match="import_hf"):
        moeconv.reshard(source, tmp_path / "x", moeconv.Degrees())
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = moeconv.no_such_name


def test_the_import_itself_loads_nothing() -> None:
    program = "import sys, moeconv; print(sorted(m for m in sys.modules if m.startswith('moeconv') or m == 'numpy'))"
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert out == "['moeconv']\n"
