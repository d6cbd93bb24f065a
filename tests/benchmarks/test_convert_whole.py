"""The benchmark of a whole conversion, with a small model."""

from pathlib import Path

import pytest

from benchmarks import convert_whole
from benchmarks.convert import mixtral_config

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "vocab_size": 128,
}


def test_both_ways_are_timed_and_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = mixtral_config(1) | SMALL
    found = list(convert_whole.convert(config, tmp_path))
    assert [row["command"] for row in found] == ["import-hf", "export-hf"]
    for row in found:
        assert row["gb_per_second"] <= row["gb"] / row["seconds"] + 0.01
        assert 10 < row["peak_mb"] < 300
    assert not (tmp_path / "source").exists()
    other = iter([{"model": "one"}, {"model": "other"}])
    monkeypatch.setattr(convert_whole, "digests", lambda _: next(other))
    with pytest.raises(RuntimeError, match="differs from what was built"):
        list(convert_whole.convert(config, tmp_path / "again"))
