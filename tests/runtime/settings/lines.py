"""Command lines that people use, and what becomes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import MixtralConfig

from moeconv.families import family_of
from moeconv.families.base import Model
from runtime.settings.assemble import make_run
from runtime.settings.check import check_run
from runtime.settings.flags import parse_flags
from runtime.settings.run import RunConfig

MIXTRAL_8X7B = MixtralConfig(max_position_embeddings=32768, dtype="bfloat16").to_dict()
CKPT = Path("ckpt")

# A Mixtral 8x7B run on 16 GPUs as it is written for Megatron-LM.
SCRIPT = """
  --use-mcore-models --disable-bias-linear --seq-length 2048 --max-position-embeddings 32768 --num-layers 32
  --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32 --init-method-std 0.01 --attention-dropout 0.0
  --hidden-dropout 0.0 --normalization RMSNorm --position-embedding-type rope --swiglu
  --untie-embeddings-and-output-weights --group-query-attention --num-query-groups 8 --no-masked-softmax-fusion
  --no-position-embedding --num-experts 8 --expert-model-parallel-size 4 --moe-router-load-balancing-type aux_loss
  --moe-router-topk 2 --moe-aux-loss-coeff 1e-2 --moe-grouped-gemm --tokenizer-type Llama2Tokenizer
  --tokenizer-model tok/tokenizer.model --data-path data_text_document --split 99990,8,2 --micro-batch-size 1
  --global-batch-size 128 --lr 1e-4 --train-iters 500000 --lr-decay-iters 320000 --lr-decay-style cosine
  --min-lr 1.0e-5 --weight-decay 0.1 --lr-warmup-iters 500 --clip-grad 1.0 --bf16 --tensor-model-parallel-size 4
  --pipeline-model-parallel-size 1 --sequence-parallel --use-distributed-optimizer --log-interval 1
  --save-interval 10000 --eval-interval 1000 --eval-iters 10 --save ckpt --load ckpt --tensorboard-dir ckpt/tensorboard
  --no-load-optim --no-load-rng --wandb-project P --wandb-exp-name N
"""
# Source: https://github.com/NVIDIA/Megatron-LM/blob/d98e8a6/examples/mixtral/train_mixtral_8x7b_distributed.sh (flags).
MEGATRON = """
  --use-mcore-models --disable-bias-linear --seq-length 4096 --max-position-embeddings 32768 --num-layers 32
  --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32 --init-method-std 0.01 --attention-dropout 0.0
  --hidden-dropout 0.0 --normalization RMSNorm --position-embedding-type rope --swiglu
  --untie-embeddings-and-output-weights --group-query-attention --num-query-groups 8 --no-masked-softmax-fusion
  --no-position-embedding --rotary-base 1000000 --num-experts 8 --moe-router-topk 2
  --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2 --moe-grouped-gemm
  --moe-token-dispatcher-type alltoall --overlap-param-gather --overlap-grad-reduce --tokenizer-type Llama2Tokenizer
  --tokenizer-model tok/tokenizer.model --data-path data_text_document --split 99990,8,2 --micro-batch-size 1
  --global-batch-size 256 --lr 1e-4 --train-iters 500000 --lr-decay-iters 320000 --lr-decay-style cosine
  --min-lr 1.0e-5 --weight-decay 0.1 --lr-warmup-iters 500 --clip-grad 1.0 --bf16 --tensor-model-parallel-size 1
  --pipeline-model-parallel-size 4 --expert-model-parallel-size 8 --use-distributed-optimizer --sequence-parallel
  --log-interval 1 --save-interval 10000 --eval-interval 1000 --eval-iters 10 --save ckpt --load ckpt
  --tensorboard-dir ckpt/tensorboard --no-load-optim --no-load-rng --wandb-project Mixtral --wandb-exp-name Mixtral_8x7B
"""
SHORT = "--load ckpt --data text --save out --train-iters 10"


def make(line: str, config: dict[str, Any] = MIXTRAL_8X7B) -> RunConfig:
    """Make a run's settings from a command line and a config.json."""
    return make_run(parse_flags(line.split()), Model.from_config(family_of(config), config), CKPT)


def judge(run: RunConfig, world_size: int) -> None:
    """Judge a run on so many processes."""
    check_run(run, world_size)
