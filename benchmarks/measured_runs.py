"""Runs that were measured, for `benchmarks.plan`: docs/performance, docs/finetuning.md and docs/planning.md have them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from benchmarks.models import at_depth
from runtime.fp8.config import Fp8Recipe
from runtime.model.lora import LoraConfig
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

TODAY = "today, H200"
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


def todays_engine() -> Iterator[Row]:
    """One and two H200: docs/performance, and runs of the trainer itself."""
    mixtral: dict[str, Any] = {"config": MIXTRAL, "layers": 2, "microbatch": 2, "engine": TODAY}
    qwen = mixtral | {"config": QWEN3, "layers": 4}
    yield Row(name="Mixtral, `runtime.train`", **mixtral, ms=666, gb=60.4)
    yield Row(name="Qwen3 with head norms, `runtime.train`", **(qwen | {"config": QWEN3_30B}), ms=513, gb=61.0)
    yield Row(name="Mixtral, 1 micro-batch", **mixtral, microbatches=1, ms=112.5, gb=None)
    launched: dict[str, Any] = {"graphs": "none"}  # FP8 had none then
    yield Row(name="Mixtral, FP8 tensorwise", **mixtral, **launched, fp8="tensorwise", ms=494.0, gb=_gib(62.9))
    yield Row(name="Mixtral, FP8 blockwise", **mixtral, **launched, fp8="blockwise", ms=538.7, gb=_gib(63.0))
    yield Row(name="Qwen3, FP8 tensorwise", **qwen, **launched, fp8="tensorwise", ms=477.8, gb=_gib(61.4))
    yield Row(name="Qwen3, FP8 blockwise", **qwen, **launched, fp8="blockwise", ms=491.8, gb=_gib(61.4))
    yield from _families()
    yield from _two_gpus()
    yield from _every_layout()


def _families() -> Iterator[Row]:
    """docs/performance/training-step.md, "Other families": some layers of each, four micro-batches of two sequences."""
    measured = (
        ("gpt-oss-20b", 4, 448, 86.4),
        ("deepseek-v2-lite", 5, 290, 56.9),
        ("glm-4.5-air", 2, 454, 73.9),
        ("glm-4.7-flash", 4, 299, 53.6),
    )
    for name, layers, ms, gb in measured:
        yield Row(
            name=f"{name}, {layers} layers", config=at_depth(name, layers), layers=layers, microbatch=2, microbatches=4,
            engine=TODAY, ms=ms, gb=gb,
        )  # fmt: skip


def _two_gpus() -> Iterator[Row]:
    """65536 tokens a step but for one row, as many for each expert unless it says otherwise; CUDA graphs."""
    two: dict[str, Any] = {"gpus": 2, "engine": TODAY, "imbalance": 1.0}
    mixtral: dict[str, Any] = {"config": MIXTRAL, "layers": 4, "parallel": SHARD | {"ep": 2}, **two}
    qwen = mixtral | {"config": QWEN3_30B, "layers": 8}
    yield Row(name="Mixtral, 4 layers, ep2", **mixtral, ms=668.7, gb=_gib(55.76))
    yield Row(name="the same, no graphs", **mixtral, graphs="none", ms=679.3, gb=_gib(55.19))
    pairs = mixtral | {"parallel": SHARD | {"ep": 2, "overlap_exchange": True}}
    yield Row(name="the same, exchanges overlapped", **pairs, ms=654.8, gb=_gib(58.84))
    tensor = mixtral | {"parallel": SHARD | LAYOUTS["tp2 sp ep2 etp1"]}
    yield Row(name="Mixtral, 4 layers, tp2 sp ep2 etp1, 32768 tokens", **tensor, ms=380.7, gb=_gib(52.96))
    data = mixtral | {"parallel": SHARD}
    yield Row(name="Mixtral, 4 layers, dp2", **data, ms=692.9, gb=76.0)
    yield Row(name="the same, no graphs", **data, graphs="none", ms=696.6, gb=76.0)
    sharded = mixtral | {"parallel": {"fully_shard": True}}
    yield Row(name="Mixtral, 4 layers, fully sharded", **sharded, graphs="none", ms=1450.6, gb=64.1)
    yield Row(name="Qwen3, 8 layers, ep2", **qwen, ms=457.8, gb=57.0)
    yield Row(name="the same, no graphs", **qwen, graphs="none", ms=612.8, gb=56.7)
    yield Row(name="the same, as routed: 1.035", **(qwen | {"imbalance": 1.035}), ms=475.8, gb=57.6)
    yield Row(name="the same, FP8 tensorwise", **qwen, fp8="tensorwise", ms=420.8, gb=62.2)
    yield Row(name="the same, FP8 blockwise", **qwen, fp8="blockwise", ms=428.9, gb=62.3)


def _every_layout() -> Iterator[Row]:
    """`benchmarks.multi_gpu --ranks 2 --only training filled --balanced`, of both models; and levelled stages."""
    two: dict[str, Any] = {"gpus": 2, "engine": TODAY, "imbalance": 1.0}
    for model, name, layers, ms, memory in BALANCED:
        shown, fields = _layout(name, 2)
        config = {"Mixtral": MIXTRAL, "Qwen3": QWEN3}[model]
        named = f"{model}, {layers} layers, {shown}"
        yield Row(name=named, config=config, layers=layers, ms=ms, gb=sum(memory), **fields, **two)
    stages: dict[str, Any] = {"config": QWEN3_30B, "layers": 6, "microbatch": 2, **two}
    even, levelled = ({"pp": 2, "pp_layers": counts} for counts in ((3, 3), (4, 2)))
    yield Row(name="Qwen3 with head norms, 6 layers, pp2", **stages, parallel=even, ms=450.1, gb=43.9)
    yield Row(name="the same, stages levelled", **stages, parallel=levelled, ms=389.1, gb=55.8)


def one_gpu() -> Iterator[Row]:
    """docs/performance/training-step.md; and the same work before the fused steps."""
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
    yield Row(name="Mixtral, 8, FP8 tensorwise", **mixtral, graphs="none", fp8="tensorwise", ms=519.3, gb=_gib(62.9))
    before: dict[str, Any] = {"engine": "before, alone"}
    yield Row(name="Mixtral, 8", **mixtral, **before, ms=822, gb=_gib(57.6))
    yield Row(name="Mixtral, 1", **mixtral, microbatches=1, **before, ms=147.6, gb=_gib(57.6))
    yield Row(name="Qwen3, 8", **qwen, **before, ms=907, gb=None)


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
    both = lora(experts) | {"engine": TODAY}
    yield Row(name="attention and experts, one H200", **qwen, **both, ms=1117, gb=75.2)
    yield Row(name="attention, one H200", **qwen, **lora(attention), engine=TODAY, ms=1006, gb=63.6)


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
    qwen: dict[str, Any] = {"config": QWEN3_30B, "layers": 48, "gpus": 2, "microbatch": 2, "microbatches": 16}
    qwen |= {"parallel": ep2, "optim": optim | {"optimizer_offload_fraction": 0.7}, "engine": TODAY}
    yield Row(name="Qwen3-30B-A3B, ep2, 70 % on the host", **qwen, imbalance=1.0, ms=10574, gb=123.6)
    yield Row(name="the same, as routed: 1.04", **qwen, imbalance=1.04, ms=11414, gb=124.1)
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


def _layers(measured: Iterable[tuple[str, int, str, float, float]], *, gpus: int, engine: str) -> Iterator[Row]:
    """Rows of a model's layers in a layout, 8 micro-batches a GPU, no graphs: model, layers, layout, ms and GB of each."""
    for model, layers, name, ms, gb in measured:
        shown, fields = _layout(name, gpus)
        yield Row(
            name=f"{model}, {layers} layers, {shown}", layers=layers, gpus=gpus, engine=engine, graphs="none", ms=ms, gb=gb,
            config=MIXTRAL if model == "Mixtral" else QWEN3_30B, **fields,
        )  # fmt: skip


def _layout(name: str, gpus: int) -> tuple[str, dict[str, Any]]:
    """How a layout is shown, and what of a row it decides, with 8 sequences a GPU in micro-batches of one."""
    key, _, overlapped = name.partition(", ")
    parallel = LAYOUTS[key] if key == "fully sharded" else SHARD | LAYOUTS[key]
    parallel = parallel | ({"ep": gpus} if key == "ep" else {}) | ({"overlap_exchange": True} if overlapped else {})
    shown = name.replace(key, f"{key}{gpus}", 1) if key in ("ep", "dp") else name
    return shown, {"parallel": parallel, "microbatches": 8 * parallel.get("tp", 1) * parallel.get("pp", 1)}


LAYOUTS: dict[str, dict[str, Any]] = {
    "ep": {}, "dp": {}, "tp2 sp": {"tp": 2, "sp": True}, "pp2": {"pp": 2}, "pp2 ep2": {"pp": 2, "ep": 2},
    "tp2 sp ep2 etp1": {"tp": 2, "sp": True, "ep": 2, "etp": 1}, "fully sharded": {"fully_shard": True},
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


# Model, layout, layers, ms; weights, gradients, masters, moments, activations and buffers (10^9 bytes).
BALANCED = (
    ("Mixtral", "ep", 6, 964.4, (9.48, 18.97, 17.94, 35.88, 5.65)),
    ("Mixtral", "ep, exchanges overlapped", 6, 954.3, (9.48, 18.97, 17.94, 35.88, 10.90)),
    ("Mixtral", "tp2 sp", 6, 1068.7, (8.97, 17.94, 17.94, 35.88, 2.97)),
    ("Mixtral", "pp2", 6, 1077.6, (8.97, 17.94, 17.94, 35.88, 5.30)),
    ("Mixtral", "dp", 6, 1027.6, (17.94, 35.88, 17.94, 35.88, 4.79)),
    ("Mixtral", "ep", 8, 1272.0, (12.47, 24.94, 23.74, 47.49, 7.59)),
    ("Mixtral", "tp2 sp", 9, 1578.7, (13.32, 26.65, 26.65, 53.30, 4.40)),
    ("Mixtral", "pp2", 8, 1398.9, (11.87, 23.74, 23.74, 47.49, 6.86)),
    ("Qwen3", "ep", 12, 616.1, (8.95, 17.90, 16.20, 32.40, 5.03)),
    ("Qwen3", "ep, exchanges overlapped", 12, 605.3, (8.95, 17.90, 16.20, 32.40, 9.93)),
    ("Qwen3", "tp2 sp", 12, 817.1, (8.10, 16.21, 16.21, 32.41, 2.93)),
    ("Qwen3", "pp2", 12, 819.9, (8.10, 16.20, 16.20, 32.40, 4.70)),
    ("Qwen3", "dp", 12, 707.0, (16.20, 32.40, 16.20, 32.40, 4.80)),
)


def several_gpus() -> Iterator[Row]:
    """`benchmarks.multi_gpu` on two and four GPUs: Mixtral's layers, 8 sequences a GPU, micro-batches of one."""
    for gpus, name, layers, ms, memory in SEVERAL:
        shown, fields = _layout(name, gpus)
        yield Row(
            name=f"{shown}, {layers} layers", config=MIXTRAL, layers=layers, gpus=gpus, graphs="none", ms=ms, gb=sum(memory),
            engine="now, H200" if len(memory) == 1 or (gpus == 2 and layers > 5) else "before", **fields,
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
