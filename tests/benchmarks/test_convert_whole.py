"""The benchmark of a whole conversion, with a small model."""

from pathlib import Path

import pytest

from benchmarks import convert_whole
from benchmarks.convert import mixtral_config

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "vocab_size": 128,
}


def test_every_step_is_timed_and_what_comes_back_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = mixtral_config(1) | SMALL
    folder, other = tmp_path / "folder", tmp_path / "other"
    found = []
    for row in convert_whole.convert(config, folder, other):
        found.append(row["command"])
        assert row["gb_per_second"] <= row["gb"] / row["seconds"] + 0.01
        assert 10 < row["peak_mb"] < 300
    assert found == ["import-hf", "reshard", "export-hf"]
    assert list(folder.iterdir()) == []
    assert [path.name for path in other.iterdir()] == ["2-export-hf"]
    digests = iter([{"model": "one"}, {"model": "other"}])
    monkeypatch.setattr(convert_whole, "digests", lambda _: next(digests))
    with pytest.raises(RuntimeError, match="differs from what was built"):
        list(convert_whole.convert(config, tmp_path / "again", tmp_path))
