"""The wheel, built and installed by pip into an environment that has nothing but what it depends on: no torch, no transformers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.moeconv.models import RAM, Spec, digests, make_folder

ROOT = Path(__file__).parents[2]
PACKAGES = ("moeconv", "runtime", "cli")
PROJECT = (*PACKAGES, "pyproject.toml", "README.md", "LICENSE")
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")


@dataclass(frozen=True)
class Light:
    """A light installation: its environment, the wheel, and a folder to work in."""

    env: Path
    wheel: Path
    work: Path

    def run(self, *words: object) -> subprocess.CompletedProcess[str]:
        """Run a program of the environment, by its name in it."""
        program, *rest = map(str, words)
        clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        command = [str(self.env / "bin" / program), *rest]
        return subprocess.run(command, cwd=self.work, env=clean, capture_output=True, text=True)


@pytest.fixture(scope="module")
def light() -> Iterator[Light]:
    with tempfile.TemporaryDirectory(dir=RAM) as name:
        yield install(Path(name))


def install(root: Path) -> Light:
    """Build the wheel, and install it into an environment with what it depends on."""
    source, env, work = root / "source", root / "env", root / "work"
    source.mkdir()
    work.mkdir()
    for name in PROJECT:  # built from a copy: setuptools leaves its own folders behind
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, source)
    build = ("wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", root, source)
    subprocess.run([*PIP, *map(str, build)], check=True)
    (wheel,) = root.glob("moeconv-*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", env], check=True)
    (packages,) = env.glob("lib/python*/site-packages")
    for distribution in dependencies(wheel):
        for top in {file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__")}:
            if not (packages / top).exists():
                (packages / top).symlink_to(Path(str(distribution.locate_file(top))))
    inside = [*PIP[:3], "--python", str(env / "bin" / "python"), *PIP[3:]]
    subprocess.run([*inside, "install", "--no-deps", "--no-index", str(wheel)], check=True)
    subprocess.run([*inside, "check"], check=True)  # all that the wheel requires is there, in versions that fit
    make_folder(work / "hf", Spec(files=2, index=True))
    return Light(env, wheel, work)


def dependencies(wheel: Path) -> list[metadata.Distribution]:
    """Find what the wheel requires without extras, and what that requires, in this environment."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        lines = archive.read(name).decode().splitlines()
    pending = [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")]
    found: dict[str, metadata.Distribution] = {}
    while pending:
        wanted = Requirement(pending.pop())
        if wanted.name not in found and (wanted.marker is None or wanted.marker.evaluate({"extra": ""})):
            found[wanted.name] = metadata.distribution(wanted.name)
            pending += found[wanted.name].requires or []
    return list(found.values())


def test_the_wheel_holds_every_file_of_the_packages(light: Light) -> None:
    held = set(zipfile.ZipFile(light.wheel).namelist())
    tracked = subprocess.run(
        ["git", "ls-files", *PACKAGES], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert {name for name in tracked.splitlines() if (ROOT / name).exists()} <= held
    assert {f"{package}/py.typed" for package in PACKAGES} <= held


def test_checkpoints_are_converted_there_and_back(light: Light) -> None:
    assert light.run("python", "-c", "import torch").returncode != 0
    for words in (
        ("moeconv", "import-hf", "hf", "ckpt", "--tp", 2, "--ep", 2),
        ("python", "-m", "moeconv", "export-hf", "ckpt", "back"),
        ("moeconv", "export-megatron", "hf", "megatron", "--format", "torch_dist"),
        ("moeconv", "verify", "megatron", "--against", "ckpt"),
        ("moeconv", "plan", "hf", "--gpus", 2),
        ("moeconv", "train", "--help"),
    ):
        result = light.run(*words)
        assert result.returncode == 0, result.stderr
    assert digests(light.work / "back") == digests(light.work / "hf")
    program = "import moeconv; print(moeconv.open('ckpt').tensor('model.norm.weight')[:2].numpy().shape)"
    assert light.run("python", "-c", program).stdout == "(2,)\n"


def test_the_command_says_its_version_and_completes(light: Light) -> None:
    assert light.run("moeconv", "--version").stdout.strip().endswith(metadata.version("moeconv"))
    script = "COMP_WORDS='moeconv export' COMP_CWORD=1 _MOECONV_COMPLETE=bash_complete exec " + str(
        light.env / "bin/moeconv"
    )
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout
    assert done.split() == ["plain,export-hf", "plain,export-megatron", "plain,export-adapter"]


# Every command is called in one process; what is given makes it come to where it needs more.
ALL = """
import json, sys
from click.testing import CliRunner
import cli.main
calls = {
    "verify": ["verify", "hf", "--against", "hf", "--logits"],
    "prepare-data": ["prepare-data", "config.json", "tokens", "--tokenizer", "hf"],
    "train": ["train", "--load", "hf", "--mock-data", "--train-iters", "1"],
    "eval": ["eval", "hf", "--mock-data"],
    "plan": ["plan", "--calibrate", "machine.json"],
}
said = {}
for name in cli.main.main.list_commands(None):
    for words in ([name, "--help"], calls.get(name, [name, "hf", "elsewhere", "again"])):
        result = CliRunner().invoke(cli.main.main, words)
        failed = result.exception is not None and not isinstance(result.exception, SystemExit)
        said[" ".join(words)] = [result.exit_code, repr(result.exception) if failed else result.output]
for call in ("moeconv.open('hf').tensor('model.norm.weight').torch()", "moeconv.open('hf').load_into(None)"):
    try:
        exec("import moeconv; " + call)
    except moeconv.MoeconvError as error:
        said[call] = [1, str(error)]
json.dump(said, sys.stdout)
"""


def test_what_needs_torch_names_the_extra(light: Light) -> None:
    for module, words in (
        ("runtime.parity", ()),
        ("runtime.train", ("--load", "hf", "--mock-data", "--train-iters", 1)),
    ):
        result = light.run("python", "-m", module, *words)
        assert result.returncode == 2
        assert result.stderr == "error: training needs torch, which is not installed: pip install 'moeconv[torch]'\n"

    result = light.run("python", "-c", ALL)
    assert result.returncode == 0, result.stderr
    said = json.loads(result.stdout)
    need = [call for call, (code, text) in said.items() if code and "pip install 'moeconv[torch]'" in text]
    expected = ["verify", "prepare-data", "train", "eval", "plan", "moeconv.open"]
    assert {call.split(" --")[0].split(" ")[0].split("(")[0] for call in need} >= set(expected)
    for call, (code, text) in said.items():
        assert "ModuleNotFoundError" not in text, (call, code, text)
        assert not text.startswith(("RuntimeError", "ImportError", "AttributeError")), (call, text)
