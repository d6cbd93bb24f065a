"""What transformers and this project make of one config.json beside one set of tensors: who refuses, and whose logits are whose."""

from __future__ import annotations

import copy
import json
import logging
import os
import resource
import signal
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from moeconv.checking import check_tied
from moeconv.checkpoint import Checkpoint, open_checkpoint
from moeconv.errors import MoeconvError
from moeconv.families.base import Model
from moeconv.io.hf_folder import CONFIG
from moeconv.megatron.model_args import model_args
from moeconv.upcycling.carriers import Shape, choose
from runtime.engine import Engine
from runtime.model.recompute import RecomputeConfig
from runtime.model.support import check_supported
from runtime.moe.config import MoEConfig
from runtime.optim.config import OptimConfig
from runtime.parallel.degrees import ParallelConfig
from runtime.parallel.mesh import ParallelMesh
from tests.upcycle.hub import make_model

TOLERANCE = 1e-5
SECONDS, MEMORY_BYTES = 30, 4 << 30  # that transformers has for one config
LENGTH = 24  # tokens: more than the short windows and lengths that flips write
RANDOM_IN_TRAINING = frozenset(("phimoe",))  # transformers draws its experts while it trains


@dataclass(frozen=True, slots=True)
class Theirs:
    """What transformers makes of a config: an error; other tensors than the base's, by name; or logits, in evaluation and in training."""

    error: str | None = None
    other: tuple[str, ...] = ()
    logits: Tensor | None = None
    training: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Ours:
    """What this project makes of it: messages of whoever refuses (import, trainer, Megatron's args, upcycling), and what is known without."""

    refusals: Mapping[str, str] = field(default_factory=dict)
    checkpoint: Checkpoint | None = None
    args: Mapping[str, Any] | None = None


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' remarks about strange configs to itself."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(before)


class Judge:
    """One family's tiny genuine model, as a folder, and what changes when its config.json does."""

    def __init__(self, model_type: str, folder: Path) -> None:
        """Make the model and save it.

        Args:
            model_type: the family.
            folder: an empty folder, or none yet.
        """
        self.model_type, self.folder = model_type, folder
        self.folder.mkdir(exist_ok=True)
        with quiet():
            model = make_model(model_type)
            model.save_pretrained(folder, max_shard_size="60KB")
        self.raw = (folder / CONFIG).read_bytes()
        self.config: dict[str, Any] = json.loads(self.raw)
        self.serialised: dict[str, Any] = json.loads(model.config.to_json_string(use_diff=False))
        self.tokens = (torch.arange(LENGTH) * 37 % self.config["vocab_size"])[None]
        self.base_theirs, self.base = self.judge(self.raw), self.ours(self.raw)
        assert self.base_theirs.logits is not None, self.base_theirs
        assert self.base_theirs.logits.isfinite().all()

    @cached_property
    def base_logits(self) -> Tensor:
        """The trainer's logits of the genuine model."""
        assert self.base.checkpoint is not None
        return self.our_logits(self.base.checkpoint)

    def load(self) -> Any:
        """Load the folder as it is now with transformers.

        Raises:
            OtherTensorsError: the folder's tensors are not those that transformers wants.
        """
        model, found = AutoModelForCausalLM.from_pretrained(
            self.folder,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
        )
        wrong = {*found["missing_keys"], *found["unexpected_keys"], *(name for name, *_ in found["mismatched_keys"])}
        if wrong:
            raise OtherTensorsError(tuple(sorted(wrong)))
        return model

    def judge(self, raw: bytes, *, training: bool = True) -> Theirs:
        """Ask transformers.

        Args:
            raw: config.json.
            training: whether the logits of a model in training are wanted too.
        """
        (self.folder / CONFIG).write_bytes(raw)
        with quiet(), torch.random.fork_rng():
            torch.manual_seed(7)
            before = signal.signal(signal.SIGALRM, _slow)
            signal.alarm(SECONDS)
            try:
                model = self.load()
                logits = self._logits(model.eval())
                drawn = (
                    self._logits(model.train()) if training and self.model_type not in RANDOM_IN_TRAINING else logits
                )
            except OtherTensorsError as error:
                return Theirs(other=error.names)
            except Exception as error:
                return Theirs(error=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
            finally:
                signal.alarm(0)
                signal.signal(signal.SIGALRM, before)
        return Theirs(logits=logits, training=drawn)

    def _logits(self, model: Any) -> Tensor:
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(5)
            out: Tensor = model(self.tokens, use_cache=False, return_dict=True).logits
        return out

    def ours(self, raw: bytes) -> Ours:
        """Ask this project, as import-hf, the trainer, export-megatron and upcycle do; logits are left to `our_logits`."""
        (self.folder / CONFIG).write_bytes(raw)
        try:
            checkpoint = open_checkpoint(self.folder)
        except MoeconvError as error:
            return Ours(refusals=dict.fromkeys(("import", "trainer", "megatron", "upcycle"), str(error)))
        model = checkpoint.model
        refusals: dict[str, str] = {}
        args = None

        def megatron() -> None:
            nonlocal args
            check_tied(checkpoint, "Megatron")
            args = model_args(model)

        def trainer() -> None:
            check_tied(checkpoint, "training")
            check_supported(model, self.folder)

        hidden, experts = model.sizes["hidden"], 4
        shape = Shape(
            experts=experts,
            top_k=2,
            granularity=1,
            shared=0,
            width=model.width("mlp"),
            layers=frozenset(range(model.sizes["layers"])),
        )
        asked: dict[str, Callable[[], Any]] = {"trainer": trainer, "megatron": megatron}
        if model.family.compute.router is None and hidden:
            asked["upcycle"] = lambda: choose(None, model, shape)
        for who, ask in asked.items():
            try:
                ask()
            except MoeconvError as error:
                refusals[who] = str(error)
        return Ours(refusals=refusals, checkpoint=checkpoint, args=args)

    def our_logits(self, checkpoint: Checkpoint) -> Tensor:
        """Compute with the trainer's model."""
        engine = make_engine(checkpoint.model)
        engine.load_state(checkpoint.read)
        with torch.no_grad():
            out: Tensor = engine.module[0](self.tokens).transpose(0, 1)[..., : checkpoint.model.sizes["vocab"]]
        return out

    def redrawn(self, raw: bytes) -> Judge | None:
        """Give a judge whose folder has this config and tensors of the shapes that transformers wants for it; None where it wants none."""
        config = json.loads(raw)
        again = copy.copy(self)
        again.folder = self.folder / "redrawn"
        with quiet(), torch.random.fork_rng():
            torch.manual_seed(3)
            try:
                parsed = CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(config))
                model = AutoModelForCausalLM.from_config(parsed, dtype=torch.float32)
                for parameter in model.parameters():
                    parameter.data.copy_(torch.randn_like(parameter) * 0.15 + (parameter.dim() == 1))
                model.save_pretrained(again.folder)
            except Exception:
                return None
        return again


def _slow(number: int, frame: FrameType | None) -> None:
    raise TimeoutError(f"transformers takes more than {SECONDS} s")


def bound_memory() -> None:
    """Bound this process's address space, so that what asks for too much ends in a MemoryError."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1]))


class OtherTensorsError(Exception):
    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__(", ".join(names))
        self.names = names


def gap(got: Tensor, want: Tensor) -> float:
    """Give the largest difference of logits, relative to the largest; infinite where shapes or NaNs differ."""
    if got.shape != want.shape or not torch.equal(got.isnan(), want.isnan()):
        return float("inf")
    return float((got - want).nan_to_num().abs().max() / want.nan_to_num().abs().max().clamp(min=1e-30))


@lru_cache(1)
def _mesh() -> ParallelMesh:
    return ParallelMesh(ParallelConfig())


def make_engine(model: Model) -> Engine:
    """Give the trainer's engine of a model, of one rank, in fp32."""
    moe = MoEConfig(router=model.compute.router, aux_loss_mode="hf") if model.compute.router is not None else None
    optim = OptimConfig(clip_grad=0.0)
    return Engine(model, torch.float32, ParallelConfig(), moe, optim, RecomputeConfig(), _mesh(), torch.device("cpu"))
