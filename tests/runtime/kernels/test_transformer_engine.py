"""Which cuDNN is loaded before Transformer Engine asks for one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from runtime.kernels import transformer_engine


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where torch is taken to have loaded its cuDNN from."""
    own = tmp_path / "own"
    own.mkdir()
    for name in (
        "libcudnn.so.9",
        "libcudnn_ops.so.9",
        "libcudnn_graph.so.9",
        "libcudart.so.13",
        "libcudnn_frontend.py",
    ):
        (own / name).touch()
    maps = tmp_path / "maps"
    lines = (
        "7f00-7f10 r-xp 00000000 08:01 11 /usr/lib/libc.so.6",
        f"7f10-7f20 r-xp 00000000 08:01 12 {own}/libcudnn.so.9",
    )
    maps.write_text("\n".join(lines) + "\n7f20-7f30 rw-p 00000000 00:00 0\n")
    monkeypatch.setattr(transformer_engine, "_MAPS", maps)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    return own


def test_all_parts_of_the_library_that_torch_has(folder: Path) -> None:
    found = [path.name for path in transformer_engine.cudnn_parts()]
    assert found == ["libcudnn.so.9", "libcudnn_graph.so.9", "libcudnn_ops.so.9"]
    assert all(path.parent == folder for path in transformer_engine.cudnn_parts())


@pytest.mark.usefixtures("folder")
def test_none_where_torch_has_none_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "maps").write_text("7f00-7f10 r-xp 00000000 08:01 11 /usr/lib/libc.so.6\n")  # linked into torch itself
    assert transformer_engine.cudnn_parts() == []
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: None)
    assert transformer_engine.cudnn_parts() == []
