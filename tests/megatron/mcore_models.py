"""megatron-core's own models on a CPU, configured by a checkpoint's arguments alone, as Megatron-LM does it."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from tests.megatron.mcore_ranks import Case


def settings_of(case: Case, args: argparse.Namespace) -> Any:
    """Make the configuration of a checkpoint's arguments as Megatron-LM does, but for how it runs here.

    Source: https://github.com/NVIDIA/Megatron-LM/blob/core_v0.16.1/megatron/training/arguments.py
    (core_transformer_config_from_args), and d98e8a64's argument_utils.py (_apply_yarn_config_from_args).
    """
    from megatron.core.fusions.fused_bias_geglu import quick_gelu
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

    kind = MLATransformerConfig if args.multi_latent_attention else TransformerConfig
    said = {f.name: getattr(args, f.name) for f in dataclasses.fields(kind) if hasattr(args, f.name)}
    said |= {"num_moe_experts": args.num_experts, "layernorm_epsilon": args.norm_epsilon}
    assert args.swiglu != args.quick_geglu
    said["activation_func"] = torch.nn.functional.silu if args.swiglu else quick_gelu
    said |= {"gated_linear_unit": True, "bias_activation_fusion": False}
    said["num_query_groups"] = args.num_query_groups if args.group_query_attention else None
    here = {
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "allgather",
        "moe_grouped_gemm": False,
        "use_cpu_initialization": True,
        "params_dtype": torch.float32,
        "pipeline_dtype": torch.float32,
        "bf16": False,
        "fp16": False,
        "attention_dropout": 0.0,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        "gradient_accumulation_fusion": False,
        "tensor_model_parallel_size": case.tp,
        "pipeline_model_parallel_size": case.pp,
        "virtual_pipeline_model_parallel_size": case.vpp,
        "expert_model_parallel_size": case.ep,
        "expert_tensor_parallel_size": case.etp or case.tp,
    }
    config = kind(**{**said, **here})
    if args.position_embedding_type == "yarn":
        config.yarn_rotary_scaling_factor = args.rotary_scaling_factor
        config.yarn_original_max_position_embeddings = args.yarn_original_max_position_embeddings
        config.yarn_beta_fast, config.yarn_beta_slow = args.yarn_beta_fast, args.yarn_beta_slow
        config.yarn_mscale, config.yarn_mscale_all_dim = args.mscale, args.mscale_all_dim
        config.yarn_correction_range_round_to_int = args.yarn_correction_range_round_to_int
    return config


def _layers(settings: Any, case: Case, stage: int | None) -> Any:
    """The layers of a stage, as Megatron-LM's gpt_builders.py chooses them."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_layer_local_spec

    if settings.num_moe_experts is None:
        return get_gpt_layer_local_spec(qk_layernorm=settings.qk_layernorm, normalization="RMSNorm")
    block = get_gpt_decoder_block_spec(settings, False, normalization="RMSNorm", vp_stage=stage)
    latent = settings.multi_latent_attention
    for layer in block.layer_specs:
        if latent:
            layer.submodules.self_attention.submodules.core_attention = _latent_core()
        if case.spec == "te":
            # Transformer Engine does not run on a CPU. The two specs' sharded keys differ in those of norms alone.
            moe = "MoE" in getattr(layer.submodules.mlp.module, "__name__", "")
            layer.submodules.sharded_state_dict_keys_map = _te_keys(moe=moe, latent=latent)
    return block


def _te_keys(*, moe: bool, latent: bool) -> dict[str, str]:
    """Give the sharded keys that Transformer Engine's layers have and local ones don't: those of norms that it fuses."""
    fused = {} if moe else {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}
    if not latent:
        return {"input_layernorm.": "self_attention.linear_qkv.layer_norm_", **fused}
    return {
        f"self_attention.{n}_layernorm.": f"self_attention.linear_{n}_up_proj.layer_norm_" for n in ("q", "kv")
    } | fused


def _latent_core() -> Any:
    """Local attention for heads whose values have another size than queries and keys; v0.16.1's takes no such sizes."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    class LatentCore(DotProductAttention):
        def __init__(self, *args: Any, k_channels: int = 0, v_channels: int = 0, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            assert v_channels in (0, self.hidden_size_per_attention_head)  # made once without sizes, then with them

    return LatentCore


def build(case: Case, args: argparse.Namespace) -> list[Any]:
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel

    settings = settings_of(case, args)
    multiple = 128 * case.tp
    rows = (args.vocab_size + multiple - 1) // multiple * multiple
    models = []
    for stage in range(case.vpp or 1):
        virtual = {} if case.vpp is None else {"vp_stage": stage}
        where = {"ignore_virtual": case.vpp is None, **virtual}
        model = GPTModel(
            settings,
            _layers(settings, case, None if case.vpp is None else stage),
            rows,
            args.max_position_embeddings,
            pre_process=parallel_state.is_pipeline_first_stage(**where),
            post_process=parallel_state.is_pipeline_last_stage(**where),
            share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
            position_embedding_type=args.position_embedding_type,
            rotary_percent=args.rotary_percent,
            rotary_base=args.rotary_base,
            rope_scaling=args.use_rope_scaling,
            rope_scaling_factor=args.rope_scaling_factor,
            seq_len_interpolation_factor=args.rotary_seq_len_interpolation_factor,
            **virtual,
        )
        models.append(model.eval())
    return models
