"""For all tests: one pool of ranks, and Triton's interpreter where there is no GPU, which it decides when it is first imported."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from runtime.parity.ranks import RankPool

if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session", autouse=True)
def _cudnn_of_torch() -> None:
    """Load torch's cuDNN first, for tests that import Transformer Engine themselves."""
    if shutil.which("nvidia-smi") is not None:
        import torch

        from runtime.kernels.transformer_engine import load_cudnn

        if torch.cuda.is_available():
            load_cudnn()


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    """Ranks for every test that wants some: they import nothing. A case that is to end ranks needs a pool of its own."""
    from tests.support.ranks import make_pool

    pool = make_pool(8)
    yield pool
    pool.close()


# The files that take longest, in that order: with two workers, what is begun last should be short.
LONGEST = (
    "runtime/parallel/test_parity.py",
    "runtime/train/test_runs.py",
    "megatron/test_training.py",
    "runtime/kernels/test_kernels.py",
    "benchmarks/test_multi_gpu.py",
    "megatron/test_families.py",
    "cli/test_train.py",
    "docs/test_commands.py",
    "megatron/test_megatron_core.py",
    "runtime/checkpoint/test_resume.py",
    "megatron/test_atomic.py",
    "megatron/test_round_trips.py",
    "runtime/estimate/test_calibrate.py",
    "cli/test_eval.py",
    "runtime/kernels/test_ops.py",
    "runtime/parallel/test_fp8.py",
    "docs/test_tutorial.py",
    "fuzz/test_configs.py",
    "runtime/checkpoint/test_kills.py",
    "runtime/parallel/test_resume.py",
    "runtime/parallel/test_drawn.py",
    "moeconv/test_atomic.py",
    "cli/test_hub.py",
    "cli/test_generate.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))
