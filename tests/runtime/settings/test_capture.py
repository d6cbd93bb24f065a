"""Which runs replay their micro-batches as CUDA graphs, and what is said of those that can't."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from runtime.errors import ConfigError
from runtime.model.lora import LoraConfig
from runtime.model.targets import adapt
from runtime.settings.capture import captures, describe_capture, obstacle
from runtime.settings.check import check_run
from runtime.settings.run import RunConfig
from tests.runtime.settings.lines import SHORT, make

GPU, CPU = torch.device("cuda"), torch.device("cpu")


def adapted(run: RunConfig) -> RunConfig:
    return replace(run, model=adapt(run.model, LoraConfig(rank=4)))


@pytest.mark.parametrize(
    ("flags", "world", "why"),
    [
        ("--bf16", 1, None),
        ("--bf16 --recompute-granularity full --moe-layer-recompute", 1, None),
        ("--fp64", 1, "--dtype float64: the host reads how many rows"),
        ("--fp32", 1, "--dtype float32: the host reads how many rows"),
        (
            "--bf16 --moe-grouped-gemm-backend grouped_gemm",
            1,
            "--moe-grouped-gemm-backend grouped_gemm: the host reads",
        ),
        ("--bf16 --optimizer-cpu-offload", 1, "--optimizer-cpu-offload"),
        ("--bf16 --offload-activations mlp", 1, "--offload-activations mlp"),
        ("--bf16 --moe-input-jitter-eps 0.1", 1, "--moe-input-jitter-eps 0.1"),
        ("--bf16", 2, None),
        ("--bf16 --tensor-model-parallel-size 2", 2, None),
        ("--bf16 --pipeline-model-parallel-size 2 --expert-model-parallel-size 2", 4, "with --pipeline-model"),
        (
            "--bf16 --expert-model-parallel-size 2 --moe-token-dispatcher-type allgather",
            2,
            "--moe-token-dispatcher-type allgather: the host reads",
        ),
        (
            "--bf16 --expert-model-parallel-size 2 --moe-router-load-balancing-type expert_choice",
            2,
            "expert_choice: the host reads",
        ),
        ("--bf16 --fully-shard", 2, "with --fully-shard"),
        ("--bf16 --expert-model-parallel-size 2", 2, None),
        ("--bf16 --expert-model-parallel-size 2 --tensor-model-parallel-size 2 --sequence-parallel", 4, None),
    ],
)
def test_what_stands_against_graphs(flags: str, world: int, why: str | None) -> None:
    run = make(f"{SHORT} {flags}")
    found = obstacle(run, world)
    assert (found is None) if why is None else (found is not None and why in found)
    assert captures(run, world, GPU) == (why is None)
    assert not captures(run, world, CPU)
    asked = make(f"{SHORT} {flags} --enable-cuda-graph")
    if why is None:
        check_run(asked, world)
    else:
        with pytest.raises(
            ConfigError, match=r"--cuda-graph-impl local: .*; leave that out, or take --cuda-graph-impl auto"
        ):
            check_run(asked, world)
    assert not captures(make(f"{SHORT} {flags} --cuda-graph-impl none"), world, GPU)


def test_fp8_has_graphs() -> None:
    for recipe in ("tensorwise", "delayed", "blockwise"):
        assert obstacle(make(f"{SHORT} --bf16 --fp8-format hybrid --fp8-recipe {recipe}"), 1) is None


def test_replicas_with_adapters_have_graphs() -> None:
    run = adapted(make(f"{SHORT} --bf16"))
    assert obstacle(run, 4) is None
    assert describe_capture(run, 4, GPU) == ["micro-batches are replayed as CUDA graphs"]
    assert describe_capture(run, 4, CPU) == []
    counted = adapted(make(f"{SHORT} --bf16 --moe-router-load-balancing-type global_aux_loss --moe-aux-loss-coeff 0.1"))
    assert "global_aux_loss" in (obstacle(counted, 4) or "")
    assert obstacle(counted, 1) is None
