"""The judge of a run: refusals name the flag, its value and what fits, before anything is allocated."""

from __future__ import annotations

import pytest
from transformers import LlamaConfig

from moeconv.errors import MoeconvError
from runtime.errors import ConfigError
from tests.runtime.settings.lines import SHORT, judge, make

TP, PP, VPP = (
    "--tensor-model-parallel-size",
    "--pipeline-model-parallel-size",
    "--num-virtual-stages-per-pipeline-rank",
)
EP, ETP, CP = "--expert-model-parallel-size", "--expert-tensor-parallel-size", "--context-parallel-size"
OVERLAP = f"{EP} 2 --overlap-moe-expert-parallel-comm"


@pytest.mark.parametrize(
    ("world", "flags", "message"),
    [
        (4, f"{TP} 3", f"{TP} 3 .* world size 4; .* fit: 1, 2, 4"),
        (3, f"{TP} 3", f"{TP} 3: 32 attention heads .* fit: 1, 2, 4, 8, 16, 32"),
        (4, f"{EP} 8", f"{EP} 8 .* world size 4"),
        (3, f"{EP} 3", f"{EP} 3: 8 experts .* fit: 1, 2, 4, 8"),
        (3, f"{ETP} 3", f"{ETP} 3: an expert's width of 14336 .*{ETP} defaults to {TP}"),
        (4, f"{TP} 2 {EP} 2", f"{EP} 2 and {TP} 2: .* need --sequence-parallel"),
        (3, f"{PP} 3", "32 layers don't divide over pp 3 .*--pp-layers, for example 11,11,10"),
        (2, f"{PP} 2 --pp-layers 10,10", "--pp-layers 10,10 adds up to 20"),
        (2, f"{PP} 2 --pp-layers 8,8,16", "--pp-layers 8,8,16: expected 2 numbers"),
        (1, f"{VPP} 2", f"{VPP} 2 with {PP} 1: virtual stages need a pipeline; give {PP} 2 or more, or {VPP} 1"),
        (2, f"{PP} 2 {VPP} 2 --pipeline-schedule 1f1b", f"--pipeline-schedule 1f1b with {VPP} 2"),
        (2, f"{PP} 2 {VPP} 2 --global-batch-size 3", f"makes 3 micro-batches .* multiple of {PP} 2: .* multiple of 2"),
        (2, f"{CP} 2 --seq-length 1002", "--seq-length is 1002; .* multiple of 4: 1000 fits"),
        (2, "--global-batch-size 5", "--global-batch-size 5 .* data-parallel degree 2; take a multiple of 2"),
        # The engine used to be the first to notice these, after the ranks had met.
        (
            2,
            f"{PP} 2 --moe-aux-loss-mode hf --moe-aux-loss-coeff 0.01",
            f"--moe-aux-loss-mode hf .* needs {PP}, {TP} and {CP} 1, here they are 2, 1 and 1",
        ),
        (2, f"{TP} 2 --tp-comm-overlap", f"--tp-comm-overlap with {TP} 2 and without --sequence-parallel: .* leave it out"),
        (2, "--sequence-parallel --tp-comm-overlap", f"{TP} 1 and --sequence-parallel: .* give {TP} 2 or more"),
        (2, f"{PP} 2 --fully-shard --pipeline-schedule zero-bubble", "--fully-shard with --pipeline-schedule zero-bubble"),
        (2, f"{OVERLAP} --global-batch-size 2", f"{OVERLAP.split()[-1]}: --global-batch-size 2 makes one micro-batch a step, .* multiple of 4"),
        (4, f"{OVERLAP} {PP} 2", f"{OVERLAP.split()[-1]} with {PP} 2"),
        (4, f"{OVERLAP} --fully-shard", f"{OVERLAP.split()[-1]} with --fully-shard: .* take --use-distributed-optimizer"),
        (2, f"{OVERLAP} --moe-token-dispatcher-type allgather", "--moe-token-dispatcher-type allgather has none; take alltoall"),
        (2, f"{OVERLAP} --moe-layer-recompute", "--moe-layer-recompute .* take --recompute-granularity full"),
        (2, f"{OVERLAP} --offload-activations mlp", f"{OVERLAP.split()[-1]} with --offload-activations mlp"),
        (2, f"{OVERLAP} --moe-aux-loss-mode hf --moe-aux-loss-coeff 0.01", "hf, which pools .* take --moe-aux-loss-mode megatron"),
        (1, "--master-weights remainder --fp16", "--master-weights remainder keeps .* weights are float16; fp16 has another"),
        (1, "--master-weights remainder --fp32", "weights are float32; these weights are their own masters: train with --bf16"),
        (1, "--grad-reduce-in-bf16 --fp16", "--main-grads-dtype bf16 is of bf16 weights, and these are float16"),
        (1, "--master-weights remainder --bf16 --optimizer muon", "--optimizer muon with --master-weights remainder"),
        (1, "--fp8-format hybrid", "--fp8-format is hybrid; FP8 needs a GPU"),
    ],
)  # fmt: skip
def test_refusals_name_the_flag_its_value_and_what_fits(world: int, flags: str, message: str) -> None:
    run = make(f"{SHORT} {flags}")
    with pytest.raises(MoeconvError, match=message) as error:
        judge(run, world)
    assert not any(option in str(error.value).split() for option in ("--tp", "--pp", "--ep", "--etp", "--vpp"))


def test_dense_models_have_no_experts_to_divide() -> None:
    config = LlamaConfig().to_dict()
    run = make(f"{SHORT} {EP} 2", config)
    with pytest.raises(ConfigError, match=f"{EP} 2: a Llama model has no experts"):
        judge(run, 2)


def test_uneven_stages_and_shared_kv_heads_are_fine() -> None:
    judge(make(f"{SHORT} {PP} 4 --pp-layers 9,8,8,7"), 4)
    judge(make(f"{SHORT} {PP} 2 --pp-layers 20 12"), 2)
    judge(make(f"{SHORT} {TP} 16"), 16)


def test_virtual_stages_may_be_given_by_their_layers() -> None:
    run = make(f"{SHORT} {PP} 4 --num-layers-per-virtual-pipeline-stage 2 --global-batch-size 4")
    judge(run, 4)
    assert (run.parallel.vpp, run.parallel.pp_schedule) == (4, "interleaved")
    with pytest.raises(ConfigError, match="32 layers of ckpt are no multiple of 12"):
        make(f"{SHORT} {PP} 4 --num-layers-per-virtual-pipeline-stage 3")
    with pytest.raises(ConfigError, match=f"makes 4 virtual stages a rank, and {VPP} says 2"):
        make(f"{SHORT} {PP} 4 --num-layers-per-virtual-pipeline-stage 2 {VPP} 2")
