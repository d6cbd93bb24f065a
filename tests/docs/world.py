"""What a reader of the documentation has at hand, at tiny sizes and under the same names: models, data, runs; and a way to run commands there."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from click.testing import CliRunner
from transformers import MistralConfig, MistralForCausalLM, MixtralConfig, MixtralForCausalLM

from cli.main import main
from runtime.job.processes import Process
from runtime.settings.flags import parse_flags
from runtime.start import prepare, run_job
from tests.moeconv.quantised import mxfp4_folder, quantise_folder
from tests.runtime.data.chats import CHATML, with_template
from tests.runtime.words import VOCAB_SIZE, make_tokenizer, real_text

MIXTRAL, MISTRAL, OSS = "mistralai/Mixtral-8x7B-v0.1", "mistralai/Mistral-7B-v0.1", "openai/gpt-oss-20b"
_SIZES = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 4, "max_position_embeddings": 8192, "sliding_window": None, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
_DEEPSEEK: dict[str, Any] = {
    "hidden_size": 256, "moe_intermediate_size": 256, "intermediate_size": 512, "q_lora_rank": 128, "kv_lora_rank": 128,
    "qk_nope_head_dim": 64, "qk_rope_head_dim": 64, "v_head_dim": 64, "head_dim": 64, "num_hidden_layers": 4,
    "n_routed_experts": 8, "num_attention_heads": 4, "num_key_value_heads": 4,
}  # fmt: skip
_PLACES = {
    "--tensor-model-parallel-size", "--expert-model-parallel-size", "--pipeline-model-parallel-size", "--nproc-per-node",
    "--expert-tensor-parallel-size", "--context-parallel-size",
}  # fmt: skip
_DROPPED = {"--sequence-parallel"}
_TINY = {
    "--seq-length": "64", "--train-iters": "1", "--micro-batch-size": "1", "--global-batch-size": "2", "--lr-warmup-iters": "0",
    "--num-workers": "0", "--eval-iters": "1", "--data-cache-path": "cache",
}  # fmt: skip
_DRAWN = {"--num-layers": "2", "--hidden-size": "64", "--ffn-hidden-size": "48"}


def build(folder: Path) -> None:
    """Make everything that pages take for granted, in the current folder's `folder`."""
    for name, model in ((MIXTRAL, MixtralForCausalLM), (MISTRAL, MistralForCausalLM)):
        torch.manual_seed(0)
        config = MixtralConfig(**_SIZES, num_local_experts=8) if name == MIXTRAL else MistralConfig(**_SIZES)
        model(config).bfloat16().save_pretrained(folder / name)
        make_tokenizer(folder / name)
        with_template(folder / name, CHATML, folder / name)
    mxfp4_folder(folder / OSS, hidden_size=64, intermediate_size=128, head_dim=16)
    mxfp4_folder(folder / "gpt-oss-mxfp4", hidden_size=256, intermediate_size=256, head_dim=64, num_local_experts=8)
    quantise_folder(
        folder / "deepseek-v3-fp8", "deepseek_v3", "fp8", lambda name: name.endswith("_proj.weight"), **_DEEPSEEK
    )
    for copy in ("mixtral-hf", "mixtral-41m", "Mixtral-8x7B-v0.1", "demo-out/hf"):
        shutil.copytree(folder / MIXTRAL, folder / copy)
    make_tokenizer(folder / "tokenizer")
    _write_data(folder)
    with contextlib.chdir(folder):
        moeconv("import-hf", MIXTRAL, "ckpt", "--tp", "2", "--ep", "4")
        Path("checkpoints").mkdir()
        moeconv("export-megatron", "ckpt", "checkpoints/run7", "--format", "torch_dist")
        for copy in ("megatron", "shards"):
            shutil.copytree("checkpoints/run7" if copy == "megatron" else "ckpt", copy)
        moeconv("prepare-data", "text.jsonl", "corpus-tokens", "--tokenizer", "ckpt", "--workers", "1")
        train(("--load", "ckpt", "--data", "corpus.jsonl", "--save", "run", "--ema-decay", "0.9", "--bf16"))
        moeconv("reshard", "run/latest", "merged", "--ep", "2")
        moeconv(
            "upcycle",
            MISTRAL,
            "moe",
            "--experts",
            "32",
            "--method",
            "virtual-group",
            "--granularity",
            "4",
            "--no-check",
        )
        Path("run/best").symlink_to(os.readlink("run/latest"))
        for name in ("lora", "runs/base", "runs/upcycled"):
            shutil.copytree("run", name, symlinks=True)


def _write_data(folder: Path) -> None:
    texts = [part for part in real_text().split("\n\n") if part.strip()][:120]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    for name in ("corpus.jsonl", "text.jsonl", "wiki.jsonl", "task.jsonl"):
        (folder / name).write_text(lines)
    import zstandard

    (folder / "more.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    for name in ("corpus/a.txt", "code/a.py"):
        (folder / name).parent.mkdir()
        (folder / name).write_text("\n\n".join(texts))
    chats = [
        {"messages": [{"role": "user", "content": f"What is {n}?"}, {"role": "assistant", "content": f"{n} is {n}."}]}
        for n in range(60)
    ]
    for name in ("chats.jsonl", "chat.jsonl"):
        (folder / name).write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    (folder / "chat.jinja").write_text(CHATML)
    (folder / "talk.json").write_text(json.dumps(chats[0]["messages"][:1]))


def moeconv(*words: str) -> str:
    """Run a command of moeconv in this process.

    Returns:
        What it printed.
    """
    result = CliRunner().invoke(main, list(words), input="What is a tree?\n", catch_exceptions=False)
    # 3: verify and diff found a difference, as they should where a page compares a trained model with what it was.
    assert result.exit_code == 0 or (result.exit_code == 3 and words[0] in ("verify", "diff")), (words, result.output)
    return result.output


def judge(flags: Sequence[str], world_size: int) -> None:
    """Have the trainer judge a command line as it stands in the page, as one of so many ranks."""
    prepare(parse_flags(list(flags)), Process(world_size=world_size))


def train(flags: Sequence[str]) -> None:
    """Train with a page's flags on one rank, a step of a few tokens."""
    run, origin = prepare(parse_flags(shrunk(flags)), Process())
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            run_job(run, origin, Process(), torch.device("cpu"), dist.HashStore(), lambda doing, **_: None)
    finally:
        dist.destroy_process_group()


def shrunk(flags: Sequence[str]) -> list[str]:
    """Give flags without degrees, and with tiny sizes in place of theirs."""
    tiny = _TINY | (_DRAWN if "--num-layers" in flags else {}) | ({"--eval-iters": "0"} if "1,0,0" in flags else {})
    return [*without_degrees(flags, tiny), *(word for pair in tiny.items() for word in pair)]


def without_degrees(flags: Sequence[str], also: Container[str] = ("--seq-length",)) -> list[str]:
    """Give flags without degrees, and without those that are to have other values."""
    out, words = [], iter(flags)
    for word in words:
        if word in _PLACES or word in also:
            next(words)
        elif word not in _DROPPED:
            out.append(word)
    return out


def copy_of(world: Path, folder: Path) -> Path:
    """Give a folder with the world's files, which share their bytes; what a command replaces is replaced here alone."""
    shutil.copytree(world, folder, copy_function=os.link, symlinks=True)
    return folder
