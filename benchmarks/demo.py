"""The whole job on a small Mixtral: import, inspect, reshard, train on two processes, export, verify, compare. `make demo` runs it.

Makes a Mixtral of random weights with transformers, and a text and a tokenizer from the standard library's sources, in
./demo-out; then runs each command as a user would type it. The folder goes again at the end, unless --keep is given.
This process imports the standard library only, so that the commands' peak memory is their own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OUT = "demo-out"
TEXT_BYTES = 2_000_000
VOCAB_SIZE = 4096
TRAIN = (
    f"torchrun --nproc-per-node 2 -m runtime.train --load {OUT}/ckpt-ep2 --data {OUT}/text.txt --save {OUT}/run "
    "--expert-model-parallel-size 2 --train-iters 16 --micro-batch-size 4 --global-batch-size 8 --seq-length 128 "
    "--lr 1e-3 --lr-warmup-iters 2 --lr-decay-style cosine --moe-aux-loss-coeff 1e-2 --no-save-optim "
    f"--data-cache-path {OUT}/cache --log-interval 4 --log-file {OUT}/log.jsonl"
)
STEPS = {
    "import-hf": (f"moeconv import-hf {OUT}/hf {OUT}/ckpt --tp 2 --ep 4", f"{OUT}/ckpt"),
    "inspect": (f"moeconv inspect {OUT}/ckpt", None),
    "reshard": (f"moeconv reshard {OUT}/ckpt {OUT}/ckpt-ep2 --ep 2", f"{OUT}/ckpt-ep2"),
    "verify import": (f"moeconv verify {OUT}/ckpt-ep2 --against {OUT}/hf", f"{OUT}/ckpt-ep2"),
    "train": (TRAIN, f"{OUT}/run/latest/"),
    "export-hf": (f"moeconv export-hf {OUT}/run/latest {OUT}/hf-trained", f"{OUT}/hf-trained"),
    "verify export": (f"moeconv verify {OUT}/run/latest --against {OUT}/hf-trained", f"{OUT}/hf-trained"),
    "compare logits": (f"python -m runtime.compare {OUT}/run/latest {OUT}/hf-trained", f"{OUT}/hf-trained"),
}


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a step took: bytes of the folder it wrote or read, seconds, and the highest resident memory of a process in bytes."""

    name: str
    nbytes: int
    seconds: float
    memory: int
    output: str


def build(folder: str) -> None:
    """Write the text, and the model with a tokenizer trained on the text, into a folder."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = "\n".join(path.read_text(encoding="utf8", errors="replace") for path in sources)[:TEXT_BYTES]
    (Path(folder) / "text.txt").write_text(text, encoding="utf8")
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        text.splitlines(keepends=True), vocab_size=VOCAB_SIZE, special_tokens=["<s>", "</s>"], show_progress=False
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token="<s>", eos_token="</s>")
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=1024,
        bos_token_id=0,
        eos_token_id=1,
    )
    MixtralForCausalLM(config).bfloat16().save_pretrained(Path(folder) / "hf", max_shard_size="60MB")
    tokenizer.save_pretrained(Path(folder) / "hf")


def run(name: str, command: str, folder: str | None) -> Result:
    """Show a command, run it, and measure it.

    Raises:
        SystemExit: it failed.
    """
    print(f"\n$ {command}", flush=True)
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    environment.setdefault("OMP_NUM_THREADS", "1")  # as torchrun sets it, without its warning
    begin = time.perf_counter()
    child = subprocess.Popen(shlex.split(command), cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    lines = []
    for line in child.stdout:
        lines.append(line)
        print(line, end="", flush=True)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - begin
    if child.returncode:
        raise SystemExit(f"{name} failed with exit code {child.returncode}; {OUT} is kept")
    return Result(
        name=name,
        nbytes=sum(f.stat().st_size for f in (ROOT / folder).rglob("*.safetensors")) if folder else 0,
        seconds=seconds,
        memory=usage.ru_maxrss * 1024,
        output="".join(lines),
    )


def report(results: dict[str, Result], steps: list[dict[str, Any]]) -> str:
    """Give the closing table."""
    lines = [f"{'step':<14} {'MB':>8} {'seconds':>8} {'peak MB':>8}"]
    for r in results.values():
        size = f"{r.nbytes / 1e6:8.0f}" if r.nbytes else " " * 8
        lines.append(f"{r.name:<14} {size} {r.seconds:8.1f} {r.memory / 1e6:8.0f}")
    first, last = steps[0], steps[-1]
    lines += ["", f"loss: {first['lm_loss']:.3f} in the first step, {last['lm_loss']:.3f} in step {last['iteration']}"]
    found = re.search(r"differ by (\S+)", results["compare logits"].output)
    assert found is not None
    lines.append(
        f"logits: the trained shards in the trainer and their export in transformers differ by {found[1]} of the largest"
    )
    return "\n".join(lines)


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description="Run the whole job on a small Mixtral.")
    parser.add_argument("--keep", action="store_true", help=f"leave ./{OUT} where it is")
    keep = parser.parse_args().keep
    out = ROOT / OUT
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    print(f"Building a Mixtral with transformers, and a text and a tokenizer from the standard library, in {OUT}")
    builder = multiprocessing.get_context("spawn").Process(target=build, args=(str(out),))
    builder.start()
    builder.join()
    if builder.exitcode:
        raise SystemExit("building the model failed")
    results = {name: run(name, command, folder) for name, (command, folder) in STEPS.items()}
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    print("\n" + report(results, [record for record in records if "learning_rate" in record]))
    if not keep:
        shutil.rmtree(out)


if __name__ == "__main__":
    main()
