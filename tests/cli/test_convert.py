"""The conversion commands as a user calls them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result
from transformers import AutoModelForCausalLM

from tests.cli.conftest import digests

Call = Callable[..., Result]


def test_a_day_returns_the_source(call: Call, mixtral: Path, tmp_path: Path) -> None:
    before = digests(mixtral)
    assert call("import-hf", mixtral, tmp_path / "a", "--tp", 2, "--ep", 4).exit_code == 0
    assert (
        call(
            "reshard", tmp_path / "a", tmp_path / "b", "--tp", 4, "--pp", 3, "--pp-layers", "2,1,1", "--etp", 3
        ).exit_code
        == 0
    )
    assert call("export-hf", tmp_path / "b", tmp_path / "hf").exit_code == 0
    assert digests(tmp_path / "hf") == before
    assert digests(mixtral) == before


def test_everything_beside_the_weights_is_accounted_for(call: Call, mixtral: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(mixtral, tmp_path / "hf")
    for name in ("optimizer.pt", *(f"events.out.tfevents.{n}" for n in range(9))):
        (folder / name).write_bytes(b"123")
    plan = call("import-hf", folder, tmp_path / "out", "--dry-run")
    lines = [line.split() for line in plan.stdout.splitlines()]
    assert ["tokenizer.json", "21", "B", "goes", "along"] in lines
    assert "not converted: events.out.tfevents.0, 3 bytes (no part of the model)" in plan.stdout
    assert "and 2 more (--json has all)" in plan.stdout
    done = json.loads(call("import-hf", folder, tmp_path / "out", "--json").stdout)
    assert len(done["dropped"]) == 10
    assert done["carried"]["tokenizer.json"] == 21
    assert sorted(done["carried"]) == sorted(p.name for p in mixtral.iterdir() if not p.name.startswith("model"))


def test_no_sync_reaches_every_conversion(
    call: Call, mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: pytest.fail("waited for the disk"))
    for command, source, out in (("import-hf", mixtral, "a"), ("reshard", "a", "b"), ("export-hf", "b", "hf")):
        assert call(command, tmp_path / source, tmp_path / out, "--no-sync").exit_code == 0
    assert digests(tmp_path / "hf") == digests(mixtral)
    for form in ("torch", "torch_dist"):
        assert call("export-megatron", tmp_path / "a", tmp_path / form, "--format", form, "--no-sync").exit_code == 0
        assert call("import-megatron", tmp_path / form, tmp_path / f"of-{form}", "--no-sync").exit_code == 0
        assert call("verify", tmp_path / f"of-{form}", "--against", tmp_path / "a").exit_code == 0


def test_export_cut_anew_loads_in_transformers(call: Call, mixtral: Path, tmp_path: Path) -> None:
    assert call("import-hf", mixtral, tmp_path / "a", "--ep", 2).exit_code == 0
    assert call("export-hf", tmp_path / "a", tmp_path / "hf", "--max-shard-size", "100KB").exit_code == 0
    files = list((tmp_path / "hf").glob("model-*.safetensors"))
    assert files
    assert all(file.stat().st_size < 110_000 for file in files)
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        ours = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")(tokens).logits
        theirs = AutoModelForCausalLM.from_pretrained(mixtral)(tokens).logits
    assert torch.equal(ours, theirs)


def test_dry_run_writes_nothing_and_says_what_it_would(call: Call, mixtral: Path, tmp_path: Path) -> None:
    result = call("import-hf", mixtral, tmp_path / "a", "--tp", 2, "--dry-run", "--json")
    value = json.loads(result.stdout)
    assert list(tmp_path.iterdir()) == []
    assert call("import-hf", mixtral, tmp_path / "a", "--tp", 2).exit_code == 0
    assert value["files"] == {p.name: p.stat().st_size for p in (tmp_path / "a").glob("*.safetensors")}


@pytest.mark.parametrize(
    ("degrees", "expected"),
    [
        (
            ("--tp", 3),
            "--tp 3: 4 attention heads and 2 key/value heads can't be shared by 3 ranks; degrees that fit: 1, 2, 4",
        ),
        (("--ep", 3), "--ep 3: 4 experts can't be shared by 3 ranks; degrees that fit: 1, 2, 4"),
        (("--etp", 5), "--etp 5: an expert's width of 24"),
        (("--pp", 3), "say how with --pp-layers, for example 2,1,1"),
        (("--pp", 2, "--pp-layers", "1,2"), "adds up to 3; the model has 4 layers"),
        (("--vpp", 2), "--vpp 2 with --pp 1"),
    ],
)
def test_degrees_that_do_not_fit_are_refused_by_name(
    call: Call, mixtral: Path, tmp_path: Path, degrees: tuple[object, ...], expected: str
) -> None:
    result = call("import-hf", mixtral, tmp_path / "a", *degrees)
    assert result.exit_code == 1
    assert expected in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_refusals(call: Call, mixtral: Path, tmp_path: Path) -> None:
    assert call("import-hf", mixtral, tmp_path / "a").exit_code == 0
    for words, expected in (
        (("import-hf", mixtral, tmp_path / "a"), "exists"),
        (("import-hf", tmp_path / "a", tmp_path / "b"), "is sharded already"),
        (("reshard", mixtral, tmp_path / "b"), "moeconv import-hf"),
        (("export-hf", mixtral, tmp_path / "b"), "already"),
        (("import-hf", tmp_path / "nowhere", tmp_path / "b"), "no such folder"),
        (("import-hf", mixtral, tmp_path / "no" / "b"), "create it first"),
        (("import-hf", mixtral, mixtral / "b"), "inside the source"),
        (("export-hf", tmp_path / "a", tmp_path / "b", "--private"), "--push-to-hub"),
    ):
        result = call(*words)
        assert (result.exit_code, expected in result.stderr) == (1, True), result.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]


def test_a_source_with_a_training_checkpoints_own_file_is_refused(call: Call, mixtral: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for path in mixtral.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    (source / "trainer.json").write_text("{}")
    result = call("import-hf", source, tmp_path / "a")
    assert (result.exit_code, "trainer.json" in result.stderr) == (1, True)
    assert not (tmp_path / "a").exists()


def test_usage_errors_exit_2(call: Call, mixtral: Path, tmp_path: Path) -> None:
    assert call("import-hf", mixtral, tmp_path / "a", "--tp", 0).exit_code == 2
    assert call("export-hf", mixtral, tmp_path / "a", "--max-shard-size", "many").exit_code == 2
    assert call("no-such-command").exit_code == 2


def test_no_conversion_command_loads_torch(mixtral: Path, tmp_path: Path) -> None:
    code = "import sys; from cli.main import main; main(sys.argv[1:], standalone_mode=False); sys.exit('torch' in sys.modules)"
    a, b, c = (str(tmp_path / name) for name in "abc")
    for words in (
        ("import-hf", str(mixtral), a),
        ("reshard", a, b, "--ep", "2"),
        ("export-hf", b, c),
        ("inspect", b),
        ("verify", b),
        ("diff", a, b),
    ):
        subprocess.run([sys.executable, "-c", code, *words], check=True, capture_output=True)


def test_help_names_every_command_and_an_example(call: Call) -> None:
    overview = call("--help").stdout
    for name in main_commands():
        assert name in overview
        assert f"Example: moeconv {name}" in " ".join(call(name, "--help").stdout.split())


def main_commands() -> list[str]:
    from cli.main import _TARGETS

    return list(_TARGETS)
