"""Any model through any layouts comes back as its own files, and the number of workers changes nothing."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moeconv.checkpoint import open_checkpoint
from moeconv.convert import Options, write_hf, write_sharded
from moeconv.layout.degrees import Degrees
from tests.moeconv.models import RAM, Spec, digests, layouts, make_folder, specs


@settings(max_examples=60, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_any_chain_of_layouts_returns_the_source(data: st.DataObject) -> None:
    spec = data.draw(specs())
    chain = data.draw(st.lists(layouts(spec), min_size=1, max_size=3))
    with tempfile.TemporaryDirectory(dir=RAM) as name:
        root = Path(name)
        source = make_folder(root / "source", spec)
        before, path = digests(source), source
        for number, degrees in enumerate(chain):
            workers = data.draw(st.integers(1, 4))
            write_sharded(open_checkpoint(path), root / str(number), degrees, Options(workers=workers))
            path = root / str(number)
            assert open_checkpoint(path).degrees == degrees
        write_hf(open_checkpoint(path), root / "export", None, Options())
        assert digests(root / "export") == before
        assert digests(source) == before
        assert sorted(p.name for p in root.iterdir()) == sorted(["source", "export", *map(str, range(len(chain)))])


EVERY_AXIS = Degrees(tp=4, pp=2, vpp=2, ep=2, etp=3, pp_layers=(2, 1, 1, 1))


@pytest.mark.parametrize("fused", [False, True])
def test_workers_and_the_way_there_do_not_change_a_byte(tmp_path: Path, fused: bool) -> None:
    source = open_checkpoint(make_folder(tmp_path / "source", Spec(layers=5, fused=fused, files=3, index=True)))
    for workers in (1, 2, 7):
        write_sharded(source, tmp_path / f"w{workers}", EVERY_AXIS, Options(workers=workers))
    assert digests(tmp_path / "w1") == digests(tmp_path / "w2") == digests(tmp_path / "w7")
    write_sharded(source, tmp_path / "detour", Degrees(tp=2, ep=4), Options())
    write_sharded(open_checkpoint(tmp_path / "detour"), tmp_path / "there", EVERY_AXIS, Options())
    assert digests(tmp_path / "there") == digests(tmp_path / "w1")


def test_re_cut_files_hold_the_same_tensors(tmp_path: Path) -> None:
    source = open_checkpoint(make_folder(tmp_path / "source", Spec(fused=True, router="F32")))
    write_sharded(source, tmp_path / "shards", Degrees(tp=2, ep=2), Options())
    write_hf(open_checkpoint(tmp_path / "shards"), tmp_path / "cut", 2000, Options())
    cut = open_checkpoint(tmp_path / "cut")
    assert len(cut.files) > 3
    assert cut.tensors == source.tensors
    assert all(cut.read(name).tobytes() == source.read(name).tobytes() for name in cut.tensors)
    sizes = {f: sum(p.nbytes for ps in cut.pieces.values() for p in ps if p.file == f) for f in cut.files}
    assert max(sizes.values()) <= 2000
