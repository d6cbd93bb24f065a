"""Finetuning at true sizes on few GPUs: what a trainer's command line takes, in one command.

    python -m benchmarks.finetune [SECTION ...] [--json]
    python -m benchmarks.finetune --model mixtral-8x7b --ranks 4 [--layers N] [--steps N] [--beside FLAGS]
        [--save-and-resume FLAGS] -- TRAINER'S FLAGS

Weights are random, made on the GPUs; the engine is that of the trainer's flags, its data are random tokens. Prints tokens/s,
MFU, the peak of GPU memory and of page-locked host memory, the time of a step and of its forward and backward passes alone,
and what the update costs of a step. --beside measures the same with other flags, in turns, and says what the first cost
over them. --save-and-resume saves, takes the checkpoint up under other flags in new processes, and compares bit for bit.

Each measurement is a launch of its own. SECTION is one of those of `SECTIONS`, which are the tables of docs/finetuning.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.launching import launch_environment
from benchmarks.models import MODELS, at_depth

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A command line to measure."""

    name: str
    model: str
    flags: str
    """The trainer's."""
    ranks: int = 1
    layers: int | None = None
    """None: all of the model's."""
    steps: int = 4
    beside: str | None = None
    """Flags to measure the same work with, in turns."""
    save_and_resume: str | None = None
    """Flags of another layout that takes up what is saved; None saves nothing."""
    profile_to: str | None = None
    """Folder for the kernels of a step; None writes none."""


_LENGTH = "--seq-length 4096 --micro-batch-size 1 --bf16"
_HOST = "--optimizer-cpu-offload"
_LORA = f"{_LENGTH} --lora-rank 16 --recompute-granularity full"
_ALL = "--lora-targets '*.self_attn.*' '*.experts.*' --moments-dtype bfloat16"
_FULL = (
    f"--seq-length 4096 --micro-batch-size 2 --bf16 --global-batch-size 32 --moments-dtype bfloat16 {_HOST} "
    "--tensor-model-parallel-size 2 --sequence-parallel --expert-model-parallel-size 4 --expert-tensor-parallel-size 1 "
    "--use-distributed-optimizer --recompute-granularity full"
)
_EIGHT = (
    "--seq-length 4096 --bf16 --global-batch-size 128 --moments-dtype bfloat16 --use-distributed-optimizer "
    "--expert-model-parallel-size 8"
)
_OTHER = f"{_LENGTH} --global-batch-size 32 --moments-dtype bfloat16 --pipeline-model-parallel-size"
SECTIONS: dict[str, list[Case]] = {
    "offload": [
        Case(
            name="Mixtral 8x7B, 2 layers, one GPU",
            model="mixtral-8x7b",
            layers=2,
            flags=f"{_LENGTH} --global-batch-size 8 --moments-dtype bfloat16 {_HOST}",
            beside=f"{_LENGTH} --global-batch-size 8 --moments-dtype bfloat16",
            steps=6,
        ),
        Case(
            name="Mixtral 8x7B, 4 layers, one GPU",
            model="mixtral-8x7b",
            layers=4,
            flags=f"{_LENGTH} --global-batch-size 32 --moments-dtype bfloat16 {_HOST}",
        ),
    ],
    "full": [
        Case(
            name="Mixtral 8x7B, all weights, saved without the optimizer's state",
            model="mixtral-8x7b",
            ranks=4,
            flags=f"{_FULL} --no-save-optim",
            steps=2,
            save_and_resume=f"{_OTHER} 4 {_HOST} --recompute-granularity full",
        ),
        Case(
            name="Mixtral 8x7B, 4 layers, saved with the optimizer's state",
            model="mixtral-8x7b",
            ranks=4,
            layers=4,
            flags=_FULL,
            save_and_resume=f"{_OTHER} 4",
        ),
    ],
    "lora": [
        Case(
            name="Qwen3-30B-A3B, LoRA on attention",
            model="qwen3-30b-a3b",
            flags=f"{_LORA} --global-batch-size 4",
        ),
        Case(
            name="Qwen3-30B-A3B, LoRA on attention and experts",
            model="qwen3-30b-a3b",
            flags=f"{_LORA} {_ALL} --global-batch-size 4",
        ),
    ],
    "qlora": [
        Case(
            name="Qwen3-30B-A3B in nf4, LoRA on attention",
            model="qwen3-30b-a3b",
            flags=f"{_LORA} --quantize-base nf4 --double-quant --global-batch-size 4",
        ),
        Case(
            name="Qwen3-30B-A3B in nf4, LoRA on attention and experts",
            model="qwen3-30b-a3b",
            flags=f"{_LORA} {_ALL} --quantize-base nf4 --global-batch-size 4",
        ),
        Case(
            name="Qwen3-30B-A3B in fp8, LoRA on attention",
            model="qwen3-30b-a3b",
            flags=f"{_LORA} --quantize-base fp8 --global-batch-size 4",
        ),
        Case(
            name="Mixtral 8x7B in nf4, LoRA on attention and experts",
            model="mixtral-8x7b",
            flags=f"{_LORA} {_ALL} --quantize-base nf4 --global-batch-size 4",
        ),
    ],
    "lora-two": [
        Case(
            name="Mixtral 8x7B, LoRA on attention and experts",
            model="mixtral-8x7b",
            ranks=2,
            flags=f"{_LORA} {_ALL} --global-batch-size 8 --expert-model-parallel-size 2",
        ),
    ],
    "eight": [
        Case(
            name="Qwen3-30B-A3B, all weights, tokens to all experts in turn and as routed",
            model="qwen3-30b-a3b",
            ranks=8,
            flags=f"{_EIGHT} --micro-batch-size 2 --moe-router-force-load-balancing",
            beside=f"{_EIGHT} --micro-batch-size 2",
        ),
        Case(
            name="Mixtral 8x7B, all weights on eight GPUs, saved without the optimizer's state",
            model="mixtral-8x7b",
            ranks=8,
            flags=f"{_EIGHT} --micro-batch-size 1 --no-save-optim",
            save_and_resume=f"{_OTHER} 8 --no-save-optim",
        ),
    ],
}


def config_of(case: Case) -> dict[str, Any]:
    """Give the config.json of a case's model, at its depth."""
    return at_depth(case.model, case.layers)


class Failed(Exception):
    """A launch that ended with an error; its text is the ranks' last lines."""


def launch(case: Case, flags: str, folder: Path, **more: Any) -> dict[str, Any]:
    """Start the ranks of a case, and give what the first one found.

    Args:
        case: the model and number of ranks.
        flags: the trainer's.
        folder: for checkpoints.
        **more: further fields of `finetune_rank.Spec`.

    Returns:
        Its line of JSON.

    Raises:
        Failed: they ended with an error.
    """
    spec = {"config": config_of(case), "flags": shlex.split(flags), "steps": case.steps, "folder": str(folder)} | more
    program = ["-m", "benchmarks.finetune_rank", json.dumps(spec)]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(case.ranks)]
    environment = launch_environment(8 if case.model != "tiny" else 1)
    environment.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    command = [sys.executable, *(torchrun if case.ranks > 1 else []), *program]
    begin = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise Failed("\n".join(done.stderr.strip().splitlines()[-25:]))
    # Of a case of several launches something should be left if it is ended between them.
    print(f"{case.name}: a launch of {time.perf_counter() - begin:.0f} s: {lines[-1]}", file=sys.stderr, flush=True)
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def measure(case: Case, scratch: Path | None) -> dict[str, Any]:
    """Do all launches of a case.

    Returns:
        What the first found; `beside`: the other's; `over`: share of a step that the first takes longer; `resumed`.
    """
    with tempfile.TemporaryDirectory(prefix="finetune-", dir=scratch) as folder:
        saves = case.save_and_resume is not None
        out = launch(case, case.flags, Path(folder), save=saves, profile_to=case.profile_to)
        if case.beside is not None:
            other = launch(case, case.beside, Path(folder))
            out |= {"beside": other, "over": 1 - other["ms"] / out["ms"]}
        if case.save_and_resume is not None:
            out["resumed"] = launch(case, case.save_and_resume, Path(folder), resume=True, steps=1, passes=False)
    return out | {"case": dataclasses.asdict(case)}


def lines(case: Case, found: dict[str, Any]) -> Iterator[str]:
    """Give what was found as lines for a person."""
    layers = config_of(case)["num_hidden_layers"]
    yield f"{case.name}: {case.ranks} x {found['device']}, torch {found['torch']}, {layers} layers"
    yield f"  flags: {case.flags}"
    if found["pp_layers"] is not None:
        yield f"  layers of the stages: {', '.join(map(str, found['pp_layers']))}"
    if "ms" in found:
        yield f"  {_speed(found)}"
        if "passes_ms" in found:
            yield (
                f"  forward and backward passes alone {found['passes_ms']:,.0f} ms: the update is "
                f"{found['update_share']:.1%} of a step"
            )
    if "beside" in found:
        yield f"  beside {case.beside}"
        yield f"  {_speed(found['beside'])}; the first takes {found['over']:.1%} of its step more"
    if "save_s" in found:
        copied = "without a copy on the host" if found["synchronous"] else "from a copy on the host"
        yield (
            f"  saved {found['saved_gb']:.1f} GB {copied} in {found['save_s']:.1f} s, training waits "
            f"{found['save_stall_s']:.1f} s before it goes on"
        )
    if "resumed" in found:
        again = found["resumed"]
        yield f"  taken up with {case.save_and_resume}"
        yield f"  in {again['load_s']:.1f} s, {'equal bit for bit' if again['equal'] else 'NOT EQUAL'}; {_speed(again)}"


def _speed(found: dict[str, Any]) -> str:
    share = f", MFU {found['mfu']:.1%}" if found["mfu"] else ""
    rows = f", rows of the fullest rank {found['rank_load']:.2f} of the mean" if found["rank_load"] else ""
    pinned = f", page-locked {found['pinned_gb']:.1f} GB" if found["pinned_gb"] else ""
    return (
        f"{found['ms']:,.0f} ms a step of {found['tokens']:,} tokens, {found['tokens_per_second']:,.0f} tokens/s "
        f"({found['tokens_per_second_a_gpu']:,.0f} a GPU), {found['tflops_a_gpu']:.0f} TFLOP/s a GPU{share}; peak "
        f"{found['peak_gb']:.1f} GB ({found['reserved_gb']:.1f} reserved){pinned}{rows}; loss {found['loss'][0]:.3f} to "
        f"{found['loss'][1]:.3f}"
    )


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, list[Case]]:
    """Read the command line: sections, or one case of its own."""
    words = sys.argv[1:] if arguments is None else arguments
    cut = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(prog="benchmarks.finetune", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--model", choices=MODELS, help="measure the trainer's flags that follow -- on this one")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--layers", type=int, help="of the model; by default all")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--beside", metavar="FLAGS", help="measure the same work with these, too")
    parser.add_argument("--save-and-resume", metavar="FLAGS", help="save, and take it up with these")
    parser.add_argument("--match", default="", metavar="TEXT", help="of sections only cases whose name has it")
    parser.add_argument(
        "--profile-to", metavar="FOLDER", help="write the kernels of a step, and where the host's time goes, there"
    )
    parser.add_argument("--scratch", type=Path, help="folder on the disk that checkpoints go to")
    parser.add_argument("--json", action="store_true", help="print one JSON object for each case")
    args = parser.parse_args(words[:cut])
    for name in args.sections:
        if name not in SECTIONS:
            parser.error(f"no section {name}; there are {', '.join(SECTIONS)}")
    if args.model is None:
        if cut < len(words):
            parser.error("trainer's flags need --model")
        chosen = [case for name in args.sections or SECTIONS for case in SECTIONS[name] if args.match in case.name]
        return args, [dataclasses.replace(case, profile_to=args.profile_to) for case in chosen]
    own = {
        name: getattr(args, name)
        for name in ("model", "ranks", "layers", "steps", "beside", "save_and_resume", "profile_to")
    }
    return args, [Case(name=args.model, flags=shlex.join(words[cut + 1 :]), **own)]


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; 1 where a case failed or a checkpoint came back changed."""
    args, cases = parse(arguments)
    status = 0
    for case in cases:
        try:
            found = measure(case, args.scratch)
        except Failed as failure:
            status = 1
            print(
                json.dumps({"case": dataclasses.asdict(case), "failed": str(failure)})
                if args.json
                else f"{case.name}: FAILED\n{failure}",
                flush=True,
            )
            continue
        status |= int(not found.get("resumed", {"equal": True})["equal"])
        print(json.dumps(found) if args.json else "\n".join(lines(case, found)), flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
