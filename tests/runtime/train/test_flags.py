"""The command lines that people use: accepted as they are, or refused with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, MixtralConfig

from moeconv.errors import MoeconvError
from moeconv.families import family_of
from moeconv.families.base import Model
from runtime.errors import ConfigError
from runtime.settings.check import check_run, data_parallel_size
from runtime.settings.flags import parse_flags, without_effect
from runtime.settings.run import RunConfig, make_run

MIXTRAL_8X7B = MixtralConfig(max_position_embeddings=32768, dtype="bfloat16").to_dict()
CKPT = Path("ckpt")

# A Mixtral 8x7B run on 16 GPUs as it is written for Megatron-LM.
EXAMPLE = """
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
SHORT = "--load ckpt --data text --save out --train-iters 10"


def make(line: str, config: dict[str, Any] = MIXTRAL_8X7B) -> RunConfig:
    return make_run(parse_flags(line.split()), Model.from_config(family_of(config), config), CKPT)


def test_the_example_means_what_it_meant() -> None:
    run = make(EXAMPLE)
    check_run(run, 16)
    parallel = run.parallel
    assert (parallel.tp, parallel.sp, parallel.pp, parallel.ep, parallel.etp, parallel.cp) == (4, True, 1, 4, 4, 1)
    assert parallel.use_distributed_optimizer
    assert not parallel.fully_shard
    assert data_parallel_size(parallel, 16) == 4
    assert run.train.num_microbatches(4) == 32
    assert run.moe is not None
    assert run.moe.aux_losses == (("aux_loss", 1e-2),)
    assert (run.moe.num_experts, run.moe.topk, run.moe.capacity_factor) == (8, 2, None)
    assert run.dtype == "bfloat16"
    assert [run.schedule.lr(step) for step in (0, 250, 500, 320000, 400000)] == [0, 5e-5, 1e-4, 1e-5, 1e-5]
    assert run.optim.weight_decay == 0.1
    assert run.data.split == (99990, 8, 2)
    assert not run.checkpoint.load_optim
    assert not run.checkpoint.load_rng
    assert (run.log.wandb_project, run.log.wandb_name) == ("P", "N")
    notes = " ".join(without_effect(parse_flags(EXAMPLE.split())))
    for flag in ("use-mcore-models", "no-masked-softmax-fusion", "no-position-embedding", "init-method-std"):
        assert f"--{flag}: no effect" in notes


def test_the_architecture_comes_from_the_checkpoint() -> None:
    run = make(SHORT)
    check_run(run, 1)
    assert (run.train.seq_length, run.dtype) == (2048, "bfloat16")
    assert make(SHORT + " --fp32").dtype == "float32"
    dense = make(SHORT, LlamaConfig(num_hidden_layers=2).to_dict())
    assert dense.moe is None


@pytest.mark.parametrize(
    ("flag", "values"),
    [
        ("--num-layers 16", "16; .* has 32"),
        ("--hidden-size 2048", "2048; .* has 4096"),
        ("--ffn-hidden-size 1024", "1024; .* has 14336"),
        ("--num-attention-heads 16", "16; .* has 32"),
        ("--num-query-groups 4", "4; .* has 8"),
        ("--num-experts 4", "4; .* has 8"),
        ("--moe-router-topk 1", "1; .* has 2"),
        ("--vocab-size 50000", "50000; .* has 32000"),
        ("--rotary-base 10000", "10000.0; .* has 1000000.0"),
        ("--max-position-embeddings 4096", "4096; .* has 32768"),
    ],
)
def test_a_disagreement_names_both_values(flag: str, values: str) -> None:
    with pytest.raises(ConfigError, match=f"{flag.split()[0]} is {values}"):
        make(f"{SHORT} {flag}")


def test_tied_embeddings_disagree() -> None:
    config = MixtralConfig(tie_word_embeddings=True).to_dict()
    with pytest.raises(ConfigError, match="tied embeddings"):
        make(SHORT + " --untie-embeddings-and-output-weights", config)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--hidden-dropout 0.1", "--hidden-dropout is 0.1; the runtime trains without dropout"),
        ("--seq-length 40000", "--seq-length is 40000; .* at most 32768"),
        ("--recompute-method block", "needs --recompute-granularity full"),
        ("--split 0,0,0", "--split is 0.0,0.0,0.0"),
        ("--clip-grad -1", "--clip-grad is -1.0"),
        ("--keep-last -1", "--keep-last is -1"),
        ("--moe-router-load-balancing-type sinkhorn --moe-aux-loss-coeff 0.1", "balances by itself"),
        ("--lr-warmup-iters 10", "--lr-warmup-iters is 10"),
        ("--train-iters 0", "--train-iters is missing"),
    ],
)
def test_values_that_cannot_be_honoured(flags: str, message: str) -> None:
    with pytest.raises(MoeconvError, match=message):
        make(f"{SHORT} {flags}")


@pytest.mark.parametrize(
    "flags", ["--moe-aux-loss 1", "--reset-attention-mask", "--normalization LayerNorm", "--bf16 --fp16"]
)
def test_unknown_flags_and_choices_end_with_usage(flags: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_flags(f"{SHORT} {flags}".split())
    assert stop.value.code == 2
    assert flags.split()[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("world", "flags", "message"),
    [
        (4, "--tensor-model-parallel-size 3", "--tensor-model-parallel-size 3 .* world size 4; .* fit: 1, 2, 4"),
        (
            3,
            "--tensor-model-parallel-size 3",
            "--tensor-model-parallel-size is 3; 32 attention heads .* 1, 2, 4, 8, 16, 32",
        ),
        (4, "--expert-model-parallel-size 8", "--expert-model-parallel-size 8 .* world size 4"),
        (3, "--expert-model-parallel-size 3", "--expert-model-parallel-size is 3; .* experts 8: .* 1, 2, 4, 8"),
        (3, "--expert-tensor-parallel-size 3", "--expert-tensor-parallel-size is 3"),
        (
            4,
            "--tensor-model-parallel-size 2 --expert-model-parallel-size 2",
            "--expert-model-parallel-size is 2 and .* need --sequence-parallel",
        ),
        (
            3,
            "--pipeline-model-parallel-size 3",
            "--pipeline-model-parallel-size is 3.*--pp-layers, for example 11,11,10",
        ),
        (2, "--pipeline-model-parallel-size 2 --pp-layers 10,10", "adds up to 20"),
        (2, "--pipeline-model-parallel-size 2 --pp-layers 8,8,16", "--pp-layers has 3 numbers.*needs 2"),
        (1, "--num-virtual-stages-per-pipeline-rank 2", "--num-virtual-stages-per-pipeline-rank is 2"),
        (
            2,
            "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2 --pipeline-schedule 1f1b",
            "--pipeline-schedule 1f1b with",
        ),
        (
            2,
            "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2 --global-batch-size 3",
            "3 micro-batches .* multiple of --pipeline-model-parallel-size 2",
        ),
        (2, "--context-parallel-size 2 --seq-length 1002", "--seq-length is 1002; .* multiple of 4: 1000 fits"),
        (2, "--global-batch-size 5", "--global-batch-size 5 .* data-parallel degree 2; take a multiple of 2"),
    ],
)
def test_start_up_refusals_name_the_flag_its_value_and_what_fits(world: int, flags: str, message: str) -> None:
    run = make(f"{SHORT} {flags}")
    with pytest.raises(MoeconvError, match=message):
        check_run(run, world)


def test_dense_models_have_no_experts_to_divide() -> None:
    run = make(SHORT + " --expert-model-parallel-size 2", LlamaConfig().to_dict())
    with pytest.raises(ConfigError, match="dense model without experts"):
        check_run(run, 2)


def test_uneven_stages_and_shared_kv_heads_are_fine() -> None:
    check_run(make(SHORT + " --pipeline-model-parallel-size 4 --pp-layers 9,8,8,7"), 4)
    check_run(make(SHORT + " --tensor-model-parallel-size 16"), 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"model_type": "gpt2"}, "gpt2"),
        ({"num_local_experts": None, "num_experts_per_tok": 9}, "num_local_experts"),
        ({"rope_parameters": {"rope_type": "spiral"}}, "rope_type is 'spiral'"),
        ({"attention_dropout": 0.1}, "attention_dropout = 0.1"),
        ({"num_key_value_heads": 5}, "not a multiple of 5"),
    ],
)
def test_configs_that_the_runtime_does_not_compute(change: dict[str, Any], message: str) -> None:
    config = MIXTRAL_8X7B | change
    if config["num_local_experts"] is None:
        del config["num_local_experts"]
    with pytest.raises(MoeconvError, match=message):
        make(SHORT, config)


def test_both_forms_of_config() -> None:
    v4 = {key: value for key, value in MIXTRAL_8X7B.items() if key not in ("rope_parameters", "dtype")}
    v4 |= {"rope_theta": 1e6, "torch_dtype": "bfloat16"}
    assert make(SHORT, v4).model == make(SHORT).model
    assert make(SHORT, v4).model.compute == make(SHORT).model.compute
