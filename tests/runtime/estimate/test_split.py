"""The layers of pipeline stages: level, chosen where nobody says them, and the same in a plan and in a run."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from torch.distributed import HashStore

from cli.main import main
from moeconv.families import FAMILIES
from moeconv.families.base import Model
from moeconv.layout.degrees import Degrees
from runtime import start
from runtime.estimate.forecast import Forecast, Gpu
from runtime.estimate.split import LEAST_GAIN, balance
from runtime.estimate.stages import level_stages, same_stages
from runtime.job.processes import Process
from runtime.settings.assemble import make_run
from runtime.settings.check import check_run
from runtime.settings.flags import parse_flags
from runtime.settings.resolved import run_file
from runtime.settings.run import RunConfig

H100 = Gpu("NVIDIA H100 80GB HBM3", 85_000_000_000, 8)
CONFIG = {
    "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 2048, "intermediate_size": 6144,
    "moe_intermediate_size": 768, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4,
    "head_dim": 128, "vocab_size": 151936, "num_experts": 128, "num_experts_per_tok": 8, "torch_dtype": "bfloat16",
    "max_position_embeddings": 40960,
}  # fmt: skip
WORLD = 64
STEP = "--seq-length 4096 --micro-batch-size 4 --global-batch-size 1024 --use-distributed-optimizer"
PP4 = f"{STEP} --pipeline-model-parallel-size 4 --expert-model-parallel-size 8 --recompute-granularity full"


def run_of(flags: str, layers: int = 48) -> RunConfig:
    model = Model.from_config(FAMILIES["qwen3_moe"], CONFIG | {"num_hidden_layers": layers})
    run = make_run(parse_flags(f"--load model --mock-data --train-iters 9 {flags}".split()), model, Path("model"))
    check_run(run, WORLD)
    return run


def stages_of(run: RunConfig) -> tuple[int, ...] | None:
    return run.parallel.pp_layers


def splits(layers: int, stages: int) -> Iterator[tuple[int, ...]]:
    """All splits of so many layers."""
    for cuts in itertools.combinations(range(1, layers), stages - 1):
        yield tuple(b - a for a, b in itertools.pairwise((0, *cuts, layers)))


@pytest.mark.parametrize(("layers", "pp", "vpp"), [(9, 3, 1), (12, 4, 1), (12, 2, 3), (10, 5, 1), (8, 2, 2)])
@pytest.mark.parametrize("head", [0, 40, 101, 230, 555])
def test_no_split_has_a_faster_slowest_rank(layers: int, pp: int, vpp: int, head: int) -> None:
    def seconds(start: int, stop: int) -> int:
        return 100 * (stop - start) + 7 * (start == 0) + head * (stop == layers)

    def slowest(counts: tuple[int, ...]) -> int:
        stops = [0, *itertools.accumulate(counts)]
        stages = [seconds(start, stop) for start, stop in itertools.pairwise(stops)]
        return max(sum(stages[rank::pp]) for rank in range(pp))

    even = tuple(layers // (pp * vpp) + (n < layers % (pp * vpp)) for n in range(pp * vpp))
    found = balance(even, seconds, pp)
    assert sum(found) == layers
    assert min(found) >= 1
    assert slowest(found) == min(map(slowest, splits(layers, pp * vpp)))


def test_a_large_head_is_levelled_and_the_log_says_so() -> None:
    run = level_stages(run_of(PP4), WORLD, H100, None)
    counts = stages_of(run)
    assert counts is not None
    assert sum(counts) == 48
    assert counts[-1] < 12 <= min(counts[:-1])
    assert f"--pp-layers {','.join(map(str, counts))} is taken, about" in run.notes[-1]
    assert "less time a step than 12,12,12,12: final norm, head and loss take the time of 2." in run.notes[-1]
    check_run(run, WORLD)
    took = Forecast(run, WORLD, H100)._estimate.seconds
    assert took < (1 - LEAST_GAIN) * Forecast(run_of(PP4), WORLD, H100)._estimate.seconds


@pytest.mark.parametrize(
    "more", ["", "--num-virtual-stages-per-pipeline-rank 2", "--pipeline-schedule zero-bubble", "--fully-shard"]
)
def test_a_plan_says_what_a_run_does(more: str, tmp_path: Path) -> None:
    flags = PP4 if more != "--fully-shard" else PP4.replace("--use-distributed-optimizer", "")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    run = level_stages(run_of(f"{flags} {more}"), WORLD, H100, None)
    words = ["plan", str(tmp_path), "--gpus", str(WORLD), *flags.split(), *more.split()]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    planned = next(line for line in result.output.splitlines() if line.startswith("flags: "))
    pasted = run_of(planned.removeprefix("flags: "))
    assert stages_of(run) is not None
    assert stages_of(pasted) == stages_of(run)
    assert run.notes[-1] in result.output
    assert level_stages(pasted, WORLD, H100, None).notes == pasted.notes, "what was planned is as level as it gets"


def test_who_says_the_layers_of_a_stage_has_them() -> None:
    even = level_stages(run_of(f"{PP4} --pp-layers 12,12,12,12"), WORLD, H100, None)
    assert stages_of(even) == (12, 12, 12, 12)
    assert "would take about" in even.notes[-1]
    virtual = level_stages(run_of(f"{PP4} --num-layers-per-virtual-pipeline-stage 6"), WORLD, H100, None)
    assert stages_of(virtual) is None
    assert virtual.parallel.vpp == 2


@pytest.mark.parametrize("gpu", [None, replace(H100, name="NVIDIA RTX 9000")])
def test_stages_are_even_where_the_gpu_is_not_known(gpu: Gpu | None) -> None:
    assert level_stages(run_of(PP4), WORLD, gpu, None) == run_of(PP4)


def test_a_run_keeps_its_split() -> None:
    run = run_of(PP4)
    kept = level_stages(run, WORLD, None, Degrees(pp=4, ep=8, pp_layers=(13, 13, 13, 9)))
    assert stages_of(kept) == (13, 13, 13, 9)
    begun_even = level_stages(run, WORLD, H100, Degrees(pp=4, ep=8))
    assert stages_of(begun_even) is None
    assert "would take about" in begun_even.notes[-1]
    assert stages_of(level_stages(run, WORLD, H100, Degrees(pp=2, pp_layers=(25, 23)))) == stages_of(
        level_stages(run, WORLD, H100, None)
    ), "under other degrees it is chosen anew"


def test_memory_comes_first() -> None:
    """A split that needs a GPU's last memory, or more than it has, is not taken."""
    flags = PP4.replace("parallel-size 4", "parallel-size 2").replace("--recompute-granularity full", "")
    run = run_of(flags, layers=16)
    estimate = Forecast(run, WORLD, H100)._estimate
    assert stages_of(level_stages(run, WORLD, H100, None)) == (9, 7)
    more = estimate.split((9, 7)).peak
    assert more > estimate.peak, "the first stage is the fullest, and has one more"
    full = replace(H100, memory=int(1.01 * more + estimate.machine.reserve_gib * 2**30))
    assert stages_of(level_stages(run, WORLD, full, None)) is None


def test_a_start_on_gpus_takes_the_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the command line on: the log, the file that starts the run again, and the forecast have it."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": 6}))
    words = (
        f"--init-config {tmp_path / 'config.json'} --mock-data --tokenizer-type NullTokenizer --train-iters 12 --bf16"
    )
    words += " --seq-length 4096 --micro-batch-size 2 --global-batch-size 32 --pipeline-model-parallel-size 2"
    monkeypatch.setattr(start, "gpu_of", lambda run, process: H100)
    run, _ = start.prepare(parse_flags(words.split()), Process(rank=1, local_rank=1, world_size=2))
    assert stages_of(run) == (4, 2)
    assert any(note.startswith("--pp-layers 4,2 is taken, about") for note in run.notes)
    assert any(note.startswith("plan: ") for note in run.notes)
    assert "pp-layers: [4, 2]" in run_file(run)


def test_all_ranks_take_the_first_ones_split() -> None:
    store, run = HashStore(), run_of(PP4)
    first = level_stages(run, WORLD, H100, None)

    def of_rank(rank: int, own: RunConfig) -> Callable[[], RunConfig]:
        return lambda: same_stages(own, Process(rank=rank, local_rank=rank, world_size=2), store)

    with ThreadPoolExecutor(2) as threads:
        second = threads.submit(of_rank(1, run))
        assert threads.submit(of_rank(0, first)).result() == first
        assert stages_of(second.result(timeout=10)) == stages_of(first)
