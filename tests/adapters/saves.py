"""Tiny models with random adapters: as a run saves them, and as peft does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moeconv.adapters.identity import fingerprint
from moeconv.checkpoint import Checkpoint, open_checkpoint
from moeconv.families.adapted import AdaptedModel
from moeconv.layout.rect import Rect
from runtime.checkpoint.adapters import over, source_of_saves
from runtime.checkpoint.position import TrainerState
from runtime.checkpoint.rank_files import collect_files, commit_checkpoint
from runtime.checkpoint.writer import Saver, check
from runtime.engine import Engine
from runtime.model.lora import LoraConfig
from runtime.model.recompute import RecomputeConfig
from runtime.model.targets import adapt
from runtime.moe.config import MoEConfig
from runtime.optim.config import OptimConfig
from runtime.parallel.degrees import ParallelConfig
from runtime.parallel.mesh import ParallelMesh
from tests.upcycle.hub import make_folder

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass
class Trained:
    """A base, an engine with adapters on it, and the save that it wrote."""

    base: Checkpoint
    config: LoraConfig
    engine: Engine
    save: Path

    @property
    def opened(self) -> Checkpoint:
        return open_checkpoint(self.save, adapters=True)


def random_values(model: AdaptedModel, seed: int = 3) -> dict[str, Array]:
    """A and B of every adapter, neither of them zero, and other values for what is trained whole."""
    generator = np.random.default_rng(seed)
    own = {name: tensor for name, tensor in model.tensors.items() if name in model.own}
    return {name: generator.standard_normal(t.shape, np.float32) * np.float32(0.2) for name, t in own.items()}


def train(folder: Path, family: str, config: LoraConfig, dtype: torch.dtype = torch.float32, **options: Any) -> Trained:
    """Make a base, put adapters on it and save these.

    Args:
        folder: where everything goes.
        family: of the base.
        config: of the adapters.
        dtype: of the base.
        **options: of the base's config.

    Returns:
        What was made; the engine computes in fp32.
    """
    base = open_checkpoint(make_folder(folder / "base", family, dtype, **options))
    model = adapt(base.model, config)
    assert isinstance(model, AdaptedModel)
    moe = MoEConfig(router=model.compute.router) if model.compute.router is not None else None
    parallel = ParallelConfig()
    mesh = ParallelMesh(parallel)
    optim = OptimConfig(clip_grad=0.0)
    engine = Engine(
        model, torch.float32, parallel, moe, optim, RecomputeConfig(), mesh, torch.device("cpu"), lora=config
    )
    values = random_values(model)
    engine.load_state(over(base.read, rectangles(values), values))
    source = source_of_saves(base, model, config, fingerprint(base), base.root)
    saver = Saver(folder / "run", None, keep_last=0)
    files = collect_files(engine.state(with_optimizer=False), mesh, source.model, saver.stage)
    saver.save(1, files, lambda path, records: commit_checkpoint(path, records, source, parallel, TrainerState()))
    outcome = saver.wait()
    assert outcome is not None
    check(outcome)
    assert outcome.path is not None
    return Trained(base, config, engine, outcome.path)


def rectangles(values: dict[str, Array]) -> Callable[[str, Rect], Array]:
    return lambda name, rect: np.ascontiguousarray(values[name][rect.slices()])
