"""What a plan says beside what was measured: `python -m benchmarks.plan`. It needs no GPU and takes seconds.

The measured figures are those of docs/performance.md and of the runs on four GPUs in docs/planning.md. The runs on several
GPUs, and one table on one GPU, are of the engine before its fused steps: they are compared with that engine's constants,
each from a measurement of its kernels alone (`BEFORE`). No constant is fitted to a row of this table.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.models import at_depth
from moeconv.families import FAMILIES
from moeconv.families.base import Model
from runtime.estimate.machine import Machine, find_machine
from runtime.estimate.setup import Setup
from runtime.estimate.step import Estimate
from runtime.fp8.config import Fp8Config, Fp8Recipe
from runtime.model.lora import LoraConfig
from runtime.model.recompute import RecomputeConfig
from runtime.model.targets import adapt
from runtime.moe.config import MoEConfig
from runtime.optim.config import OptimConfig
from runtime.parallel.degrees import ParallelConfig
from runtime.settings.steps import CudaGraphs

MIXTRAL = {
    "model_type": "mixtral", "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "intermediate_size": 14336, "vocab_size": 32000, "num_local_experts": 8, "num_experts_per_tok": 2,
}  # fmt: skip
MIXTRAL_22B = MIXTRAL | {
    "hidden_size": 6144, "num_attention_heads": 48, "intermediate_size": 16384, "vocab_size": 32768,
}  # fmt: skip
# As benchmarks/step_systems.py has it: no norms of heads.
QWEN3 = {
    "model_type": "mixtral", "hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
    "intermediate_size": 768, "vocab_size": 151936, "num_local_experts": 128, "num_experts_per_tok": 8,
}  # fmt: skip
QWEN3_30B = {
    "model_type": "qwen3_moe", "hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
    "intermediate_size": 6144, "moe_intermediate_size": 768, "vocab_size": 151936, "num_experts": 128,
    "num_experts_per_tok": 8,
}  # fmt: skip
QWEN3_235B = QWEN3_30B | {
    "hidden_size": 4096, "num_attention_heads": 64, "intermediate_size": 12288, "moe_intermediate_size": 1536,
}  # fmt: skip
DEEPSEEK_V3 = {
    "model_type": "deepseek_v3", "hidden_size": 7168, "num_attention_heads": 128, "num_key_value_heads": 128,
    "intermediate_size": 18432, "moe_intermediate_size": 2048, "vocab_size": 129280, "n_routed_experts": 256,
    "num_experts_per_tok": 8, "n_shared_experts": 1, "first_k_dense_replace": 3, "q_lora_rank": 1536,
    "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_group": 8,
    "topk_group": 4,
}  # fmt: skip

BEFORE = """\
# The engine before its fused steps. Shares of the memory's bandwidth: floor over plain torch of the table "The fused steps"
# (docs/performance.md; norm 0.179 over 0.351 ms, norm of heads 0.112 over 0.408, rotary 0.112 over 1.100, cross entropy 0.524
# over 8.354, embedding 0.112 over 1.156, gradient norm 0.357 over 0.405) and, for AdamW, 36 over 55 ms of a step.
like: h100
source: docs/performance.md, the engine before its fused steps
passes: {norm: 0.51, head_norm: 0.27, rotary: 0.10, cross_entropy: 0.063, embedding: 0.097, adamw: 0.65, grad_norm: 0.88}
sum_bytes: 12 # a dense gradient was rounded to bf16, and added by a pass of its own
layer_gap_us: 450 # nothing on the device without communication in layers: dp4 14.2 ms for 32 layers, dp2 10 for 16
"""
# On one GPU torch chose its flash kernels then, where it chose cuDNN's on several (profiles of both).
BEFORE_ALONE = BEFORE + "attention_tflops: 260\n"
SHARD = {"use_distributed_optimizer": True}
BF16_MOMENTS = {"moments_dtype": "bfloat16"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A measured run."""

    name: str
    config: dict[str, Any]
    layers: int
    gpus: int = 1
    parallel: dict[str, Any] = field(default_factory=dict)
    microbatch: int = 1
    microbatches: int = 8
    optim: dict[str, Any] = field(default_factory=dict)
    fp8: Fp8Recipe | None = None
    lora: LoraConfig = field(default_factory=LoraConfig)
    graphs: CudaGraphs = "auto"
    imbalance: float | None = None
    """Rows of the fullest rank, of the mean, where that was measured."""
    recompute: str = "none"
    engine: str = "now"
    """A key of `machines`."""
    ms: float
    gb: float | None
    """Peak, 10^9 bytes."""


def _gib(value: float) -> float:
    return value * 2**30 / 1e9


def one_gpu() -> Iterator[Row]:
    """docs/performance.md, "A training step"; and the same work before the fused steps."""
    mixtral: dict[str, Any] = {"config": MIXTRAL, "layers": 2, "microbatch": 2}
    qwen: dict[str, Any] = {"config": QWEN3, "layers": 4, "microbatch": 2}
    yield Row(name="Mixtral, 8 micro-batches", **mixtral, ms=688.5, gb=_gib(56.2))
    yield Row(name="Mixtral, 1", **mixtral, microbatches=1, ms=111.8, gb=_gib(56.2))
    yield Row(name="Mixtral, 8, moments in bf16", **mixtral, optim=BF16_MOMENTS, ms=678.4, gb=_gib(44.6))
    yield Row(
        name="Mixtral, 1, moments in bf16", **mixtral, microbatches=1, optim=BF16_MOMENTS, ms=107.3, gb=_gib(44.6)
    )
    yield Row(name="Qwen3, 8", **qwen, ms=562, gb=_gib(56.8))
    yield Row(name="Qwen3, 1", **qwen, microbatches=1, ms=98.9, gb=_gib(56.8))
    launched: dict[str, Any] = {"graphs": "none"}  # FP8 had none then
    yield Row(name="Mixtral, 8, FP8 tensorwise", **mixtral, **launched, fp8="tensorwise", ms=519.3, gb=_gib(62.9))
    launched |= {"engine": "today, H200"}
    yield Row(name="Mixtral, 8, FP8 tensorwise", **mixtral, **launched, fp8="tensorwise", ms=494.0, gb=_gib(62.9))
    yield Row(name="Mixtral, 8, FP8 blockwise", **mixtral, **launched, fp8="blockwise", ms=538.7, gb=_gib(63.0))
    yield Row(name="Qwen3, 8, FP8 tensorwise", **qwen, **launched, fp8="tensorwise", ms=477.8, gb=_gib(61.4))
    yield Row(name="Qwen3, 8, FP8 blockwise", **qwen, **launched, fp8="blockwise", ms=491.8, gb=_gib(61.4))
    before: dict[str, Any] = {"engine": "before, alone"}
    yield Row(name="Mixtral, 8", **mixtral, **before, ms=822, gb=_gib(57.6))
    yield Row(name="Mixtral, 1", **mixtral, microbatches=1, **before, ms=147.6, gb=_gib(57.6))
    yield Row(name="Qwen3, 8", **qwen, **before, ms=907, gb=None)


def families() -> Iterator[Row]:
    """docs/performance.md, "Other families": some layers of each, four micro-batches of two sequences, one H200."""
    measured = (
        ("gpt-oss-20b", 4, 452, 86.4),
        ("deepseek-v2-lite", 5, 288, 56.9),
        ("glm-4.5-air", 2, 456, 73.9),
        ("glm-4.7-flash", 4, 297, 53.6),
    )
    for name, layers, ms, gb in measured:
        yield Row(
            name=f"{name}, {layers} layers", config=at_depth(name, layers), layers=layers, microbatch=2, microbatches=4,
            engine="today, H200", ms=ms, gb=gb,
        )  # fmt: skip


def adapters() -> Iterator[Row]:
    """docs/finetuning.md, "Measured": whole models, layers recomputed, four micro-batches of one sequence."""
    attention, experts = ("*.self_attn.*",), ("*.self_attn.*", "*.experts.*")
    qwen: dict[str, Any] = {"config": QWEN3_30B, "layers": 48, "microbatches": 4, "recompute": "full"}

    def lora(targets: tuple[str, ...], **base: Any) -> dict[str, Any]:
        return {
            "lora": LoraConfig(rank=16, targets=targets, **base),
            "optim": BF16_MOMENTS if targets == experts else {},
        }

    double = {"quantize_base": "nf4", "double_quant": True}
    yield Row(name="attention", **qwen, **lora(attention), ms=1047.9, gb=63.6)
    yield Row(name="attention, no graphs", **qwen, **lora(attention), graphs="none", ms=2406, gb=63.6)
    yield Row(name="the same, another host", **qwen, **lora(attention), graphs="none", ms=3126.7, gb=63.6)
    yield Row(name="attention; nf4, scales quantised", **qwen, **lora(attention, **double), ms=1336.2, gb=20.0)
    yield Row(name="attention; fp8", **qwen, **lora(attention, quantize_base="fp8"), ms=1383.7, gb=34.5)
    both = lora(experts) | {"engine": "today, H200"}
    yield Row(name="attention and experts, one H200", **qwen, **both, ms=1117, gb=75.2)


def all_weights() -> Iterator[Row]:
    """docs/finetuning.md, "All weights on few GPUs": Mixtral 8x7B with optimizer state on the host."""
    optim = BF16_MOMENTS | {
        "master_weights": "remainder", "main_grads_dtype": "bf16", "optimizer_cpu_offload": True,
        "optimizer_offload_fraction": 0.78,
    }  # fmt: skip
    mixtral: dict[str, Any] = {"config": MIXTRAL, "layers": 32, "gpus": 2, "recompute": "full", "engine": "now, H200"}
    ep2, pp2 = SHARD | {"ep": 2}, {"pp": 2}
    yield Row(name="ep2, 78 % on the host", **mixtral, parallel=ep2, optim=optim, microbatches=8, ms=9825, gb=129.0)
    yield Row(name="pp2, 78 % on the host", **mixtral, parallel=pp2, optim=optim, microbatches=16, ms=10021, gb=123.6)
    four = mixtral | {"gpus": 4, "optim": BF16_MOMENTS | {"optimizer_cpu_offload": True}}
    tp2_ep4, pp4 = SHARD | {"tp": 2, "sp": True, "ep": 4, "etp": 1}, {"pp": 4}
    yield Row(name="dp2 tp2 sp ep4 etp1", **four, parallel=tp2_ep4, microbatch=2, ms=11451, gb=75.7)
    yield Row(name="pp4", **four, parallel=pp4, microbatches=32, ms=11482, gb=74.4)
    short = four | {"layers": 4}
    yield Row(name="dp2 tp2 sp ep4 etp1, 4 layers", **short, parallel=tp2_ep4, microbatch=2, ms=1444, gb=12.1)
    short |= {"optim": BF16_MOMENTS, "recompute": "none"}
    yield Row(name="pp4, 4 layers, nothing on the host", **short, parallel=pp4, microbatches=32, ms=859, gb=26.5)


def another_host() -> Iterator[Row]:
    """Four H200 of another machine: layers of both models, micro-batches of one sequence, 131072 tokens a step."""
    measured = (
        ("Mixtral", 4, "ep", 784.5, _gib(30.87)),
        ("Mixtral", 4, "tp2 sp ep2 etp1", 998.1, _gib(35.59)),
        ("Mixtral", 4, "pp2 ep2", 757.0, 32.1),
        ("Mixtral", 4, "dp", 737.6, 57.8),
        ("Mixtral", 4, "fully sharded", 1671, 35.9),
        ("Qwen3", 8, "ep", 868.4, 32.9),
        ("Qwen3", 8, "tp2 sp ep2 etp1", 2045, 36.0),
        ("Qwen3", 8, "pp2 ep2", 783.5, 30.7),
        ("Qwen3", 6, "dp", 443.2, 42.4),
    )
    yield from _layers(measured, gpus=4, engine="now, H200")


def todays_engine() -> Iterator[Row]:
    """Two H200 of one machine: 65536 tokens a step, as many for each expert unless it says otherwise; CUDA graphs."""
    yield from _layers((("Mixtral", 4, "fully sharded", 1500, 64.1),), gpus=2, engine="today, H200")
    two: dict[str, Any] = {"gpus": 2, "engine": "today, H200", "imbalance": 1.0}
    mixtral: dict[str, Any] = {"config": MIXTRAL, "layers": 4, "parallel": SHARD | {"ep": 2}, **two}
    qwen = mixtral | {"config": QWEN3_30B, "layers": 8}
    yield Row(name="Mixtral, 4 layers, ep2", **mixtral, ms=645.9, gb=_gib(55.64))
    yield Row(name="the same, no graphs", **mixtral, graphs="none", ms=679.3, gb=_gib(55.19))
    pairs = mixtral | {"parallel": SHARD | {"ep": 2, "overlap_exchange": True}}
    yield Row(name="the same, exchanges overlapped", **pairs, ms=654.8, gb=_gib(58.84))
    tensor = mixtral | {"parallel": SHARD | LAYOUTS["tp2 sp ep2 etp1"]}
    yield Row(name="Mixtral, 4 layers, tp2 sp ep2 etp1, 32768 tokens", **tensor, ms=368.3, gb=_gib(52.9))
    data = mixtral | {"parallel": SHARD}
    yield Row(name="Mixtral, 4 layers, dp2", **data, ms=692.9, gb=76.0)
    yield Row(name="the same, no graphs", **data, graphs="none", ms=696.6, gb=76.0)
    yield Row(name="Qwen3, 8 layers, ep2", **qwen, ms=440.7, gb=56.9)
    yield Row(name="the same, no graphs", **qwen, graphs="none", ms=624.4, gb=56.6)
    yield Row(name="the same, as routed: 1.035", **(qwen | {"imbalance": 1.035}), ms=475.8, gb=57.6)


def _layers(measured: Iterable[tuple[str, int, str, float, float]], *, gpus: int, engine: str) -> Iterator[Row]:
    """Rows of a model's layers in a layout, 8 micro-batches a GPU, no graphs: model, layers, layout, ms and GB of each."""
    for model, layers, name, ms, gb in measured:
        parallel = {"fully_shard": True} if name == "fully sharded" else SHARD | LAYOUTS[name]
        parallel |= {"ep": gpus} if name == "ep" else {}
        yield Row(
            name=f"{model}, {layers} layers, {name}{gpus if name in ('ep', 'dp') else ''}", layers=layers, gpus=gpus,
            config=MIXTRAL if model == "Mixtral" else QWEN3_30B, parallel=parallel, engine=engine,
            microbatches=8 * parallel.get("tp", 1) * parallel.get("pp", 1), graphs="none", ms=ms, gb=gb,
        )  # fmt: skip


LAYOUTS: dict[str, dict[str, Any]] = {
    "ep": {}, "dp": {}, "tp2 sp": {"tp": 2, "sp": True}, "pp2": {"pp": 2}, "pp2 ep2": {"pp": 2, "ep": 2},
    "tp2 sp ep2 etp1": {"tp": 2, "sp": True, "ep": 2, "etp": 1},
}  # fmt: skip
# GPUs, layout, layers, ms, weights, gradients, masters, moments, activations and buffers (10^9 bytes).
SEVERAL = (
    (2, "ep", 2, 447, (3.5, 7.0, 6.3, 12.7, 3.2)),
    (2, "dp", 2, 480, (6.3, 12.7, 6.3, 12.7, 2.9)),
    (2, "tp2 sp", 2, 508, (3.2, 6.3, 6.3, 12.7, 1.8)),
    (2, "pp2", 2, 538, (3.2, 6.3, 6.3, 12.7, 2.7)),
    (2, "ep", 4, 810, (6.5, 13.0, 12.1, 24.3, 4.8)),
    (2, "dp", 3, 680, (9.2, 18.5, 9.2, 18.5, 3.7)),
    (2, "tp2 sp", 5, 1122, (7.5, 15.0, 15.0, 30.1, 3.0)),
    (2, "pp2", 4, 934, (6.1, 12.1, 12.1, 24.3, 4.0)),
    (2, "ep", 6, 1040.2, (9.48, 18.97, 17.94, 35.88, 4.96)),
    (2, "dp", 6, 1104.8, (17.94, 35.88, 17.94, 35.88, 4.53)),
    (2, "tp2 sp", 6, 1147.6, (8.97, 17.94, 17.94, 35.88, 2.77)),
    (2, "pp2", 6, 1141.7, (8.97, 17.94, 17.94, 35.88, 5.10)),
    (2, "ep", 8, 1387.1, (12.47, 24.94, 23.74, 47.49, 6.52)),
    (2, "tp2 sp", 9, 1715.8, (13.32, 26.65, 26.65, 53.30, 4.00)),
    (2, "pp2", 8, 1488.1, (11.87, 23.74, 23.74, 47.49, 6.46)),
    (4, "ep", 4, 738.6, (32.79,)),
    (4, "tp2 sp ep2 etp1", 4, 897.7, (38.31,)),
    (4, "ep", 4, 776.9, (3.68, 7.36, 6.07, 12.13, 4.80)),
    (4, "tp2 sp ep2 etp1", 4, 1052.5, (6.07, 12.13, 6.07, 12.13, 2.82)),
    (4, "pp2 ep2", 4, 875.5, (3.25, 6.50, 6.07, 12.13, 4.70)),
    (4, "dp", 4, 867.8, (12.13, 24.27, 6.07, 12.13, 4.44)),
    (4, "ep", 8, 1470.1, (6.83, 13.67, 11.87, 23.74, 7.83)),
    (4, "tp2 sp ep2 etp1", 7, 1903.0, (10.42, 20.84, 10.42, 20.84, 4.17)),
    (4, "pp2 ep2", 8, 1620.1, (6.24, 12.47, 11.87, 23.74, 7.84)),
)


def several_gpus() -> Iterator[Row]:
    """`benchmarks.multi_gpu` on two and four GPUs: Mixtral's layers, 8 sequences a GPU, micro-batches of one."""
    for gpus, name, layers, ms, memory in SEVERAL:
        parallel = SHARD | LAYOUTS[name] | ({"ep": gpus} if name == "ep" else {})
        dp = gpus // (parallel.get("tp", 1) * parallel.get("pp", 1))
        yield Row(
            name=f"{name}{gpus if name in ('ep', 'dp') else ''}, {layers} layers", config=MIXTRAL, layers=layers, gpus=gpus,
            parallel=parallel, microbatches=8 * gpus // dp, graphs="none", ms=ms, gb=sum(memory),
            engine="now, H200" if len(memory) == 1 or (gpus == 2 and layers > 5) else "before",
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """A figure that somebody has published, with another program."""

    name: str
    config: dict[str, Any]
    layers: int
    gpus: int
    parallel: dict[str, Any]
    microbatch: int
    sequences: int
    tflops: float
    conditions: str
    recompute: str = "none"
    imbalance: float | None = None
    """As of `Row`."""


MORE = SHARD | {"sp": True, "tp": 2}
PUBLISHED = (
    Published(
        name="Mixtral 8x7B, 64 H100", config=MIXTRAL, layers=32, gpus=64, microbatch=1, sequences=256, tflops=468,
        parallel=SHARD | {"pp": 4, "ep": 8, "vpp": 8}, conditions="Megatron-Core 0.9, bf16",
    ),
    Published(
        name="Mixtral 8x22B, 128 H100", config=MIXTRAL_22B, layers=56, gpus=128, microbatch=1, sequences=256, tflops=445,
        parallel=MORE | {"pp": 8, "ep": 8, "etp": 1, "vpp": 7}, conditions="Megatron-Core, bf16, dropless",
    ),
    Published(
        name="Qwen3-30B-A3B, 8 H100", config=QWEN3_30B, layers=48, gpus=8, microbatch=4, sequences=512, tflops=277,
        parallel=SHARD | {"ep": 8}, conditions="NeMo Automodel, bf16, FSDP, DeepEP; balanced gate", recompute="full",
        imbalance=1.0,
    ),
    Published(
        name="Qwen3-235B-A22B, 256 H100", config=QWEN3_235B, layers=94, gpus=256, microbatch=1, sequences=4096, tflops=245,
        parallel=MORE | {"pp": 8, "ep": 32, "etp": 1, "pp_layers": (11, 12, 12, 12, 12, 12, 12, 11)},
        conditions="Megatron-Bridge, bf16", recompute="full",
    ),
    Published(
        name="DeepSeek-V3, 1024 H100", config=DEEPSEEK_V3, layers=61, gpus=1024, microbatch=1, sequences=8192, tflops=216,
        parallel=MORE | {"pp": 8, "ep": 64, "etp": 1, "pp_layers": (7, 8, 8, 8, 8, 8, 8, 6)},
        conditions="Megatron-Bridge, bf16", recompute="full",
    ),
)  # fmt: skip


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
    return older | {"today, H200": out["now, H200"]}


def errors(rows: Iterable[Row] | None = None) -> list[dict[str, Any]]:
    """Predicted, measured and the error of every run; None: those without adapters."""
    known, out = machines(), []
    for row in (*one_gpu(), *several_gpus()) if rows is None else rows:
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
    rows, other, runs = errors(), errors((*another_host(), *todays_engine())), plausible()
    kinds, whole, tuned = errors(families()), errors(all_weights()), errors(adapters())
    if parser.parse_args().json:
        found = {
            "measured": rows,
            "families": kinds,
            "another_host": other,
            "host": whole,
            "adapters": tuned,
            "published": runs,
        }
        print(json.dumps(found, indent=1))
        return
    for table in (rows, kinds, other, whole, tuned):
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
