"""What a run says of itself before and after, and the runs that it refuses."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from moeconv.families import FAMILIES
from moeconv.families.base import Model
from runtime import start
from runtime.errors import ConfigError
from runtime.estimate.forecast import Forecast, Gpu, Measured
from runtime.job.processes import Process
from runtime.settings.assemble import make_run
from runtime.settings.check import check_run
from runtime.settings.flags import parse_flags
from runtime.settings.run import RunConfig

H100 = Gpu("NVIDIA H100 80GB HBM3", 84_900_000_000, 8)
CONFIG = {
    "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000, "num_local_experts": 8,
    "num_experts_per_tok": 2, "torch_dtype": "bfloat16", "max_position_embeddings": 4096,
}  # fmt: skip


def run_of(flags: str, layers: int = 32) -> RunConfig:
    model = Model.from_config(FAMILIES["mixtral"], CONFIG | {"num_hidden_layers": layers})
    line = f"--load model --mock-data --train-iters 9 --seq-length 4096 {flags}"
    return make_run(parse_flags(line.split()), model, Path("model"))


def test_a_run_that_fits_says_what_it_will_take() -> None:
    forecast = Forecast(run_of("--micro-batch-size 2 --global-batch-size 16", 2), 1, H100)
    forecast.check()
    found = re.search(r"plan: ([\d.]+) GB at the peak of 84.9 GB .*, ([\d,]+) ms a step", forecast.line())
    assert found is not None
    # docs/performance/training-step.md: 56.2 GiB and 688.5 ms.
    assert float(found[1]) == pytest.approx(56.2 * 1.0737, rel=0.05)
    assert float(found[2].replace(",", "")) == pytest.approx(688.5, rel=0.1)


def test_what_was_measured_stands_beside_it() -> None:
    forecast = Forecast(run_of("--micro-batch-size 2 --global-batch-size 16", 2), 1, H100)
    text = forecast.outcome(Measured([9.0, 0.9, 0.70, 0.72, 0.71], 60_000_000_000))
    assert "measured: 60.0 GB at the peak" in text
    assert "710 ms a step (median) where" in text
    assert forecast.outcome(Measured([9.0], 1)) == ""
    assert text.endswith(")"), "without expert parallelism there is nothing to wait for"
    apart = Forecast(
        run_of("--global-batch-size 16 --expert-model-parallel-size 2 --use-distributed-optimizer", 2), 2, H100
    )
    text = apart.outcome(Measured([1.0] * 3, 60_000_000_000, [1.5, 1.3, 1.4]))
    assert text.endswith("; the fullest rank of experts had 1.40 of the mean's rows where 1.05 were expected")


def test_an_unknown_gpu_has_no_time() -> None:
    forecast = Forecast(run_of("", 2), 1, Gpu("NVIDIA RTX 9000", 100_000_000_000, 1))
    assert "GB at the peak" in forecast.line()
    assert "ms a step" not in forecast.line()


def test_state_that_does_not_fit_is_refused_with_what_would() -> None:
    run = run_of("--expert-model-parallel-size 8 --global-batch-size 64 --use-distributed-optimizer")
    with pytest.raises(ConfigError, match=r"dp16 ep8 needs .* GB of each GPU for weights") as caught:
        Forecast(run, 16, Gpu(H100.name, 40_000_000_000, 8)).check()
    proposed = str(caught.value).split("This fits: ")[1]
    assert "--master-weights remainder --moments-dtype bfloat16" in proposed
    assert "--optimizer-cpu-offload" not in proposed, "what loses nothing is enough"
    with pytest.raises(ConfigError, match="No layout of 16 such GPUs fits"):
        Forecast(run, 16, Gpu(H100.name, 28_000_000_000, 8, host=50_000_000_000)).check()
    with pytest.raises(ConfigError, match=r"This fits: .* --master-weights remainder .* --optimizer-cpu-offload"):
        Forecast(run, 16, Gpu(H100.name, 28_000_000_000, 8)).check()
    alone = run_of("--global-batch-size 64")
    with pytest.raises(ConfigError) as caught:
        Forecast(alone, 64, H100).check()
    flags = str(caught.value).split("This fits: ")[1]
    better = run_of(flags.replace("--seq-length 4096 ", ""))
    check_run(better, 64)
    Forecast(better, 64, H100).check()
    assert "MORE THAN FITS" not in Forecast(better, 64, H100).line()


def test_state_that_the_host_has_no_room_for_is_refused() -> None:
    flags = "--expert-model-parallel-size 4 --tensor-model-parallel-size 2 --sequence-parallel --expert-tensor-parallel-size 1"
    flags += " --use-distributed-optimizer --moments-dtype bfloat16 --recompute-granularity full --global-batch-size 32"
    run = run_of(f"{flags} --optimizer-cpu-offload")
    enough = Forecast(run, 4, Gpu(H100.name, H100.memory, 4, host=400_000_000_000))
    enough.check()
    assert "and 373.6 GB of the machine's memory" in enough.line()  # 8 bytes of 46.7 G parameters
    with pytest.raises(
        ConfigError, match=r"offload keeps 373.6 GB of 4 ranks .* of which 350.0 GB are free: otherwise"
    ):
        Forecast(run, 4, Gpu(H100.name, H100.memory, 4, host=350_000_000_000)).check()
    large = Gpu(H100.name, 140_000_000_000, 4, host=300_000_000_000)
    with pytest.raises(ConfigError, match=r"--optimizer-offload-fraction 0\.\d+ keeps the rest") as caught:
        Forecast(run, 4, large).check()
    share = str(caught.value).split("--optimizer-offload-fraction ")[1].split()[0]
    obeyed = Forecast(run_of(f"{flags} --optimizer-cpu-offload --optimizer-offload-fraction {share}"), 4, large)
    obeyed.check()
    assert "MORE THAN FITS" not in obeyed.line()
    Forecast(run, 4, Gpu(H100.name, H100.memory, 2, host=350_000_000_000)).check()  # two machines
    fraction = run_of(f"{flags} --optimizer-cpu-offload --optimizer-offload-fraction 0.9")
    Forecast(fraction, 4, Gpu(H100.name, H100.memory, 4, host=350_000_000_000)).check()


def test_a_run_on_cpus_has_no_plan_and_one_on_gpus_is_asked_for_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    process = Process(rank=0, local_rank=0, world_size=1)
    run = run_of("", 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert start.expect(run, process) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    properties = SimpleNamespace(name=H100.name, total_memory=H100.memory)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    found = start.expect(run, process)
    assert found is not None
    assert "of 84.9 GB" in found.line()
