"""The command lines that people use: accepted as they are, or refused with the reason."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import LlamaConfig, MixtralConfig

from moeconv.errors import MoeconvError
from runtime.errors import ConfigError
from runtime.settings.architecture import FACTS, Fact
from runtime.settings.check import data_parallel_size
from runtime.settings.flags import parse_flags
from tests.runtime.settings.lines import MEGATRON, MIXTRAL_8X7B, SCRIPT, SHORT, judge, make


def test_the_example_means_what_it_meant() -> None:
    run = make(SCRIPT)
    judge(run, 16)
    parallel = run.parallel
    assert (parallel.tp, parallel.sp, parallel.pp, parallel.ep, parallel.etp, parallel.cp) == (4, True, 1, 4, 4, 1)
    assert parallel.use_distributed_optimizer
    assert not parallel.fully_shard
    assert data_parallel_size(parallel, 16) == 4
    assert run.train.batch_sizes(4).full == 128
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
    notes = " ".join(run.notes)
    for flag in ("use-mcore-models", "no-masked-softmax-fusion", "no-position-embedding", "init-method-std 0.01"):
        assert f"--{flag}: no effect" in notes


def test_the_architecture_comes_from_the_checkpoint() -> None:
    run = make(SHORT)
    judge(run, 1)
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


def test_a_balancing_loss_that_the_config_asks_for_is_not_passed_over() -> None:
    config = MIXTRAL_8X7B | {"router_aux_loss_coef": 0.02}
    line = "config.json has router_aux_loss_coef 0.02, which by itself has no effect: experts are balanced by --moe-aux-loss-coeff"
    assert sum(note.startswith(line) for note in make(SHORT, config).notes) == 1
    for flags in ("--moe-aux-loss-coeff 0.02", "--moe-aux-loss-coeff 0", "--moe-router-load-balancing-type none"):
        assert not any("router_aux_loss_coef" in note for note in make(f"{SHORT} {flags}", config).notes)
    assert not any("router_aux_loss_coef" in note for note in make(SHORT, config | {"router_aux_loss_coef": 0}).notes)


def test_noise_that_the_config_asks_for_is_not_passed_over() -> None:
    config = MIXTRAL_8X7B | {"router_jitter_noise": 0.01}
    line = "config.json has router_jitter_noise 0.01, noise in training that by itself has no effect here: --moe-input-jitter-eps"
    assert sum(note.startswith(line) for note in make(SHORT, config).notes) == 1
    assert not any("jitter" in note for note in make(f"{SHORT} --moe-input-jitter-eps 0", config).notes)
    assert not any("jitter" in note for note in make(SHORT, config | {"router_jitter_noise": 0.0}).notes)


def test_tied_embeddings_disagree() -> None:
    config = MixtralConfig(tie_word_embeddings=True).to_dict()
    with pytest.raises(
        ConfigError, match="the output head is no copy of the embedding; in the checkpoint ckpt it is not so"
    ):
        make(SHORT + " --untie-embeddings-and-output-weights", config)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--seq-length 40000", "--seq-length is 40000; .* at most 32768"),
        ("--recompute-method block", "needs --recompute-granularity full"),
        ("--split 0,0,0", "--split is 0.0,0.0,0.0"),
        ("--clip-grad -1", "--clip-grad is -1.0"),
        ("--keep-last -1", "--keep-last is -1"),
        ("--moe-router-load-balancing-type sinkhorn --moe-aux-loss-coeff 0.1", "balances by itself"),
        (
            "--moe-router-load-balancing-type sinkhorn --moe-router-force-load-balancing",
            "balances by itself: leave --moe-router-force",
        ),
        ("--lr-warmup-iters 10", "--lr-warmup-iters is 10"),
        ("--train-iters 0", "--train-iters is missing"),
    ],
)
def test_values_that_cannot_be_honoured(flags: str, message: str) -> None:
    with pytest.raises(MoeconvError, match=message):
        make(f"{SHORT} {flags}")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--moe-aux-loss 1", "unknown flag --moe-aux-loss; nearest: .*--moe-aux-loss-coeff"),
        ("--global_batch_sise 8", "unknown flag --global_batch_sise; nearest: --global-batch-size"),
        ("--frobnicate", r"unknown flag --frobnicate \(all flags"),
        ("--normalization LayerNorm", "--normalization is LayerNorm; .* give RMSNorm"),
        ("--bf16 --fp16", "--bf16 and --fp16 contradict each other"),
        ("--recompute-activations --recompute-granularity full", "contradict each other"),
        ("--recompute-modules nonsense", "'nonsense'; expected one of moe_act, layernorm, core_attn, moe"),
        ("--lr-decay-style cosines", "--lr-decay-style is 'cosines'; expected one of constant, linear"),
        ("--micro-batch-size two", "--micro-batch-size is 'two'; expected a whole number of at least 1"),
        ("--hidden-dropout 0.1", "--hidden-dropout is 0.1; the runtime trains without dropout: give 0"),
        ("--moe-shared-expert-overlap", "--moe-shared-expert-overlap: .* leave it out"),
        ("--vocab-file a --merge-file b", "--vocab-file: .* --tokenizer-model"),
        ("--seed", "--seed: expected one argument"),
    ],
)
def test_what_a_command_line_cannot_say(flags: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_flags(f"{SHORT} {flags}".split())


def test_switches_shorthands_and_lists() -> None:
    given = parse_flags(
        ["--bf16", "--no-load-optim", "--data", "a", "b", "--data", "c", "--split", "9,1", "--moe-token-dropping"]
    )
    assert given.values["train", "dtype"] == "bfloat16"
    assert given.values["checkpoint", "load_optim"] is False
    assert given.values["data", "data_path"] == ("c",)
    assert given.values["data", "split"] == (9.0, 1.0)
    assert given.values["moe", "capacity_factor"] == 1.0
    for line in (
        "--moe-token-dropping --moe-expert-capacity-factor 2",
        "--moe-expert-capacity-factor 2 --moe-token-dropping",
    ):
        assert parse_flags(line.split()).values["moe", "capacity_factor"] == 2.0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--swiglu", None),
        ("--disable-bias-linear", None),
        ("--group-query-attention", None),
        ("--moe-layer-freq 1", None),
        ("--moe-layer-freq [1]*32", None),
        ("--moe-layer-freq ([0]*1+[1]*31)", "--moe-layer-freq is 0111+; the checkpoint ckpt has 1111+"),
        ("--moe-layer-freq 1+x", "expected a number, or a pattern"),
        ("--qk-layernorm", "--qk-layernorm: query and key heads are normalised; in the checkpoint ckpt it is not so"),
        ("--add-qkv-bias", "--add-qkv-bias: .* not so: leave the flag out"),
        ("--moe-shared-expert-intermediate-size 64", "is 64; the checkpoint ckpt has 0"),
    ],
)  # fmt: skip
def test_what_flags_say_of_the_model_is_compared(flags: str, message: str | None) -> None:
    if message is None:
        make(f"{SHORT} {flags}")
        return
    with pytest.raises(ConfigError, match=message):
        make(f"{SHORT} {flags}")


@pytest.mark.parametrize("fact", FACTS, ids=lambda fact: fact.flag)
def test_whatever_a_flag_says_of_the_model_is_compared(fact: Fact) -> None:
    model = make(SHORT).model
    found = fact.of_model(model)
    wrong = {
        int: lambda: found + 1,
        float: lambda: found * 2,
        str: lambda: "2" if isinstance(found, tuple) else f"{found}s",
    }
    if fact.kind is bool and found == fact.says:
        make(f"{SHORT} {fact.flag}")
        return
    line = f"{SHORT} {fact.flag}" + ("" if fact.kind is bool else f" {wrong[fact.kind]()}")
    with pytest.raises(ConfigError, match=f"^{fact.flag}(:| is ).*checkpoint ckpt") as error:
        make(line)
    assert "leave the flag out" in str(error.value)
    if isinstance(found, int | float) and fact.kind is not bool:
        make(f"{SHORT} {fact.flag} {found}")


def test_heads_that_are_not_shared_disagree_with_grouped_queries() -> None:
    config = MixtralConfig(num_key_value_heads=32).to_dict()
    with pytest.raises(ConfigError, match="--group-query-attention: query heads share"):
        make(f"{SHORT} --group-query-attention", config)


@pytest.mark.parametrize(
    "flags",
    ["--moe-aux-loss-coeff 0.01", "--moe-token-dropping", "--moe-router-dtype fp64", "--moe-layer-recompute"],
)  # fmt: skip
def test_options_of_experts_are_refused_for_a_dense_model(flags: str) -> None:
    with pytest.raises(ConfigError, match=f"ckpt is a dense model .* {flags.split()[0]} can do nothing"):
        make(f"{SHORT} {flags}", LlamaConfig(num_hidden_layers=2).to_dict())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--load c --data t --train-iters 3 --save-interval 1", "--save-interval 1 does nothing here: it needs --save"),
        ("--load c --data t --train-iters 3 --keep-last 2", "--keep-last 2 does nothing here"),
        ("--load c --data t --train-iters 3 --no-save-optim", "--no-save-optim does nothing here"),
        (f"{SHORT} --recompute-num-layers 2", "--recompute-num-layers is 2 without --recompute-method block"),
        (f"{SHORT} --recompute-modules core_attn", "it needs --recompute-granularity selective"),
        (f"{SHORT} --eval-interval 5", "it needs --eval-iters"),
        (f"{SHORT} --fp8-recipe blockwise", "it needs --fp8-format"),
        (
            f"{SHORT} --moe-router-load-balancing-type none --moe-aux-loss-coeff 0.1",
            "--moe-router-load-balancing-type none has no loss to scale: leave --moe-aux-loss-coeff 0.1 out",
        ),
    ],
)
def test_flags_that_would_do_nothing_are_refused(line: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(line)


@pytest.mark.parametrize(
    "flag",
    [
        "--lr-wsd-decay-iters 5",
        "--initial-loss-scale 1024",
        "--lr-warmup-init 1e-6",
        "--sequence-parallel",
        "--pipeline-schedule gpipe",
        "--moe-aux-loss-mode switch",
        "--moe-token-dispatcher-type allgather",
    ],
)
def test_flags_that_merely_do_nothing_are_said(flag: str) -> None:
    notes = make(f"{SHORT} {flag}").notes
    assert any(note.startswith(flag.split()[0]) and "no effect here (it needs " in note for note in notes), notes


def test_samples_instead_of_iterations() -> None:
    samples = "--train-samples 1000 --global-batch-size 64 --lr-warmup-samples 100 --lr-decay-samples 500 --lr 1"
    run = make(f"--load c --data t --save s {samples}")
    assert run.train.num_steps == 15
    assert run.schedule.unit == "samples"
    assert [run.schedule.lr(done) for done in (0, 50, 100, 300, 500)] == [0, 0.5, 1, 0.5, 0]
    for flags, message in (
        ("--lr-warmup-iters 5", "--lr-warmup-iters is 5 in a run that counts in samples .* give --lr-warmup-samples"),
        ("--train-iters 3", "--train-iters and --train-samples both say how long"),
    ):
        with pytest.raises(ConfigError, match=message):
            make(f"--load c --data t --save s --train-samples 1000 --global-batch-size 64 {flags}")
    with pytest.raises(ConfigError, match="--global-batch-size is not given"):
        make("--load c --data t --save s --train-samples 1000")


def test_megatrons_present_script() -> None:
    run = make(MEGATRON)
    judge(run, 32)
    assert {note.split(":")[0] for note in run.notes} >= {"--overlap-grad-reduce", "--overlap-param-gather"}
    assert (run.parallel.pp, run.parallel.ep, run.train.seq_length) == (4, 8, 4096)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"model_type": "gpt2"}, "gpt2"),
        ({"num_local_experts": None, "num_experts_per_tok": 9}, "num_local_experts"),
        ({"rope_parameters": {"rope_type": "spiral"}}, "rope_type is 'spiral'"),
        ({"attention_dropout": 0.1}, "attention_dropout = 0.1"),
        ({"num_key_value_heads": 5}, "not a multiple of num_key_value_heads 5"),
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
