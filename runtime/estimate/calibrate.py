"""Measure a machine's constants, under torchrun, and write them as a calibration file.

Rates are of a device that has done the same work for a while, as it does in training; of ranks that measure together,
the slowest counts. What isn't measured here (passes, pauses, waits) is taken from the machine that the file is `like`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moeconv.errors import WriteError
from moeconv.families.compute import Router
from runtime.estimate.calibrate_host import measure_launches, measure_link
from runtime.estimate.calibrate_links import measure_links
from runtime.estimate.clock import Clock
from runtime.estimate.compute import attention_operations
from runtime.estimate.machine import find_machine, known_machines
from runtime.job.processes import Process, connect, end_groups, start
from runtime.moe.config import MoEConfig
from runtime.moe.grouped_gemm import make_gemm, resolve_backend
from runtime.moe.permutation import RowPlan, plan_rows
from runtime.ops.attention import attend

TIMEOUT = 300.0
"""Seconds that a collective may take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How much is measured with."""

    square: int
    """Side of the dense product's matrices."""
    rows: int
    hidden: int
    width: int
    """Of the grouped products' experts."""
    experts: int
    positions: int
    heads: int
    message: int
    """Bytes of the largest message; the smallest is a 16th."""
    warm: float
    """Seconds of the same computing before it is timed: a card at its power limit is as fast as it is cool."""
    warm_links: float
    """Seconds of a collective before it is timed."""
    dtype: torch.dtype


GPU = Sizes(
    square=8192, rows=16384, hidden=4096, width=14336, experts=8, positions=4096, heads=32, message=2**28, warm=3.0,
    warm_links=0.3, dtype=torch.bfloat16,
)  # fmt: skip
CPU = Sizes(
    square=256, rows=256, hidden=64, width=96, experts=4, positions=128, heads=4, message=2**20, warm=0.01,
    warm_links=0.01, dtype=torch.float32,
)  # fmt: skip


def calibrate(path: Path) -> str:
    """Measure this machine and write the file; every process of a launch calls it.

    Args:
        path: the file.

    Returns:
        A line that says what was measured; empty on all ranks but the first.

    Raises:
        WriteError: the file can't be written.
    """
    process = Process.from_environment()
    device = start(process, connect(process, "calibrate"), TIMEOUT)
    try:
        values = measure(device, GPU if device.type == "cuda" else CPU, _per_node(process))
        if process.rank:
            return ""
        write(path, values)
    finally:
        end_groups()
    links = "its links, too" if process.world_size > 1 else "no links: start it on several GPUs with torchrun"
    return f"{path}: {values['gpu']}, {process.world_size} ranks; {links}. Plan with --gpu {path}"


def measure(device: torch.device, sizes: Sizes, per_node: int) -> dict[str, Any]:
    """Measure everything; collective over all ranks of the default process group.

    Args:
        device: this rank's.
        sizes: how much with.
        per_node: ranks of a node.

    Returns:
        Keys and values of a calibration file, the same on every rank.
    """
    clock = Clock(device, sizes.warm)
    dense, (grouped, sums), hbm = _dense(clock, sizes), _grouped(clock, sizes), _copy(clock, sizes)
    forward, both = _attention(clock, sizes, None)
    _, windowed = _attention(clock, sizes, sizes.positions // 4)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    words = name.replace("-", " ").lower().split()
    like = next((known for known in known_machines() if known in words), "h100")
    values: dict[str, Any] = {
        "like": like,
        "gpu": name,
        "measured": True,
        "source": f"moeconv plan --calibrate, torch {torch.__version__}, {dist.get_world_size()} ranks",
        "hbm_tb_s": hbm / 1e12,
        "dense_tflops": dense / 1e12,
        "grouped_tflops": grouped / 1e12,
        "grouped_sum_tb_s": sums / 1e12,
        "attention_tflops": _attention_operations(sizes, None) / both / 1e12,
        "attention_window_tflops": _attention_operations(sizes, sizes.positions // 4) / windowed / 1e12,
        "attention_forward_share": min(0.9, forward / both),
        "gpus_per_node": per_node,
    }
    host = Clock(device, sizes.warm_links).seconds
    values["launch_us"] = 1e6 * measure_launches(host, device, str(sizes.dtype).removeprefix("torch."))
    if device.type == "cuda":
        values["memory_gib"] = torch.cuda.get_device_properties(device).total_memory / 2**30
        values |= measure_link(host, device, sizes.message, per_node)
    links = measure_links(Clock(device, sizes.warm_links), sizes.message, per_node)
    return values | ({"links": links} if links else {})


def write(path: Path, values: Mapping[str, Any]) -> None:
    """Write a calibration file.

    Raises:
        WriteError: it can't be written.
    """
    import yaml

    head = "# A machine's constants for `moeconv plan --gpu FILE`; docs/planning.md explains them.\n"
    try:
        path.write_text(head + yaml.safe_dump(_rounded(values), sort_keys=False), encoding="utf8")
    except OSError as error:
        raise WriteError(f"{path}: can't be written: {error.strerror}") from None


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _rounded(part) for key, part in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _per_node(process: Process) -> int:
    counts = [0] * process.world_size
    dist.all_gather_object(counts, process.local_rank)
    return 1 + max(counts)


def _random(clock: Clock, sizes: Sizes, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=sizes.dtype, device=clock.device)


def _dense(clock: Clock, sizes: Sizes) -> float:
    """Operations a second of a dense product."""
    left, right = (_random(clock, sizes, sizes.square, sizes.square) for _ in range(2))
    return 2 * sizes.square**3 / clock.seconds(lambda: left @ right)


def _copy(clock: Clock, sizes: Sizes) -> float:
    """Bytes a second, read and written, of a copy."""
    source = torch.empty(sizes.message, dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)
    return 2 * sizes.message / clock.seconds(lambda: target.copy_(source), 20)


def _grouped(clock: Clock, sizes: Sizes) -> tuple[float, float]:
    """Operations a second of the experts' three products, forward and for both gradients, and bytes a second of their fp32 sums.

    Each product is longer by what tiles' beginnings and ends take, and its weights are few beside its rows; a product of one
    tile of rows for each expert is as long as its sum takes.
    """
    router = Router(experts=sizes.experts, top_k=1, score="softmax", normalise=False)
    gemm = make_gemm(resolve_backend(MoEConfig(router=router), clock.device, sizes.dtype))
    weight = _random(clock, sizes, sizes.experts, sizes.width, sizes.hidden)
    total = torch.zeros(weight.shape, device=clock.device)

    def of_rows(count: int) -> tuple[Tensor, Tensor, RowPlan]:
        experts_TK = (torch.arange(count, device=clock.device) % sizes.experts).unsqueeze(1)
        plan = plan_rows(experts_TK, sizes.experts, count, alignment=gemm.row_alignment)
        rows, grads = (_random(clock, sizes, plan.num_rows, width) for width in (sizes.hidden, sizes.width))
        return rows, grads, plan

    rows, grads, plan = of_rows(sizes.rows)
    few, few_grads, few_plan = of_rows(sizes.experts)

    def work() -> None:
        gemm.rows_times_transposed(rows, weight, plan)
        gemm.rows_times(grads, weight, plan)
        gemm.transposed_times_rows(grads, rows, plan)

    depth = find_machine("h100").grouped_tile_depth
    longer = sum(1 + depth / along for along in (sizes.hidden, sizes.width, sizes.rows / sizes.experts))
    operations = 2 * sizes.rows * sizes.width * sizes.hidden * longer
    seconds = clock.seconds(lambda: gemm.add_transposed_times_rows(few_grads, few, few_plan, total, fresh=False))
    return operations / clock.seconds(work), 8 * total.numel() / seconds


def _attention(clock: Clock, sizes: Sizes, window: int | None) -> tuple[float, float]:
    """Seconds of causal attention's forward pass, and of both passes."""
    q, k, v = (_random(clock, sizes, sizes.positions, 1, sizes.heads, 128).requires_grad_() for _ in range(3))
    grad = _random(clock, sizes, sizes.positions, 1, sizes.heads, 128)
    with torch.no_grad():
        forward = clock.seconds(lambda: attend(q, k, v, window))
    both = clock.seconds(lambda: torch.autograd.grad(attend(q, k, v, window), (q, k, v), grad))
    return forward, max(both, forward)


def _attention_operations(sizes: Sizes, window: int | None) -> float:
    width = sizes.heads * 128
    return sizes.positions * attention_operations(sizes.positions, window, width, width)
