"""A small Mixtral folder, made by transformers, and a way to call the program."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from cli.main import main


def digests(folder: Path) -> dict[str, str]:
    """Give the sha256 of each file of a folder."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture
def call() -> Callable[..., Result]:
    """Call the program in this process; the result holds exit code, stdout and stderr."""

    def run(*words: object) -> Result:
        result = CliRunner().invoke(main, [str(word) for word in words])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return run


@pytest.fixture(scope="session")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Mixtral in several bf16 files with an index."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=101,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    folder = tmp_path_factory.mktemp("hf") / "mixtral"
    MixtralForCausalLM(config).bfloat16().save_pretrained(folder, max_shard_size="30KB")
    (folder / "tokenizer.json").write_text(json.dumps({"not": "a real one"}))
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder
