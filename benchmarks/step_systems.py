"""The systems that `benchmarks.train_step --peers` sets beside each other, with the same work on the same GPUs.

The work: a slice of a model with random weights, AdamW, gradients clipped, a balancing loss; several micro-batches of
sequences of 4096. `python -m benchmarks.step_systems SYSTEM MODEL NUM...` measures one system in this process, for one
or several numbers of micro-batches, and prints a line of JSON for each; under torchrun, ranks in a layout do it together.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import sys
import time
import types
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

POSITIONS = 4096
Step = Callable[[], object]
MakeStep = Callable[[int], Step]
"""From a number of micro-batches to what does a step of them."""


@dataclass(frozen=True)
class Slice:
    """Some layers of a model."""

    layers: int
    hidden: int
    ffn: int
    experts: int
    """0: the layers are dense."""
    topk: int
    """1 for dense layers."""
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    def flops(self, tokens: int) -> float:
        """Forward and backward: 6 for each active weight but the embedding's, and causal attention."""
        attention = self.heads * self.head_dim
        layer = self.topk * 3 * self.hidden * self.ffn + 2 * self.hidden * attention + self.experts * self.hidden
        layer += 2 * self.hidden * self.kv_heads * self.head_dim
        weights = self.layers * layer + self.hidden * self.vocab
        return 6.0 * weights * tokens + self.layers * 6.0 * tokens * POSITIONS * attention


@dataclass(frozen=True)
class Layout:
    """How ranks share the work; tensor parallelism is sequence-parallel, and leaves experts whole."""

    tp: int = 1
    ep: int = 1
    sequences: int = 2
    """Of a micro-batch."""

    @property
    def world(self) -> int:
        """Ranks of this launch."""
        return int(os.environ.get("WORLD_SIZE", "1"))

    @property
    def data_ranks(self) -> int:
        """Ranks with data of their own."""
        return self.world // self.tp

    @property
    def data_rank(self) -> int:
        """Which of them this one is."""
        return int(os.environ.get("RANK", "0")) // self.tp


MODELS = {
    "mixtral": Slice(2, 4096, 14336, 8, 2, 32, 8, 128, 32000),
    "qwen3": Slice(4, 2048, 768, 128, 8, 32, 4, 128, 151936),
    # Llama 2's 70B, dense: with tensor parallelism its products are large enough to hide what travels.
    "llama": Slice(2, 8192, 28672, 0, 1, 64, 8, 128, 32000),
}


def runtime(
    model: Slice,
    layout: Layout,
    fp8: str | None = None,
    *,
    captures: bool = True,
    overlap: bool = False,
    tp_comm_overlap: bool = False,
    **options: Any,
) -> MakeStep:
    """This project's engine: bf16, fp32 masters, moments and gradient sums; CUDA graphs where the trainer takes them, and
    with `overlap` exchanges of rows hidden, with `tp_comm_overlap` gathers and sums of tensor parallelism."""
    from benchmarks.train_step import llama, make_engine, mixtral, text_batch
    from runtime.fp8.config import Fp8Config
    from runtime.parallel.degrees import ParallelConfig

    several = layout.world > 1
    if several:
        _join()
    parallel = ParallelConfig(
        tp=layout.tp, sp=layout.tp > 1, ep=layout.ep, etp=1, use_distributed_optimizer=several,
        overlap_exchange=overlap,
        tp_comm_overlap=tp_comm_overlap,
    )  # fmt: skip

    sizes = asdict(model)
    experts, topk = sizes.pop("experts"), sizes.pop("topk")
    ours = mixtral(**sizes, experts=experts, topk=topk) if experts else llama(**sizes)
    if fp8 is not None:
        options["fp8"] = Fp8Config(format="hybrid", recipe=fp8)  # type: ignore[arg-type]
    engine = make_engine(
        ours,
        torch.bfloat16,
        torch.device("cuda", torch.cuda.current_device()),
        lr=1e-5,
        parallel=parallel,
        on_device=True,
        captures=captures and not several and fp8 is None,
        **options,
    )

    def make(num: int) -> Step:
        seeds = range(layout.data_rank, num * layout.data_ranks, layout.data_ranks)
        batches = [text_batch(model.vocab, layout.sequences, POSITIONS, seed) for seed in seeds]
        return lambda: engine.train_step(batches)

    return make


def _join() -> None:
    """Let the ranks of a launch meet; one alone meets itself, since Megatron-Core wants process groups."""
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    for name, value in alone.items():
        os.environ.setdefault(name, value)
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl")


def _add_in_torch() -> None:
    """A kernel of a package that isn't built here, which Megatron-Core wants for sums of gradients: in plain torch."""

    def accumulate(x: torch.Tensor, grad: torch.Tensor, total: torch.Tensor) -> None:
        total.add_(grad.reshape(-1, grad.shape[-1]).t() @ x.reshape(-1, x.shape[-1]))

    module: Any = types.ModuleType("fused_weight_gradient_mlp_cuda")
    module.wgrad_gemm_accum_fp32 = module.wgrad_gemm_accum_fp16 = accumulate
    sys.modules["fused_weight_gradient_mlp_cuda"] = module


def megatron(model: Slice, layout: Layout, fp8: str | None = None, *, overlap: bool = False) -> MakeStep:
    """Megatron-Core with Transformer Engine, every fusion on; its own DDP and distributed optimizer.

    With `overlap` one micro-batch's forward pass runs beside another's backward pass, as its
    --overlap-moe-expert-parallel-comm does.
    """
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "32" if overlap else "1"
    _join()
    _add_in_torch()
    import torch.nn.functional as F
    from megatron.core import parallel_state, tensor_parallel

    parallel_state.initialize_model_parallel(
        layout.tp, 1, expert_model_parallel_size=layout.ep, expert_tensor_parallel_size=1
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer.module import Float16Module
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
    from megatron.core.transformer.transformer_config import TransformerConfig

    options: dict[str, Any] = {}
    if fp8 is not None:
        options = {"fp8": "e4m3" if fp8 == "blockwise" else "hybrid", "fp8_recipe": fp8}
    if model.experts:
        options |= {
            "moe_ffn_hidden_size": model.ffn, "num_moe_experts": model.experts, "moe_router_topk": model.topk,
            "moe_grouped_gemm": True, "moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.01,
            "moe_token_dispatcher_type": "alltoall", "moe_permute_fusion": True, "moe_router_fusion": fp8 is None,
            "moe_router_padding_for_fp8": fp8 is not None,
        }  # fmt: skip
    config = TransformerConfig(
        num_layers=model.layers, hidden_size=model.hidden, num_attention_heads=model.heads,
        num_query_groups=model.kv_heads, kv_channels=model.head_dim, ffn_hidden_size=model.ffn,
        add_bias_linear=False, gated_linear_unit=True, activation_func=F.silu, normalization="RMSNorm", bf16=True,
        params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16, hidden_dropout=0.0, attention_dropout=0.0, gradient_accumulation_fusion=True,
        bias_activation_fusion=True, bias_dropout_fusion=True, apply_rope_fusion=True, cross_entropy_loss_fusion=True,
        cross_entropy_fusion_impl="te", masked_softmax_fusion=True, persist_layer_norm=True,
        tensor_model_parallel_size=layout.tp, sequence_parallel=layout.tp > 1, expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=1, overlap_moe_expert_parallel_comm=overlap, **options,
    )  # fmt: skip
    grouped = model.experts > 0
    spec = get_gpt_layer_with_transformer_engine_spec(num_experts=model.experts or None, moe_grouped_gemm=grouped)
    gpt = GPTModel(
        config, spec, vocab_size=model.vocab, max_sequence_length=POSITIONS, share_embeddings_and_output_weights=False,
        position_embedding_type="rope", rotary_base=1000000,
    )  # fmt: skip
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=True, overlap_grad_reduce=layout.world > 1
    )
    wrapped = DistributedDataParallel(config, ddp, Float16Module(config, gpt.cuda().bfloat16()))
    adam = OptimizerConfig(
        optimizer="adam", lr=1e-5, weight_decay=0.1, bf16=True, params_dtype=torch.bfloat16,
        use_distributed_optimizer=True, clip_grad=1.0,
    )  # fmt: skip
    optimizer = get_megatron_optimizer(adam, [wrapped])
    positions = torch.arange(POSITIONS, device="cuda").expand(layout.sequences, POSITIONS)
    torch.manual_seed(layout.data_rank)

    def make(num: int) -> Step:
        shape = (layout.sequences, POSITIONS)
        batches = [torch.randint(0, model.vocab, shape, device="cuda") for _ in range(num)]
        scale = torch.tensor(1.0 / num, device="cuda")

        def step_overlapped() -> object:
            wrapped.zero_grad_buffer()
            optimizer.zero_grad()
            _run_overlapped(wrapped, config, batches, positions)
            return optimizer.step()

        def step() -> float:
            wrapped.zero_grad_buffer()
            optimizer.zero_grad()
            MoEAuxLossAutoScaler.set_loss_scale(scale)
            for place, batch in enumerate(batches):
                # Gradients go over the links behind the last micro-batch alone.
                with nullcontext() if place == num - 1 else wrapped.no_sync():
                    out = wrapped(batch, positions, None, labels=batch)
                    (out.float().mean() / num).backward()
            finalize_model_grads([wrapped])
            optimizer.step()
            return float(out.mean())

        return step_overlapped if overlap else step

    return make


def _run_overlapped(wrapped: Any, config: Any, batches: list[torch.Tensor], positions: torch.Tensor) -> None:
    """Megatron-Core's own schedule of a step, which is what overlaps."""
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.pipeline_parallel import get_forward_backward_func

    config.no_sync_func, config.finalize_model_grads_func = wrapped.no_sync, finalize_model_grads

    def loss_of(out: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
        return out.float().mean(), {}

    def forward(data: Any, gpt: Any, return_schedule_plan: bool = False) -> tuple[Any, Any]:
        batch = next(data)
        make = gpt.build_schedule_plan if return_schedule_plan else gpt
        return make(batch, positions, None, labels=batch), loss_of

    get_forward_backward_func()(
        forward_step_func=forward, data_iterator=iter(batches), model=[wrapped], num_microbatches=len(batches),
        seq_length=POSITIONS, micro_batch_size=len(positions), forward_only=False,
    )  # fmt: skip


def transformers(model: Slice, layout: Layout, *, compiled: bool) -> MakeStep:
    """transformers on one GPU, in pure bf16: no masters, moments and gradients in bf16; fused AdamW, grouped_mm experts."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        num_hidden_layers=model.layers, hidden_size=model.hidden, intermediate_size=model.ffn,
        num_attention_heads=model.heads, num_key_value_heads=model.kv_heads, head_dim=model.head_dim,
        num_local_experts=model.experts, num_experts_per_tok=model.topk, vocab_size=model.vocab,
        max_position_embeddings=POSITIONS, output_router_logits=True, router_aux_loss_coef=0.01,
    )  # fmt: skip
    config._attn_implementation, config._experts_implementation = "sdpa", "grouped_mm"
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        net = MixtralForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-5, fused=True)
    forward: Any = torch.compile(net) if compiled else net

    def make(num: int) -> Step:
        shape = (layout.sequences, POSITIONS)
        batches = [torch.randint(0, model.vocab, shape, device="cuda") for _ in range(num)]

        def step() -> float:
            for batch in batches:
                loss = forward(input_ids=batch, labels=batch, use_cache=False).loss
                (loss / num).backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return float(loss)

        return step

    return make


SYSTEMS: dict[str, Callable[[Slice, Layout], MakeStep]] = {
    "runtime": runtime,
    "runtime, no CUDA graphs": lambda *work: runtime(*work, captures=False),
    "runtime, overlap": lambda *work: runtime(*work, overlap=True),
    "runtime, tp-comm-overlap": lambda *work: runtime(*work, tp_comm_overlap=True),
    "runtime, bf16 moments": lambda *work: runtime(*work, moments_dtype="bfloat16"),
    "runtime, FP8 tensorwise": lambda *work: runtime(*work, "tensorwise"),
    "runtime, FP8 delayed": lambda *work: runtime(*work, "delayed"),
    "Megatron-Core": megatron,
    "Megatron-Core, overlap": lambda *work: megatron(*work, overlap=True),
    "Megatron-Core, FP8 tensorwise": lambda *work: megatron(*work, "tensorwise"),
    "Megatron-Core, FP8 delayed": lambda *work: megatron(*work, "delayed"),
    "Megatron-Core, FP8 blockwise": lambda *work: megatron(*work, "blockwise"),
    "transformers, compiled, pure bf16": lambda *work: transformers(*work, compiled=True),
    "transformers, pure bf16": lambda *work: transformers(*work, compiled=False),
}
PACKAGES = {"Megatron-Core": ("megatron-core", "transformer-engine"), "transformers": ("transformers",)}


def packages_of(system: str) -> list[str]:
    """What a system needs besides torch."""
    return [name for key, names in PACKAGES.items() if system.startswith(key) for name in names]


def version(package: str) -> str | None:
    """The version of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _synchronize() -> None:
    """Wait for the device, and for all ranks."""
    torch.cuda.synchronize()
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.cuda.synchronize()


def seconds_of(step: Step, repeats: int) -> float:
    """Mean time of a step in a row of them, as training runs them, after three that aren't counted."""
    for _ in range(3):
        step()
    _synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    _synchronize()
    return (time.perf_counter() - start) / repeats


def write_profile(step: Step, path: Path, title: str) -> None:
    """Write where the device's time of a step goes, by kernel."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as prof:
        step()
        _synchronize()
    events = [e for e in prof.key_averages() if e.device_type.name == "CUDA" and not e.key.startswith("Optimizer.")]
    events.sort(key=lambda e: -e.self_device_time_total)
    total = sum(e.self_device_time_total for e in events)
    lines = [f"{title}: {total / 1e3:.1f} ms of kernels"]
    for e in events[:60]:
        time_us = e.self_device_time_total
        lines.append(f"{time_us / 1e3:8.2f} ms {time_us / total:6.1%} {e.count:5} x {e.key[:110]}")
    path.write_text("\n".join(lines) + "\n")


def main() -> None:
    """Measure one system."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("system", choices=SYSTEMS)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("numbers", type=int, nargs="+", help="micro-batches of a step")
    parser.add_argument("--profile", type=Path, metavar="FOLDER", help="write the kernels of a step there")
    for name, default in {"tp": 1, "ep": 1, "sequences": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--layers", type=int, help="default: the model's slice")
    args = parser.parse_args()
    model, layout = MODELS[args.model], Layout(args.tp, args.ep, args.sequences)
    model = replace(model, layers=args.layers or model.layers)
    make = SYSTEMS[args.system](model, layout)
    state = torch.cuda.memory_allocated()
    for num in args.numbers:
        step = make(num)
        torch.cuda.reset_peak_memory_stats()
        tokens = num * layout.sequences * layout.data_ranks * POSITIONS
        seconds = seconds_of(step, 20 if num == 1 else 5)
        peak = torch.cuda.max_memory_allocated()
        line = {
            "system": args.system, "microbatches": num, "ms": seconds * 1e3, "tokens_per_second": tokens / seconds,
            "tflops": model.flops(tokens) / seconds / 1e12 / layout.world, "peak_gib": peak / 2**30,
            "above_start_gib": (peak - state) / 2**30,
        }  # fmt: skip
        if int(os.environ.get("RANK", "0")):
            continue  # all ranks take as long, and the first one tells
        print(json.dumps(line), flush=True)
        if args.profile is not None and layout.world == 1:
            name = "".join(c if c.isalnum() else "_" for c in args.system)
            write_profile(step, args.profile / f"{name}_{args.model}_{num}.txt", f"{args.system}, {num} micro-batches")


if __name__ == "__main__":
    main()
