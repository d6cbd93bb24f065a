"""Batch sizes that ramp up, against Megatron-Core's calculator."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

from runtime.errors import ConfigError
from runtime.settings.batch_sizes import BatchSizes
from runtime.settings.check import check_microbatches
from tests.runtime.settings.lines import make

RAMPS = [(64, (16, 16, 1000), 5000), (96, (8, 8, 333), 700), (40, (4, 12, 97), 4000), (512, (32, 32, 7), 3000)]
LINE = "--load c --data t --save s --train-samples 4000 --global-batch-size 64"


@pytest.fixture(scope="module")
def megatron() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.num_microbatches_calculator import RampupBatchsizeNumMicroBatchesCalculator
    return RampupBatchsizeNumMicroBatchesCalculator


@pytest.mark.parametrize(("full", "ramp", "samples"), RAMPS)
def test_each_step_is_as_large_as_megatrons(megatron: Any, full: int, ramp: tuple[int, ...], samples: int) -> None:
    theirs = megatron(full, 2, 2, False, 0, *ramp)
    ours = BatchSizes.ramp(full, ramp)
    consumed, sizes = 0, []
    while consumed <= samples:
        theirs.update(consumed, consistency_check=True)
        assert ours.at(consumed) == theirs.get_current_global_batch_size(), consumed
        sizes.append(ours.at(consumed))
        consumed += sizes[-1]
        assert ours.consumed(len(sizes)) == consumed
    assert sizes[0] == ramp[0]
    assert sizes[-1] == full
    assert set(sizes) <= set(ours.all())


def steps_of_megatron(theirs: Any, full: int, end: int, samples: int) -> int:
    """Megatron's own count: the ramp step by step, then whole batches (update_train_iters)."""
    consumed = count = 0
    while consumed <= end and consumed <= samples:
        theirs.update(consumed, consistency_check=False)
        consumed += theirs.get_current_global_batch_size()
        count += 1
    return count + (max(samples - consumed, 0) // full)


@pytest.mark.parametrize(("full", "ramp", "samples"), RAMPS)
def test_a_run_has_as_many_steps_as_megatrons(megatron: Any, full: int, ramp: tuple[int, ...], samples: int) -> None:
    count, consumed = BatchSizes.ramp(full, ramp).steps(samples)
    assert count == steps_of_megatron(megatron(full, 2, 2, False, 0, *ramp), full, ramp[2], samples)
    assert consumed == BatchSizes.ramp(full, ramp).consumed(count)


def test_a_constant_size_is_the_whole_of_it() -> None:
    sizes = BatchSizes.ramp(8, ())
    assert [*sizes.all()] == [8]
    assert (sizes.at(0), sizes.at(10**9), sizes.steps(83), sizes.consumed(7)) == (8, 8, (10, 80), 56)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--rampup-batch-size 16 16", "expected three numbers, START INCREMENT SAMPLES"),
        ("--rampup-batch-size 16 20 100", "the way from 16 to 64 is no whole number of steps of 20"),
        ("--rampup-batch-size 64 16 100", "a START below the global batch size"),
        ("--rampup-batch-size 0 16 100", "is at least 1"),
        ("--rampup-batch-size 18 2 100", "a global batch of 18, which --rampup-batch-size 18 2 100 comes to, is not"),
        ("--rampup-batch-size 16 4 100 --pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2",
         "--global-batch-size 20 makes 5 micro-batches .* multiple of 8, --rampup-batch-size included"),
    ],
)  # fmt: skip
def test_ramps_that_lead_nowhere(flags: str, message: str) -> None:
    def judge() -> None:
        run = make(f"{LINE} {flags}")
        check_microbatches(run.parallel, run.train, 8 if "pipeline" in flags else 4)

    with pytest.raises(ConfigError, match=message):
        judge()


def test_a_ramp_counts_in_samples() -> None:
    with pytest.raises(ConfigError, match="--rampup-batch-size needs a run that counts in samples"):
        make("--load c --data t --save s --train-iters 10 --global-batch-size 64 --rampup-batch-size 16 16 100")
