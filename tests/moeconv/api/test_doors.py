"""The library's front door: what its docstring shows."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import moeconv
from tests.moeconv.models import Spec, digests, make_folder


def test_there_and_back(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "hf", Spec(files=2, index=True))
    sharded = moeconv.import_hf(source, tmp_path / "ckpt", moeconv.Degrees(tp=2, ep=2))
    norms = [c.tensor("model.norm.weight").numpy().tobytes() for c in (sharded.open(), moeconv.open(source))]
    assert norms[0] == norms[1]
    moeconv.reshard(tmp_path / "ckpt", tmp_path / "other", moeconv.Degrees(ep=4, etp=1))
    moeconv.export_hf(tmp_path / "other", tmp_path / "back")
    assert digests(tmp_path / "back") == digests(source)
    found = moeconv.verify(tmp_path / "ckpt", against=source)
    assert found.passed
    assert found.nbytes == moeconv.verify(source).nbytes


def test_wrong_doors_say_which_is_right(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "hf", Spec())
    moeconv.import_hf(source, tmp_path / "ckpt", moeconv.Degrees())
    with pytest.raises(moeconv.MoeconvError, match="reshard"):
        moeconv.import_hf(tmp_path / "ckpt", tmp_path / "x", moeconv.Degrees())
    with pytest.raises(moeconv.MoeconvError, match="import-hf"):
        moeconv.reshard(source, tmp_path / "x", moeconv.Degrees())
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = moeconv.no_such_name


def test_a_dry_run_writes_nothing_and_says_what_it_would(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "hf", Spec())
    would = moeconv.import_hf(source, tmp_path / "ckpt", moeconv.Degrees(ep=2), dry_run=True)
    assert not list(tmp_path.glob("ckpt*"))
    done = moeconv.import_hf(source, tmp_path / "ckpt", moeconv.Degrees(ep=2))
    assert (would.dry_run, done.dry_run) == (True, False)
    assert (would.files, would.carried, would.nbytes) == (done.files, done.carried, done.nbytes)
    assert {name: (tmp_path / "ckpt" / name).stat().st_size for name in done.files} == done.files


def test_progress_is_told_of_every_byte(tmp_path: Path) -> None:
    source, told = make_folder(tmp_path / "hf", Spec()), list[int]()

    def begin(total: int) -> Callable[[int], None]:
        told.append(-total)
        return told.append

    done = moeconv.import_hf(source, tmp_path / "ckpt", options=moeconv.Options(progress=begin, workers=1))
    assert told[0] < 0
    assert sum(told) == 0
    assert done.nbytes >= -told[0]


def test_parts_are_read_alone(tmp_path: Path) -> None:
    source = moeconv.open(make_folder(tmp_path / "hf", Spec(dtype="F32")))
    whole = source.tensor("model.embed_tokens.weight")
    numbers = whole.numpy()
    for key in ((slice(3, 9), slice(None, 4)), (slice(-2, None),), (..., slice(1, 2)), (slice(5, 5),)):
        part = whole[key]
        assert part.numpy().tobytes() == numbers[key].tobytes()
        assert part.shape == numbers[key].shape
    assert whole[4:20, 2:][1:3, :5].numpy().tobytes() == numbers[4:20, 2:][1:3, :5].tobytes()
    for bad, what in ((3, "3:4"), ((slice(0, 9, 2),), "step"), ((slice(1),) * 3, "3 indices")):
        with pytest.raises(moeconv.MoeconvError, match=what):
            _ = whole[bad]  # type: ignore[index]
    with pytest.raises(moeconv.MoeconvError, match="holds no tensor"):
        source.tensor("model.nothing")


@pytest.mark.parametrize("kind", ["hf", "sharded", "megatron"])
def test_a_rank_s_part_is_the_same_from_every_kind(tmp_path: Path, kind: str) -> None:
    folder = make_folder(tmp_path / "hf", Spec())
    degrees = moeconv.Degrees(tp=2, ep=2, etp=1)
    reference = moeconv.import_hf(folder, tmp_path / "ckpt", degrees).open()
    if kind == "megatron":
        moeconv.export_megatron(folder, tmp_path / "mg", moeconv.Degrees(ep=4), format="torch_dist")
    source = moeconv.open({"hf": folder, "sharded": tmp_path / "ckpt", "megatron": tmp_path / "mg"}[kind])
    assert source.kind == kind
    for rank in ({"tp": 0, "ep": 1}, {"tp": 1, "ep": 0}):
        found, want = source.rank(degrees, **rank), reference.rank(**rank)
        assert found.keys() == want.keys()
        for name, part in found.items():
            assert part.numpy().tobytes() == reference.read(name, want[name].rect).tobytes(), name
    with pytest.raises(moeconv.MoeconvError, match="axis 'dp' is unknown"):
        source.rank(degrees, dp=1)
    with pytest.raises(moeconv.MoeconvError, match="tp=2: the layout has tp 2"):
        source.rank(degrees, tp=2)


def test_the_import_itself_loads_nothing() -> None:
    program = "import sys, moeconv; print(sorted(m for m in sys.modules if m.startswith('moeconv') or m == 'numpy'))"
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert out == "['moeconv']\n"
