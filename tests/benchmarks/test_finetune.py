"""The benchmark of finetuning, with a tiny model on a CPU: what it prints must be true."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path

import pytest
import torch

from benchmarks.finetune import MODELS, SECTIONS, Case, config_of, lines, main, parse
from benchmarks.finetune_rank import Spec, read_run
from moeconv.families import family_of
from moeconv.families.base import Model
from runtime.fp8.config import Fp8Config
from runtime.job.processes import Process
from runtime.loading import build_engine
from runtime.parallel.mesh import ParallelMesh

FLAGS = "--seq-length 32 --global-batch-size 4 --bf16 --moments-dtype bfloat16"


def test_a_case_is_measured_saved_and_taken_up(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["--model", "tiny", "--steps", "1", "--json", "--profile-to", str(tmp_path)]
    words += ["--save-and-resume", FLAGS, "--", *FLAGS.split()]
    assert main([*words, "--optimizer-cpu-offload"]) == 0
    found = json.loads(capsys.readouterr().out)
    count = sum(tensor.size for tensor in Model.from_config(family_of(MODELS["tiny"]), MODELS["tiny"]).tensors.values())
    assert found["tokens"] == 4 * 32
    assert found["tokens_per_second"] == pytest.approx(1e3 * found["tokens"] / found["ms"])
    assert found["pinned_gb"] * 1e9 == pytest.approx(8 * count, rel=0.05)  # and the padding of buckets
    assert found["saved_gb"] * 1e9 == 10 * count
    assert found["resumed"]["equal"]
    assert found["resumed"]["pinned_gb"] == 0
    profile = next(tmp_path.iterdir()).read_text()
    for what in ("ms of kernels" if found["device"] != "CPU" else "no GPU", " x _RMSNormBackward\n", " forward\n"):
        assert what in profile, profile
    told = "\n".join(lines(Case(**found["case"]), found))
    assert "a copy on the host" in told
    assert "equal bit for bit" in told


def test_models_have_their_published_sizes() -> None:
    for name, size in (("mixtral-8x7b", 46.70e9), ("qwen3-30b-a3b", 30.53e9)):
        model = Model.from_config(family_of(MODELS[name]), config_of(Case(name="", model=name, flags="")))
        assert sum(tensor.size for tensor in model.tensors.values()) == pytest.approx(size, rel=1e-3)


def test_the_engine_is_built_by_all_settings() -> None:
    flags = f"{FLAGS} --lora-rank 2 --recompute-granularity full"
    run = read_run(Spec(config=MODELS["tiny"], flags=shlex.split(flags), steps=1, folder="none"), Process(world_size=1))
    run = dataclasses.replace(run, fp8=Fp8Config(format="hybrid"))  # which no flag gives without a GPU
    context = build_engine(run, ParallelMesh(run.parallel, 1), torch.device("cpu")).context
    assert context.fp8 is not None
    assert context.lora == run.lora
    assert context.recompute == run.recompute
    assert context.moe == run.moe
    assert context.dtype == torch.bfloat16


SPREAD = [case for cases in SECTIONS.values() for case in cases if case.ranks > 1]


@pytest.mark.parametrize("case", SPREAD, ids=lambda case: case.name)
def test_the_trainer_takes_the_flags_of_cases_on_several_gpus(case: Case) -> None:
    for flags in (case.flags, case.beside, case.save_and_resume):
        if flags is not None:
            spec = Spec(config=config_of(case), flags=shlex.split(flags), steps=1, folder="none")
            run = read_run(spec, Process(world_size=case.ranks))
            assert run.train.global_batch_size % (case.ranks // run.parallel.tp // run.parallel.pp) == 0


def test_sections_and_own_cases_are_read() -> None:
    assert parse([])[1] == [case for cases in SECTIONS.values() for case in cases]
    own = parse(["--model", "tiny", "--layers", "3", "--", "--bf16", "--lora-rank", "4"])[1]
    assert [(case.flags, case.layers) for case in own] == [("--bf16 --lora-rank 4", 3)]
    with pytest.raises(SystemExit):
        parse(["--", "--bf16"])
