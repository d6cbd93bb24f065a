"""Everything that several GPUs of one machine can show, in one command that prints tables.

    python -m benchmarks.multi_gpu [--ranks N] [--only SECTION ...] [--match TEXT] [--model mixtral|qwen3] [--balanced]
        [--out DIR] [--scratch DIR] [--quick]
    torchrun --nproc-per-node N -m benchmarks.multi_gpu [...]
    python -m benchmarks.multi_gpu --peers [SYSTEM ...] [--ranks N] [--rounds 3] [--out DIR] [--quick]

Sections: parity of every layout with one GPU over NCCL, in fp32 and bf16; training of a model with as many layers as every
layout holds, with memory, hidden communication and exchanges beside the links' speed, and filled, with all that each holds;
scaling from 1 GPU to N; checkpoints saved and taken up under other layouts. --quick does all of it with tiny sizes, also on
CPU ranks (gloo).

With --peers instead: a training step beside Megatron-Core's and transformers' on 2, 4 and 8 GPUs up to N, each system in
processes of its own and in turns, and where the device's time of a step goes.

Each number of ranks is a launch of its own by torchrun, the largest first. A measurement that fails (out of memory, a
hang) becomes a line of its table, and the launch goes on behind it. Started by torchrun, the first rank does this.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.launching import launch_environment
from benchmarks.multi_gpu.beside import compare_peers
from benchmarks.multi_gpu.job import Task
from benchmarks.multi_gpu.plan import SECTIONS, make_plan
from benchmarks.multi_gpu.tables import Record, report
from benchmarks.step_systems import SYSTEMS

ROOT = Path(__file__).parents[2]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="benchmarks.multi_gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, default=None, help="1, 2, 4 or 8; default: torchrun's, or all GPUs")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="SECTION")
    parser.add_argument("--match", default="", metavar="TEXT", help="only measurements whose layout contains it")
    parser.add_argument("--out", type=Path, default=None, help="folder for report.md, results.jsonl and ranks.log")
    parser.add_argument("--scratch", type=Path, default=None, help="folder on the disk that checkpoints go to")
    parser.add_argument("--model", choices=("mixtral", "qwen3"), default="mixtral", help="whose layers are trained")
    parser.add_argument(
        "--balanced", action="store_true", help="each expert gets as many tokens, whatever routers choose"
    )
    parser.add_argument("--fill", type=float, default=0.85, help="share of a GPU's memory to plan models for")
    parser.add_argument("--quick", action="store_true", help="tiny sizes and few cases")
    parser.add_argument("--peers", nargs="*", choices=SYSTEMS, help="set systems beside each other; none named: all")
    parser.add_argument("--rounds", type=int, default=3, help="with --peers: runs of each system; the median counts")
    args = parser.parse_args(arguments)
    if args.ranks is None:
        args.ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 0)) or _count_gpus()
    if args.ranks not in (1, 2, 4, 8):
        parser.error(f"--ranks is {args.ranks}; expected 1, 2, 4 or 8")
    if not args.quick and _count_gpus() < args.ranks:
        parser.error(f"{args.ranks} ranks need as many GPUs, found {_count_gpus()}; --quick runs on a CPU too")
    return args


def _count_gpus() -> int:
    import torch

    return torch.cuda.device_count()


class Launcher:
    """Starts ranks for tasks and collects what they note."""

    def __init__(self, args: argparse.Namespace, out: Path, scratch: Path, machine: dict[str, Any]) -> None:
        """Prepare the folders.

        Args:
            args: the command line.
            out: for results and the log.
            scratch: for plans, and for checkpoints.
            machine: what the report must say of where it comes from.
        """
        out.mkdir(parents=True, exist_ok=True)
        self._args, self._out, self._scratch, self._machine = args, out, scratch, machine
        self._results = out / "results.jsonl"
        self._results.unlink(missing_ok=True)
        (out / "ranks.log").unlink(missing_ok=True)

    def records(self) -> list[Record]:
        """What has been measured so far, failures included."""
        text = self._results.read_text() if self._results.exists() else ""
        lines = text.rpartition("\n")[0].splitlines()  # the last one may be in the writing
        return [
            Record(task=Task(**x["task"]), result=x["result"], failed=x.get("failed")) for x in map(json.loads, lines)
        ]

    def report(self) -> tuple[str, bool]:
        """Write the tables of what has been measured so far; give them, and whether all is well."""
        text, good = report(self.records(), self._machine)
        (self._out / "report.md").write_text(text)
        return text, good

    def run(self, num_ranks: int, tasks: list[Task]) -> None:
        """Run tasks in order; one that fails is noted, and new ranks are started for those behind it.

        Args:
            num_ranks: of the launch.
            tasks: of all these ranks, or of one.
        """
        pending = tasks
        while pending:
            status = self._launch(num_ranks, pending)
            done = {record.task.number for record in self.records()}
            pending = [task for task in pending if task.number not in done]
            if pending:
                self._note_failure(pending.pop(0), status)

    def _launch(self, num_ranks: int, tasks: list[Task]) -> int:
        plan = self._scratch / "plan.json"
        fields = {
            "tasks": [task.to_json() for task in tasks], "sizes": "quick" if self._args.quick else self._args.model,
            "balanced": self._args.balanced, "fill": self._args.fill, "scratch": str(self._scratch),
            "results": str(self._results),
        }  # fmt: skip
        plan.write_text(json.dumps(fields))
        print(f"{num_ranks} ranks, {len(tasks)} measurements", flush=True)
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
        command = [*torchrun, "-m", "benchmarks.multi_gpu.worker", str(plan)]
        environment = launch_environment(1 if self._args.quick else 8)
        with (self._out / "ranks.log").open("a") as log:
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=log)
            try:
                while True:
                    try:
                        return process.wait(timeout=5)
                    except subprocess.TimeoutExpired:
                        self.report()  # what is there already, should this process be ended
            finally:
                process.terminate()
                process.wait()

    def _note_failure(self, task: Task, status: int) -> None:
        # The first to be written says why; the others may only have lost their peer.
        notes = sorted(self._scratch.glob(f"error-{task.number}-*.txt"), key=lambda path: path.stat().st_mtime_ns)
        why = notes[0].read_text().splitlines()[0] if notes else f"the ranks ended with status {status}; see the log"
        print(f"  {task.kind} {task.label}, {task.world} ranks: FAILED: {why}", flush=True)
        line = {"task": task.to_json(), "result": None, "failed": why}
        with self._results.open("a") as file:
            file.write(json.dumps(line) + "\n")


def main(arguments: list[str] | None = None) -> int:
    """Run the program.

    Args:
        arguments: the command line without the program's name; None takes the process's own.

    Returns:
        0 if every measurement was made, and every layout trains and resumes as it must; with --peers, if every one of this
        project's systems was measured.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return 0  # torchrun's other ranks: the first one launches what is measured
    args = parse(arguments)
    if args.peers is not None:
        return compare_peers(args.ranks, args.peers or None, args.rounds, args.out, quick=args.quick)
    if args.scratch is not None:
        args.scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="multi-gpu-", dir=args.scratch) as scratch:
        out: Path = (args.out or Path(scratch) / "out").resolve()
        launcher = Launcher(args, out, Path(scratch), _machine(args))
        for num_ranks, tasks in make_plan(args.ranks, args.only, quick=args.quick):
            launcher.run(num_ranks, [task for task in tasks if args.match in task.label])
        text, good = launcher.report()
        print(text)
    return 0 if good else 1


def _machine(args: argparse.Namespace) -> dict[str, Any]:
    """What the report must say of where it comes from."""
    import torch

    found = None
    if shutil.which("nvidia-smi") and torch.cuda.is_available():
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        found = subprocess.run(query, capture_output=True, text=True).stdout.splitlines()[0]
    words = ["python -m benchmarks.multi_gpu --ranks", str(args.ranks)]
    words += ["--only", *args.only] if args.only != list(SECTIONS) else []
    words += ["--model", args.model] if args.model != "mixtral" else []
    words += [f"--{name}" for name in ("balanced", "quick") if getattr(args, name)]
    command = " ".join(words)
    return {"device": found or "CPU (gloo)", "ranks": args.ranks, "torch": torch.__version__, "command": command}


if __name__ == "__main__":
    sys.exit(main())
