"""What a plan says beside what was measured: `python -m benchmarks.plan`. It needs no GPU and takes seconds.

Runs of the engine before its fused steps are compared with that engine's constants, each from a measurement of its kernels
alone (`BEFORE`). No constant is fitted to a row of these tables.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.measured_runs import (
    PUBLISHED,
    TODAY,
    Row,
    adapters,
    all_weights,
    another_host,
    one_gpu,
    several_gpus,
    todays_engine,
)
from moeconv.families import FAMILIES
from moeconv.families.base import Model
from runtime.estimate.machine import Machine, find_machine
from runtime.estimate.setup import Setup
from runtime.estimate.step import Estimate
from runtime.fp8.config import Fp8Config
from runtime.model.lora import LoraConfig
from runtime.model.recompute import RecomputeConfig
from runtime.model.targets import adapt
from runtime.moe.config import MoEConfig
from runtime.optim.config import OptimConfig
from runtime.parallel.degrees import ParallelConfig

BEFORE = """\
# The engine before its fused steps. Shares of the memory's bandwidth: floor over plain torch of the table "The fused steps"
# (docs/performance/training-step.md; norm 0.179 over 0.351 ms, norm of heads 0.112 over 0.408, rotary 0.112 over 1.100, cross entropy 0.524
# over 8.354, embedding 0.112 over 1.156, gradient norm 0.357 over 0.405) and, for AdamW, 36 over 55 ms of a step.
like: h100
source: docs/performance, the engine before its fused steps
passes: {norm: 0.51, head_norm: 0.27, rotary: 0.10, cross_entropy: 0.063, embedding: 0.097, adamw: 0.65, grad_norm: 0.88}
sum_bytes: 12 # a dense gradient was rounded to bf16, and added by a pass of its own
layer_gap_us: 450 # nothing on the device without communication in layers: dp4 14.2 ms for 32 layers, dp2 10 for 16
"""
# On one GPU torch chose its flash kernels then, where it chose cuDNN's on several (profiles of both).
BEFORE_ALONE = BEFORE + "attention_tflops: 260\n"


def make_setup(config: dict[str, Any], layers: int, gpus: int, parallel: dict[str, Any], **sizes: Any) -> Setup:
    """Put a setup together."""
    family = FAMILIES[config["model_type"]]
    model = Model.from_config(family, config | {"num_hidden_layers": layers, "max_position_embeddings": 4096})
    model = adapt(model, sizes.get("lora", LoraConfig()))
    router = model.compute.router
    assert router is not None
    return Setup(
        model=model, world_size=gpus, parallel=ParallelConfig(**parallel), moe=MoEConfig(router=router),
        optim=OptimConfig(**sizes.pop("optim", {})),
        recompute=RecomputeConfig(granularity=sizes.pop("recompute", "none")),
        dtype="bfloat16", seq_length=4096, **sizes,
    )  # fmt: skip


def predict(row: Row, machines: dict[str, Machine]) -> Estimate:
    """Plan a measured run."""
    setup = make_setup(
        row.config, row.layers, row.gpus, row.parallel, optim=row.optim, micro_batch_size=row.microbatch,
        num_microbatches=row.microbatches, recompute=row.recompute, lora=row.lora, graphs=row.graphs,
        fp8=Fp8Config(format="hybrid", recipe=row.fp8) if row.fp8 else Fp8Config(),
    )  # fmt: skip
    return Estimate(setup, machines[row.engine], row.imbalance)


def machines() -> dict[str, Machine]:
    """The constants of each engine; before today's, updated weights had to come before the next forward pass began."""
    out = {"now": find_machine("h100"), "now, H200": find_machine("h200")}
    with tempfile.TemporaryDirectory() as folder:
        for name, text in (("before", BEFORE), ("before, alone", BEFORE_ALONE)):
            path = Path(folder) / "machine.yaml"
            path.write_text(text, encoding="utf8")
            out[name] = find_machine(str(path))
    older = {name: replace(machine, gather_hidden=0.0) for name, machine in out.items()}
    return older | {TODAY: out["now, H200"]}


def errors(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Predicted, measured and the error of every run."""
    known, out = machines(), []
    for row in rows:
        found = predict(row, known)
        ms, gb = found.seconds * 1e3, found.peak / 1e9
        out.append({
            "gpus": row.gpus, "run": row.name, "engine": row.engine.replace(", alone", ""), "predicted_ms": ms, "measured_ms": row.ms,
            "time_error": ms / row.ms - 1, "predicted_gb": gb, "measured_gb": row.gb,
            "memory_error": gb / row.gb - 1 if row.gb is not None else None,
        })  # fmt: skip
    return out


def plausible() -> list[dict[str, Any]]:
    """What plans of this trainer say of published runs of other programs."""
    out = []
    for run in PUBLISHED:
        dp = run.gpus // (run.parallel.get("tp", 1) * run.parallel.get("pp", 1))
        setup = make_setup(
            run.config, run.layers, run.gpus, run.parallel, recompute=run.recompute, micro_batch_size=run.microbatch,
            num_microbatches=run.sequences // (dp * run.microbatch),
        )  # fmt: skip
        found = Estimate(setup, find_machine("h100"), run.imbalance)
        out.append({
            "run": run.name, "conditions": run.conditions, "recomputed": run.recompute, "predicted_tflops": found.tflops,
            "published_tflops": run.tflops, "error": found.tflops / run.tflops - 1, "peak_gb": found.peak / 1e9,
        })  # fmt: skip
    return out


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    tables = {
        "today": errors(todays_engine()),
        "earlier": errors((*one_gpu(), *several_gpus())),
        "another_host": errors(another_host()),
        "host": errors(all_weights()),
        "adapters": errors(adapters()),
    }
    runs = plausible()
    if parser.parse_args().json:
        print(json.dumps(tables | {"published": runs}, indent=1))
        return
    for table in tables.values():
        _print_rows(table)
    print("| published run | of | recomputed here | TFLOP/s a GPU: predicted | published | difference | peak, GB |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for run in runs:
        print(
            f"| {run['run']} | {run['conditions']} | {run['recomputed']} | {run['predicted_tflops']:.0f} "
            f"| {run['published_tflops']:.0f} | {run['error']:+.0%} | {run['peak_gb']:.0f} |"
        )


def _print_rows(rows: list[dict[str, Any]]) -> None:
    print("| GPUs | run | engine | ms: predicted | measured | error | peak, GB: predicted | measured | error |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for row in rows:
        measured = (
            f"{row['measured_gb']:.1f} | {row['memory_error']:+.1%}" if row["measured_gb"] is not None else "- | -"
        )
        print(
            f"| {row['gpus']} | {row['run']} | {row['engine']} | {row['predicted_ms']:.0f} | {row['measured_ms']:.0f} "
            f"| {row['time_error']:+.1%} | {row['predicted_gb']:.1f} | {measured} |"
        )
    times = [abs(row["time_error"]) for row in rows]
    peaks = [abs(row["memory_error"]) for row in rows if row["memory_error"] is not None]
    print(f"\ntime: mean error {sum(times) / len(times):.1%}, largest {max(times):.1%}; "
          f"peak: mean {sum(peaks) / len(peaks):.1%}, largest {max(peaks):.1%}\n")  # fmt: skip


if __name__ == "__main__":
    main()
