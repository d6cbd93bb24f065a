"""Published quantised releases, from their folders to a run and back: a gpt-oss in MXFP4, a DeepSeek-V3 in FP8 with a further layer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from cli.main import main
from moeconv.checkpoint import open_checkpoint
from moeconv.errors import MoeconvError
from runtime.job.processes import Process
from runtime.parity.ranks import RankPool
from runtime.settings.flags import parse_flags
from runtime.start import prepare
from tests.moeconv.quantised import mxfp4_folder, quantise_folder
from tests.runtime.jobs import Job, run_jobs
from tests.runtime.launch import steps
from tests.runtime.tiny import make_text
from tests.runtime.words import VOCAB_SIZE, make_tokenizer

OSS = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "vocab_size": VOCAB_SIZE}
DEEPSEEK = {
    "hidden_size": 128, "moe_intermediate_size": 128, "intermediate_size": 256, "q_lora_rank": 64, "kv_lora_rank": 32,
    "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 64, "head_dim": 32, "num_nextn_predict_layers": 1,
    "vocab_size": VOCAB_SIZE,
}  # fmt: skip
FURTHER = {"model.layers.2.eh_proj.weight": torch.ones(128, 256).to(torch.float8_e4m3fn)}


def folder(name: str, root: Path) -> Path:
    if name == "gpt_oss":
        made = mxfp4_folder(root / "hf", **OSS)
    else:
        chosen = lambda n: n.endswith("_proj.weight")  # noqa: E731
        made = quantise_folder(root / "hf", "deepseek_v3", "fp8", chosen, FURTHER, **DEEPSEEK)
    make_tokenizer(made)
    return made


def words(*arguments: object) -> tuple[str, ...]:
    return tuple(map(str, arguments))


def command(*arguments: object) -> str:
    done = CliRunner().invoke(main, words(*arguments))
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v3"])
def test_a_day_with_a_quantised_release(name: str, tmp_path: Path, pool: RankPool) -> None:
    hf, text = folder(name, tmp_path), make_text(tmp_path / "text.txt")
    arguments = [
        "--data", text, "--save", tmp_path / "run", "--log-file", tmp_path / "log.jsonl", "--data-cache-path", tmp_path / "cache",
        "--train-iters", 4, "--save-interval", 2, "--keep-last", 1, "--seq-length", 32, "--micro-batch-size", 1, "--global-batch-size", 4,
        "--lr", 1e-3, "--split", "95,5,0", "--expert-model-parallel-size", 2,
    ]  # fmt: skip
    with pytest.raises(MoeconvError, match="--dtype bfloat16"):
        prepare(parse_flags(words("--load", hf, *arguments)), Process(world_size=2))
    command("import-hf", hf, tmp_path / "ckpt", "--ep", 2, "--dtype", "bfloat16")
    run_jobs([Job(2, words("--load", tmp_path / "ckpt", *arguments))], pool)
    assert len(steps(tmp_path / "log.jsonl")) == 4
    saved = max(path.parent for path in (tmp_path / "run").glob("*/moeconv.json"))
    command("export-hf", saved, tmp_path / "out")
    held = {k: v for f in (tmp_path / "out").glob("*.safetensors") for k, v in load_file(f).items()}
    if name == "deepseek_v3":
        (carried,) = FURTHER
        assert torch.equal(held[carried].view(torch.uint8), FURTHER[carried].view(torch.uint8))
    from transformers import AutoModelForCausalLM

    _, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"]
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert open_checkpoint(saved).model.quantised == frozenset()
