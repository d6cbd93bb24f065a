"""The benchmark of several GPUs, on two CPU ranks: what its tables say must be true."""

from __future__ import annotations

import argparse
import json
from math import isfinite, log
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.multi_gpu.__main__ import Launcher, main
from benchmarks.multi_gpu.job import Job, Task, draw_weights
from benchmarks.multi_gpu.plan import make_plan
from benchmarks.multi_gpu.saving import digest
from benchmarks.multi_gpu.sizes import FULL, QUICK, bytes_needed, layers_that_fit, layouts, num_parameters, state_bytes
from benchmarks.multi_gpu.traffic import read_kernels, summarize
from runtime.parallel.degrees import ParallelConfig


def test_quick_run_of_two_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    status = main(["--ranks", "2", "--quick", "--out", str(tmp_path)])
    report = (tmp_path / "report.md").read_text()
    assert status == 0, report + (tmp_path / "ranks.log").read_text()[-3000:]
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    found: dict[str, list[tuple[Task, Any]]] = {}
    for line in lines:
        found.setdefault(line["task"]["kind"], []).append((Task(**line["task"]), line["result"]))
    planned = [
        task.number
        for _, tasks in make_plan(2, ["parity", "training", "scaling", "checkpoint"], quick=True)
        for task in tasks
    ]
    assert [line["task"]["number"] for line in lines] == planned
    for task, row in found["parity"]:
        assert row["within"]
        assert all(isfinite(error) for error in row["errors"].values())
        if task.options["dtype"] == "float32":
            assert max(row["errors"].values()) < 1e-5
        else:
            assert row["rounding"]["grad_norm"] > 1e-5, "bf16 was really used"
    for task, row in found["training"] + found["scaling"]:
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["ms"] * 1e3)
        assert row["tokens_per_second"] > 0
        assert row["loss"] == pytest.approx(log(QUICK.vocab), rel=0.05)
        held = state_bytes(QUICK, row["layers"], ParallelConfig(**task.parallel), task.world)
        assert sum(row["memory_gb"].values()) * 1e9 == pytest.approx(held, rel=0.1)
    assert all(row["ms"] > 0 and row["gb_s"] > 0 for row in found["traffic"][0][1])
    ((_, saved),) = found["save"]
    assert min(saved[name] for name in ("gb", "disk_gb_s", "copy_s", "sync_s", "async_s", "step_ms")) > 0
    assert {task.world for task, _ in found["resume"]} == {1, 2}
    for _, row in found["resume"]:
        assert row["equal"]
        assert row["loss_error"] < 1e-5
    assert "NO" not in report


def test_failed_measurements_are_named_and_the_next_is_made(tmp_path: Path) -> None:
    """An error that all ranks meet costs nothing; after one that ends a rank, new ranks go on."""
    options = {"layers": "common", "fits": 1, "sequences": 2, "mode": "weak"}
    tasks = [
        Task(number=0, kind="scaling", world=1, label="bad degree", parallel={"tp": 3}, options=options),
        Task(number=1, kind="scaling", world=3, label="ends the rank", options=options),
        Task(number=2, kind="scaling", world=1, label="good", options=options),
    ]
    machine = {"command": "test", "ranks": 1, "device": "CPU", "torch": "2"}
    launcher = Launcher(argparse.Namespace(quick=True, balanced=False, fill=0.85), tmp_path / "out", tmp_path, machine)
    launcher.run(1, tasks)
    bad, ended, good = launcher.records()
    assert bad.failed is not None
    assert "doesn't divide the world size" in bad.failed
    assert ended.failed is not None
    assert "status 1" in ended.failed
    assert good.failed is None
    assert good.result["tokens_per_second"] > 0
    text, well = launcher.report()
    assert not well
    assert "bad degree" in text


def test_overlap_of_a_trace(tmp_path: Path) -> None:
    def kernel(name: str, begin: float, length: float, category: str = "kernel") -> dict[str, Any]:
        return {"name": name, "cat": category, "ts": begin, "dur": length}

    events = [
        kernel("gemm", 0, 1000),
        kernel("swiglu", 900, 1100),  # overlaps with the product: 0 to 2000 is computed
        kernel("ncclDevKernel_SendRecv(x)", 1500, 1000),  # half of it hidden
        kernel("ncclDevKernel_ReduceScatter_Sum_f32_RING_LL(x)", 2400, 800),  # exposed
        kernel("ncclDevKernel_SendRecv(x)", 100, 500),  # hidden
        kernel("nccl:all_to_all", 0, 9000, "gpu_user_annotation"),
        kernel("Memcpy HtoD", 2000, 9000, "gpu_memcpy"),
        {"name": "process_name", "ph": "M"},
    ]
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": events}))
    found = summarize(read_kernels(path))
    assert found["kinds"]["SendRecv"] == {"calls": 2, "ms": 1.5, "hidden_ms": 1.0}
    assert found["kinds"]["ReduceScatter"] == {"calls": 1, "ms": 0.8, "hidden_ms": 0.0}
    assert found["communication_ms"] == pytest.approx(0.5 + 1.7)
    assert found["exposed_ms"] == pytest.approx(1.2)
    assert found["computing_ms"] == pytest.approx(2.0)
    assert found["idle_ms"] == pytest.approx(0.0)  # 0 to 3200 without a gap
    assert found["largest"] == [("swiglu", 1, 1.1), ("gemm", 1, 1.0)]


def test_digest_sees_every_bit_and_place(tmp_path: Path) -> None:
    job = Job(device=torch.device("cpu"), sizes=QUICK, scratch=tmp_path, fill=0.85, control=None)
    engine, _ = job.engine(Task(number=0, kind="save", world=1, label="one"), 2)
    draw_weights(engine)
    before = digest(engine, job)
    state = {item.name: item.tensor for item in engine.state(with_optimizer=True)}
    moment = state["optimizer.exp_avg_sq.model.layers.1.block_sparse_moe.experts.3.w2.weight"]
    moment.view(torch.int32)[7, 5] ^= 1
    assert digest(engine, job) != before
    moment.view(torch.int32)[7, 5] ^= 1
    assert digest(engine, job) == before
    embedding = state["model.embed_tokens.weight"]
    embedding[[3, 4]] = embedding[[4, 3]]
    assert digest(engine, job) != before


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_planned_models_fill_but_fit(world: int) -> None:
    memory = 120e9
    for fields in layouts(world).values():
        parallel = ParallelConfig(**fields)
        layers = layers_that_fit(FULL, parallel, world, memory)
        assert bytes_needed(FULL, layers, parallel, world) <= memory
        assert layers == 32 or bytes_needed(FULL, layers + parallel.pp, parallel, world) > memory
    assert num_parameters(FULL, 32) == 46_702_792_704, "Mixtral 8x7B"


def test_wrong_numbers_of_ranks_are_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for arguments, message in (
        (["--ranks", "3"], "expected 1, 2, 4 or 8"),
        (["--ranks", "2"], "--quick runs on a CPU"),
    ):
        with pytest.raises(SystemExit):
            main(arguments)
        assert message in capsys.readouterr().err
