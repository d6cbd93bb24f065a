"""Megatron-Core with Transformer Engine as one of the systems of `benchmarks.train_step --peers`."""

from __future__ import annotations

import os
import sys
import types
from contextlib import nullcontext
from typing import Any

import torch

from benchmarks.step_work import Layout, MakeStep, Slice, Step, join_ranks


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
    join_ranks()
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
            "moe_router_padding_for_fp8": fp8 is not None, "moe_router_force_load_balancing": layout.balanced,
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
        config, spec, vocab_size=model.vocab, max_sequence_length=model.positions, share_embeddings_and_output_weights=False,
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
    positions = torch.arange(model.positions, device="cuda").expand(layout.sequences, model.positions)
    torch.manual_seed(layout.data_rank)

    def make(num: int) -> Step:
        shape = (layout.sequences, model.positions)
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
        seq_length=positions.shape[1], micro_batch_size=len(positions), forward_only=False,
    )  # fmt: skip
