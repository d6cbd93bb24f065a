"""Checkpoints from and to a hub, over HTTP."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.cli.conftest import digests
from tests.cli.hub_server import COMMIT, Hub, running_hub

ROOT = Path(__file__).parents[2]


@pytest.fixture
def hub(mixtral: Path) -> Iterator[Hub]:
    """A hub with the small Mixtral, and copies of its weights in other forms beside it."""
    with running_hub() as server:
        files = {p.name: p.read_bytes() for p in mixtral.iterdir()}
        copies = {
            "consolidated.00.pt": b"x",
            "consolidated.safetensors": b"x",
            "pytorch_model.bin": b"x",
            "original/a.pth": b"x",
            "model.gguf": b"x",
        }
        server.files["mistralai/Tiny"] = (
            files | copies | {".gitattributes": b"*.safetensors filter=lfs\n", "README.md": b"# Tiny\n"}
        )
        yield server


def call(hub: Hub, home: Path, *words: object) -> subprocess.CompletedProcess[str]:
    """Call the program as a user would, with this hub and a cache of its own."""
    environment = os.environ | {
        "HF_ENDPOINT": hub.address,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": "hf_test",
    }
    command = [sys.executable, "-m", "cli", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


def test_import_downloads_only_what_it_needs_and_export_uploads(hub: Hub, mixtral: Path, tmp_path: Path) -> None:
    result = call(hub, tmp_path / "home", "import-hf", "mistralai/Tiny", tmp_path / "ckpt", "--ep", 2)
    assert result.returncode == 0, result.stderr
    wanted = {p.name for p in mixtral.iterdir()} | {"README.md"}
    assert set(hub.served) - {".gitattributes"} == wanted
    result = call(
        hub,
        tmp_path / "home",
        "export-hf",
        tmp_path / "ckpt",
        tmp_path / "hf",
        "--push-to-hub",
        "me/trained",
        "--private",
    )
    assert result.returncode == 0, result.stderr
    assert COMMIT in result.stdout
    assert hub.private["me/trained"]
    pushed = {name: data for name, data in hub.files["me/trained"].items() if name != ".gitattributes"}
    assert pushed == {p.name: p.read_bytes() for p in (tmp_path / "hf").iterdir()}
    assert {n: d for n, d in digests(tmp_path / "hf").items() if n != "README.md"} == digests(mixtral)


def test_plans_and_refusals_download_no_weights(hub: Hub, mixtral: Path, tmp_path: Path) -> None:
    home, weights = tmp_path / "home", {p.name for p in mixtral.glob("*.safetensors")}
    shown = call(hub, home, "inspect", "mistralai/Tiny", "--json")
    assert shown.returncode == 0, shown.stderr
    local = call(hub, home, "inspect", mixtral, "--json")
    assert json.loads(shown.stdout) == json.loads(local.stdout) | {"path": "mistralai/Tiny"}
    plan = call(hub, home, "import-hf", "mistralai/Tiny", tmp_path / "ckpt", "--ep", 2, "--dry-run")
    assert plan.returncode == 0, plan.stderr
    refused = call(hub, home, "import-hf", "mistralai/Tiny", tmp_path / "ckpt", "--ep", 3)
    assert refused.returncode == 1
    assert "--ep 3" in refused.stderr
    hub.files["me/gpt2"] = hub.files["mistralai/Tiny"] | {"config.json": b'{"model_type": "gpt2"}'}
    for command in ("import-hf", "upcycle"):
        refused = call(hub, home, command, "me/gpt2", tmp_path / "ckpt")
        assert refused.returncode == 1
        assert refused.stderr.startswith("error: me/gpt2") or "gpt2" in refused.stderr
        assert "/moeconv-" not in refused.stderr
    assert set(hub.served) == {"config.json", "model.safetensors.index.json"}
    assert {path for path, _ in hub.parts} == weights
    assert not (tmp_path / "ckpt").exists()


def test_a_header_longer_than_the_first_request(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moeconv import hub_preview

    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    file = next(name for name in hub.files["mistralai/Tiny"] if name.endswith(".safetensors"))
    monkeypatch.setattr(
        hub_preview, "_range", lambda r, c, name, begin, count: hub.files[r][name][begin : begin + count]
    )
    monkeypatch.setattr(hub_preview, "_FIRST_BYTES", 10)
    data = hub.files["mistralai/Tiny"][file]
    length = 8 + int.from_bytes(data[:8], "little")
    assert hub_preview._content("mistralai/Tiny", COMMIT, file) == data[:length]


def test_a_cached_download_is_not_repeated(hub: Hub, tmp_path: Path) -> None:
    for name in ("a", "b"):
        result = call(hub, tmp_path / "home", "import-hf", "mistralai/Tiny", tmp_path / name, "--revision", "main")
        assert result.returncode == 0, result.stderr
    assert len(hub.served) == len(set(hub.served))
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


def test_a_cached_download_needs_no_connection(hub: Hub, tmp_path: Path) -> None:
    assert call(hub, tmp_path / "home", "import-hf", "mistralai/Tiny", tmp_path / "a").returncode == 0
    hub.shutdown()
    hub.server_close()
    result = call(hub, tmp_path / "home", "import-hf", "mistralai/Tiny", tmp_path / "b")
    assert result.returncode == 0, result.stderr
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


def test_what_the_hub_refuses_is_one_line(hub: Hub, tmp_path: Path) -> None:
    hub.files["big/secret"] = {}
    hub.gated.add("big/secret")
    for name in ("big/secret", "nobody/nothing"):
        result = call(hub, tmp_path / "home", "import-hf", name, tmp_path / "ckpt")
        assert result.returncode == 1
        assert result.stderr.startswith(f"error: {name}: ")
        assert "hf auth login" in result.stderr
        assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "ckpt").exists()


def test_a_sharded_checkpoint_comes_with_all_that_its_manifest_names(hub: Hub, mixtral: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(mixtral, tmp_path / "source"))
    (source / "extra" / "deep").mkdir(parents=True)
    (source / "extra" / "deep" / "[notes]*.txt").write_text("a name that is a pattern")
    assert call(hub, tmp_path / "home", "import-hf", source, tmp_path / "ckpt", "--ep", 2).returncode == 0
    stored = {p.relative_to(tmp_path / "ckpt").as_posix(): p.read_bytes() for p in (tmp_path / "ckpt").rglob("*.*")}
    hub.files["me/shards"] = stored | {"extra/other.txt": b"not of the checkpoint", "pytorch_model.bin": b"x"}
    for command in ("verify", "inspect"):
        result = call(hub, tmp_path / "home", command, "me/shards")
        assert result.returncode == 0, result.stderr
    assert set(hub.served) == set(stored)
    hub.files["me/evil"] = stored | {"moeconv.json": stored["moeconv.json"].replace(b"xxh3", b"xxh4")}
    result = call(hub, tmp_path / "home", "verify", "me/evil")
    assert (result.returncode, "moeconv.json: differs from the checksum" in result.stderr) == (1, True)


def test_of_an_old_repository_the_bin_files_are_the_weights(hub: Hub, mixtral: Path, tmp_path: Path) -> None:
    weights = {name: tensor for file in mixtral.glob("*.safetensors") for name, tensor in load_file(file).items()}
    torch.save(weights, tmp_path / "pytorch_model.bin")
    rest = {p.name: p.read_bytes() for p in mixtral.iterdir() if "safetensors" not in p.name}
    old = rest | {"pytorch_model.bin": (tmp_path / "pytorch_model.bin").read_bytes()}
    hub.files["old/Tiny"] = old | {"training_args.bin": b"x", "tf_model.h5": b"x", "consolidated.00.pth": b"x"}
    result = call(hub, tmp_path / "home", "import-hf", "old/Tiny", tmp_path / "ckpt")
    assert result.returncode == 0, result.stderr
    assert set(hub.served) == set(old)
    assert call(hub, tmp_path / "home", "verify", tmp_path / "ckpt", "--against", mixtral).returncode == 0


def test_a_plan_downloads_the_config_alone(hub: Hub, tmp_path: Path) -> None:
    result = call(hub, tmp_path / "home", "plan", "mistralai/Tiny", "--gpus", 4, "--ep", 2, "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["layout"] == "dp4 ep2"
    assert hub.served == ["config.json"]
    result = call(hub, tmp_path / "home", "plan", "mistralai/Missing", "--gpus", 4)
    assert result.returncode == 1
    assert "mistralai/Missing: no such folder, and the hub can't give it" in result.stderr
