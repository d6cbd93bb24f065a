"""The `args` of an exported checkpoint: the model's, and those of a run without history under some layout."""

from __future__ import annotations

from typing import Any

from moeconv.families.base import Model
from moeconv.io.pickling import Instance
from moeconv.io.unpickle import TORCH_DTYPES, Symbol
from moeconv.layout.degrees import Degrees
from moeconv.megatron.model_args import model_args
from moeconv.megatron.names import Experts, Spec
from moeconv.megatron.tensors import padded_vocab

TORCH_NAMES = {kind: name for name, kind in TORCH_DTYPES.items()}


def make_args(model: Model, degrees: Degrees, spec: Spec, experts: Experts, dtype: str, fmt: str) -> Instance:
    """Make the `args` of an exported checkpoint: all that `--use-checkpoint-args` and the loader's checks read.

    Args:
        model: the model.
        degrees: the degrees of the exported checkpoint.
        spec: the layer spec.
        experts: the expert implementation.
        dtype: the safetensors dtype of the weights.
        fmt: `torch` or `torch_dist`.

    Returns:
        An argparse.Namespace to be pickled.

    Raises:
        MappingError: the model computes something that no argument says.
    """
    said = model_args(model)
    return Instance(
        Symbol("argparse", "Namespace"),
        {
            **said,
            **_derived_args(model, said, degrees, spec, dtype),
            **_expert_args(experts, "moe_router_topk" in said),
            **_run_args(model.sizes["layers"], degrees, fmt),
        },
    )


def _derived_args(model: Model, said: dict[str, Any], degrees: Degrees, spec: Spec, dtype: str) -> dict[str, Any]:
    return {
        "encoder_num_layers": said["num_layers"],
        "seq_length": said["max_position_embeddings"],
        "encoder_seq_length": said["max_position_embeddings"],
        "padded_vocab_size": padded_vocab(model.sizes["vocab"], degrees.tp),
        "make_vocab_size_divisible_by": 128,
        "use_rotary_position_embeddings": True,
        # Genuine rope checkpoints hold True, the argument's default, and the loader compares it.
        "add_position_embedding": True,
        "hidden_dropout": 0.0,
        "transformer_impl": "transformer_engine" if spec == "te" else "local",
        "params_dtype": Symbol("torch", TORCH_NAMES[dtype]),
        "bf16": dtype == "BF16",
        "fp16": dtype == "F16",
    }


def _expert_args(experts: Experts, moe: bool) -> dict[str, Any]:
    """How experts run, and the balancing losses, which are the next run's to choose."""
    if not moe:
        return {"moe_grouped_gemm": False}
    return {
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": 0.0,
        "moe_z_loss_coeff": None,
        "moe_grouped_gemm": experts == "grouped",
        "moe_use_legacy_grouped_gemm": False,
        "moe_token_dispatcher_type": "alltoall",
    }


def _run_args(num_layers: int, degrees: Degrees, fmt: str) -> dict[str, Any]:
    """The arguments of a run without history: nothing was trained; the checkpoint holds no optimizer or RNG state."""
    return {
        "tensor_model_parallel_size": degrees.tp,
        "pipeline_model_parallel_size": degrees.pp,
        "transformer_pipeline_model_parallel_size": degrees.pp,
        "virtual_pipeline_model_parallel_size": degrees.vpp if degrees.vpp > 1 else None,
        "num_layers_per_virtual_pipeline_stage": num_layers // (degrees.pp * degrees.vpp) if degrees.vpp > 1 else None,
        "num_virtual_stages_per_pipeline_rank": None,
        "expert_model_parallel_size": degrees.ep,
        "expert_tensor_parallel_size": degrees.etp,
        "context_parallel_size": 1,
        "sequence_parallel": False,
        "data_parallel_size": 1,
        "world_size": world_size(degrees),
        "iteration": 0,
        "consumed_train_samples": 0,
        "skipped_train_samples": 0,
        "consumed_valid_samples": 0,
        "no_save_optim": True,
        "no_save_rng": True,
        "use_distributed_optimizer": False,
        "ckpt_format": fmt,
        "use_dist_ckpt": fmt == "torch_dist",
        "dist_ckpt_format_deprecated": None,
        "data_parallel_random_init": False,
        "spec": None,
        "tokenizer_type": None,
        "tokenizer_model": None,
    }


def world_size(degrees: Degrees) -> int:
    """Give the smallest number of ranks that these degrees need."""
    attention, experts = degrees.tp, degrees.ep * degrees.etp
    stage = attention
    while stage % experts:
        stage += attention
    return stage * degrees.pp
