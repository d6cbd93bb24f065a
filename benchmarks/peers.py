"""This project's step beside its peers', each in processes of its own, in turns: tables for --peers."""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.launching import launch_environment
from benchmarks.step_profile import KINDS
from benchmarks.step_systems import SYSTEMS, version
from benchmarks.step_work import Work

_ROOT = Path(__file__).parent.parent
_ERROR = re.compile(r"^(?:[\w.]*\.)?\w*(?:Error|Exception|Interrupt|Exit)\b.*")


@dataclass(slots=True)
class Result:
    """What was measured of one system with one number of micro-batches."""

    rounds: list[dict[str, Any]] = field(default_factory=list)
    kinds: dict[str, float] = field(default_factory=dict)
    """Kind of kernel -> milliseconds of a step."""
    failed: str | None = None
    """Why a round, or its profile, came to no end."""


def compare(
    work: Work, systems: Sequence[str] | None, rounds: int, profile_to: Path | None = None
) -> tuple[str, list[str]]:
    """Measure systems beside each other.

    Args:
        work: what they do.
        systems: which; None: all that are installed and have a place in it.
        rounds: how often, in turns.
        profile_to: folder for the kernels of a step and the host's time; None: kernels are told by kind, and that is all.

    Returns:
        Tables in Markdown, after which what is left out is named with its reason; and the systems that failed.
    """
    chosen, left_out = choose(work, systems)
    results = {(name, num): Result() for name in chosen for num in work.numbers}
    for place in range(rounds):
        for name in chosen:
            options = ["--kinds"] if place == 0 else []
            options += ["--profile", str(profile_to)] if profile_to is not None and place == 0 else []
            _measure(name, work, options, results, place + 1)
    failed = [name for name in chosen if any(results[name, num].failed is not None for num in work.numbers)]
    return "\n".join([heading(work, chosen), "", *table(work, chosen, results), "", *left_out]), failed


def choose(work: Work, systems: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """Give the systems that can be measured, and lines that say why others can't."""
    chosen, left_out = [], []
    for name in SYSTEMS if systems is None else systems:
        missing = [package for package in SYSTEMS[name].packages if version(package) is None]
        reason = f"{', '.join(missing)} not installed" if missing else SYSTEMS[name].unfit(work)
        if reason is None:
            chosen.append(name)
        else:
            left_out.append(f"{name} is left out: {reason}")
    return chosen, left_out


def _measure(name: str, work: Work, options: list[str], results: dict[tuple[str, int], Result], place: int) -> None:
    """Measure one system once, and say so."""
    start = [sys.executable, "-m"]
    if work.ranks > 1:
        start += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(work.ranks), "-m"]
    command = [*start, "benchmarks.step_systems", name, *work.arguments, *options]
    environment = launch_environment(8 if torch.cuda.is_available() else 1)
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=_ROOT, env=environment)
    for line in done.stdout.splitlines():
        if not line.startswith("{"):
            continue
        found = json.loads(line)
        result = results[name, found["microbatches"]]
        if "kinds" in found:
            result.kinds = found["kinds"]
        else:
            result.rounds.append(found)
            print(f"round {place}: {line}", flush=True)
    if done.returncode:
        why = error_of(done.stderr)
        print(f"round {place}: {name} failed: {why}\n{done.stderr[-3000:]}", file=sys.stderr, flush=True)
        for num in work.numbers:
            if len(results[name, num].rounds) < place or place == 1:
                results[name, num].failed = why


def error_of(stderr: str) -> str:
    """Find what a program failed of in what it wrote: the last error, that of a rank before torchrun's own."""
    lines = [re.sub(r"^\[rank\d+\]:\s?", "", line) for line in stderr.splitlines()]
    errors = [line for line in lines if _ERROR.match(line) and "ChildFailedError" not in line]
    last = errors[-1] if errors else next((line for line in reversed(lines) if line.strip()), "nothing was written")
    return last.strip()


def heading(work: Work, chosen: Sequence[str]) -> str:
    """Say what the tables are of: the work, the card, the versions."""
    cuda = torch.cuda.is_available()
    card = f"{work.ranks} x {torch.cuda.get_device_name() if cuda else 'CPU rank (gloo): no figure says anything'}"
    packages = ["torch", "triton", *sorted({package for name in chosen for package in SYSTEMS[name].packages})]
    versions = [f"{package} {found}" for package in packages if (found := version(package)) is not None]
    if cuda and (cudnn := torch.backends.cudnn.version()):
        versions.append(f"cuDNN {cudnn}")
    return f"{work}: {card}; {', '.join(versions)}"


def table(work: Work, chosen: Sequence[str], results: dict[tuple[str, int], Result]) -> list[str]:
    """Make the tables: times, and where the device's time of a step goes; a system that failed has a row that says so."""
    head = "| micro-batches | system | ms | tokens/s | TFLOP/s a GPU | peak GiB | runtime is faster by |"
    rows, kinds = [head, "| --- | --- | --- | --- | --- | --- | --- |"], list[str]()
    for num in work.numbers:
        for name in chosen:
            result = results[name, num]
            if result.rounds:
                rows.append(f"| {num} | {name} | {_figures(name, num, result, results)} |")
            if result.failed is not None:
                rows.append(f"| {num} | {name} | failed: {result.failed.replace('|', '/')} | | | | |")
            if result.kinds:
                shares = " | ".join(f"{result.kinds[kind]:.1f}" for kind in [*KINDS, "other"])
                kinds.append(f"| {num} | {name} | {shares} |")
    if kinds:
        names = " | ".join([*KINDS, "other"])
        rows += [
            "",
            "Where the device's time of a step goes on the first rank, ms; communication includes waits for other ranks, and "
            "what runs at once counts twice:",
            "",
            f"| micro-batches | system | {names} |",
            f"|{' --- |' * (len(KINDS) + 3)}",
            *kinds,
        ]
    return rows


def _figures(name: str, num: int, result: Result, results: dict[tuple[str, int], Result]) -> str:
    alike = f"runtime, FP8 {name.rpartition('FP8 ')[2]}"
    other = next((key for key in results if key[0].startswith("runtime") and key[1] == num), ("", num))
    ours = results.get((alike, num)) or results.get(("runtime", num)) or results.get(other) or Result()
    # The median of the rounds' ratios: the card's temperature is alike within a round.
    ratios = [a["ms"] / b["ms"] for a, b in zip(result.rounds, ours.rounds, strict=False)]
    ms, tokens, tflops = (
        statistics.median(found[key] for found in result.rounds) for key in ("ms", "tokens_per_second", "tflops")
    )
    times = [found["ms"] for found in result.rounds]
    spread = f" ({min(times):.1f} to {max(times):.1f})" if len(times) > 1 else ""
    peak = max(found["peak_gib"] for found in result.rounds)
    ratio = f"{statistics.median(ratios):.3f}" if ratios else ""
    return f"{ms:.1f}{spread} | {tokens:,.0f} | {tflops:.0f} | {peak:.1f} | {ratio}"
