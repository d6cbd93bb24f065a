"""Every public function's example runs, on tiny models made by transformers, and gives what it says."""

from __future__ import annotations

import doctest
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import moeconv
from moeconv.access import TensorAccess
from moeconv.adapters.export import plan_peft, write_peft
from runtime.model.lora import LoraConfig
from tests.adapters.saves import train
from tests.moeconv.models import RAM
from tests.upcycle.hub import make_folder

FUNCTIONS = [name for name in moeconv.__all__ if not isinstance(getattr(moeconv, name), type)]
METHODS = [name for name in vars(TensorAccess) if not name.startswith("_") and name not in ("read", "degrees")]
EXAMPLES: dict[str, Callable[..., Any]] = {name: getattr(moeconv, name) for name in FUNCTIONS}
EXAMPLES |= {
    f"Checkpoint.{name}": getattr(TensorAccess, name) for name in METHODS if callable(getattr(TensorAccess, name))
}
SIZES = {"vocab_size": 64, "intermediate_size": 24}


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """Give a folder with what examples begin with: mixtral, ckpt, megatron, dense, run, adapter, trained."""
    with tempfile.TemporaryDirectory(dir=RAM) as name:
        root = Path(name)
        run = train(root, "mixtral", LoraConfig(rank=2), torch.bfloat16, **SIZES)
        write_peft(plan_peft(run.opened), root / "adapter", moeconv.Options())
        (root / "base").rename(root / "mixtral")
        moeconv.import_hf(root / "mixtral", root / "ckpt", moeconv.Degrees(tp=2, ep=2))
        moeconv.export_megatron(root / "mixtral", root / "megatron", moeconv.Degrees(tp=2, ep=2), format="torch_dist")
        make_folder(root / "dense", "mistral", **SIZES)
        moeconv.export_hf(root / "ckpt", root / "trained", max_shard_size=10**9)
        weights = load_file(root / "trained" / "model.safetensors")
        weights["model.norm.weight"][3] += 1
        save_file(weights, root / "trained" / "model.safetensors")
        yield root


def test_the_list_is_whole() -> None:
    assert {"open", "import_hf", "upcycle", "verify"} <= set(FUNCTIONS)
    assert {"Checkpoint.tensor", "Checkpoint.rank", "Checkpoint.load_into"} <= EXAMPLES.keys()
    assert set(moeconv.__all__) <= set(dir(moeconv))


def test_the_page_s_examples_give_what_they_say(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = Path(__file__).parents[3] / "docs" / "howto" / "python.md"
    monkeypatch.chdir(folder)
    example = doctest.DocTestParser().get_doctest(page.read_text(encoding="utf8"), {}, page.name, str(page), 0)
    assert len(example.examples) > 10
    said: list[str] = []
    assert doctest.DocTestRunner().run(example, out=said.append).failed == 0, "".join(said)


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_gives_what_it_says(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    found = doctest.DocTestFinder(recurse=False).find(EXAMPLES[name], name, globs={})
    (example,) = found
    assert example.examples, f"{name} has no example"
    said: list[str] = []
    result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example, out=said.append)
    assert result.failed == 0, "".join(said)
