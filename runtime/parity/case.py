"""Layouts against one rank: what a case is, how a rank runs it, and how results are compared."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from moeconv.families.base import Model
from moeconv.layout.rect import Rect, check_cover
from runtime.checkpoint.rectangles import StateTensor
from runtime.data.batch import IGNORED_LABEL, Batch
from runtime.engine import Engine
from runtime.fp8.config import Fp8Config
from runtime.model.context import TORCH_DTYPES
from runtime.model.lora import LoraConfig
from runtime.model.recompute import RecomputeConfig
from runtime.model.targets import adapt
from runtime.moe.config import MoEConfig
from runtime.optim.config import OptimConfig
from runtime.parallel.degrees import ParallelConfig
from runtime.parallel.mesh import ParallelMesh
from runtime.parity.configs import tiny_model

Array = npt.NDArray[Any]
EMPTY_EXPERT = 5
LR = 1e-3


@dataclass(frozen=True, kw_only=True)
class Case:
    """A layout and a model; everything that is left out has the value that most cases share."""

    name: str
    num_ranks: int
    parallel: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    moe: dict[str, Any] = field(default_factory=dict)
    recompute: dict[str, Any] = field(default_factory=dict)
    optim: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] = field(default_factory=dict)
    fp8: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    num_microbatches: int = 4
    """Of the global batch, over all data-parallel ranks."""
    positions: int = 16
    device: str = "cpu"
    """Where to compute: cpu, or cuda, which is this process's GPU."""
    documents: bool = False
    """Rows hold documents that don't see each other, whose positions begin at 0."""
    captures: bool = False
    """Set room aside for rows that travel, and replay micro-batches as CUDA graphs on GPUs."""
    warm_up: int = 0
    """Steps with a learning rate of 0 before the others: by then there are graphs."""

    @property
    def reference(self) -> Case:
        """The same model and batch on one rank."""
        return Case(
            name="one rank",
            num_ranks=1,
            model=self.model,
            moe=self.moe,
            optim=self.optim,
            lora=self.lora,
            fp8=self.fp8,
            dtype=self.dtype,
            num_microbatches=self.num_microbatches,
            positions=self.positions,
            device=self.device,
            documents=self.documents,
            warm_up=self.warm_up,
        )

    @property
    def key(self) -> str:
        """Equal for cases with the same reference."""
        parts = (
            self.model,
            self.moe,
            self.optim,
            self.lora,
            self.fp8,
            self.dtype,
            self.num_microbatches,
            self.positions,
        )
        return repr((*parts, self.documents, self.warm_up))


@dataclass
class Outcome:
    """What two steps gave: numbers, gradients of the first step, weights after the second."""

    numbers: dict[str, list[float]]
    load: list[Array]
    gradients: dict[str, Array]
    weights: dict[str, Array]


def model_of(case: Case) -> Model:
    """The case's model; a Mixtral of 4 layers where it says nothing else."""
    return adapt(tiny_model(**case.model), LoraConfig(**case.lora))


def initial_weight(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A global tensor that depends on its name alone."""
    seed = int.from_bytes(name.encode()[-16:], "little") % 2**63 + len(name)
    # Adapters of all layers and experts end alike.
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) if ".lora_" in name else seed)
    values = torch.randn(shape, generator=generator) * (0.15 if len(shape) > 1 else 0.2)
    if "norm" in name:
        values += 1
    if name.endswith("embed_tokens.weight"):
        values[:, 0] = 2.0  # a direction that all tokens share,
    if name.endswith(".gate.weight"):
        values *= 3
        values[EMPTY_EXPERT] = 0
        values[EMPTY_EXPERT, 0] = -20.0  # and an expert that it keeps away
    return values


def make_engine(case: Case, **optim: Any) -> tuple[Engine, ParallelMesh]:
    """Build the engine of this rank with the case's initial weights."""
    model = model_of(case)
    moe = None
    if model.compute.router is not None:
        defaults: dict[str, Any] = {"router": model.compute.router, "aux_loss_coeff": (0.02,), "z_loss_coeff": 1e-3}
        moe = MoEConfig(**(defaults | case.moe))
    parallel = ParallelConfig(**case.parallel)
    # Adam divides by the root of the squared gradient: with a tiny epsilon it would turn rounding noise on elements
    # without a gradient into whole steps.
    options: dict[str, Any] = {"lr": LR, "adam_eps": 1e-4, "clip_grad": 0.5, "weight_decay": 0.1}
    # One rank of many can run a case of one rank by itself.
    mesh = ParallelMesh(parallel, 1, 0) if case.num_ranks == 1 else ParallelMesh(parallel)
    device = torch.device("cuda", torch.cuda.current_device()) if case.device == "cuda" else torch.device("cpu")
    engine = Engine(
        model,
        TORCH_DTYPES[case.dtype],
        parallel,
        moe,
        OptimConfig(**(options | case.optim | optim)),
        RecomputeConfig(**case.recompute),
        mesh,
        device,
        lora=LoraConfig(**case.lora),
        fp8=Fp8Config(**case.fp8),
        captures=case.captures,
    )
    engine.load_state(initial_reader(model))
    return engine, mesh


def initial_reader(model: Model) -> Callable[[str, Rect], Array]:
    """Read rectangles of the initial weights."""

    def read(name: str, rect: Rect) -> Array:
        return initial_weight(name, model.tensors[name].shape)[rect.slices()].contiguous().numpy()

    return read


def global_batch(case: Case, step: int) -> list[Batch]:
    """All micro-batches of a step; some labels don't count, unevenly over the micro-batches."""
    vocab = model_of(case).sizes["vocab"]
    generator = torch.Generator().manual_seed(100 + step)
    out = []
    for number in range(case.num_microbatches):
        tokens = torch.randint(vocab, (2, case.positions + 1), generator=generator)
        labels = tokens[:, 1:].clone()
        labels[0, : 2 * number] = IGNORED_LABEL
        marks = _documents(labels, generator) if case.documents else {}
        out.append(Batch(tokens=tokens[:, :-1], labels=labels, **marks))
    return out


def _documents(labels_BS: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Cut rows into documents, at other places in each."""
    begins_BS = torch.rand(labels_BS.shape, generator=generator) < 0.25
    begins_BS[:, 0] = False
    places_BS = torch.arange(labels_BS.shape[1]).expand_as(labels_BS)
    first_BS = torch.where(begins_BS, places_BS, 0).cummax(1).values
    return {"position_ids": places_BS - first_BS, "document_ids": begins_BS.cumsum(1, dtype=torch.int32)}


def own_share(batches: list[Batch], mesh: ParallelMesh) -> list[Batch]:
    """The micro-batches of this data-parallel rank."""
    share = len(batches) // mesh.size("dp")
    return batches[mesh.rank("dp") * share :][:share]


def warm(engine: Engine, steps: Iterable[list[Batch]]) -> None:
    """Do steps that leave the weights as they are."""
    engine.set_lr(0.0)
    for batches in steps:
        engine.train_step(batches)
    engine.set_lr(LR)


def copies(items: Iterable[StateTensor]) -> list[tuple[str, tuple[int, ...], Rect, Array]]:
    """Rectangles as arrays that outlive the engine."""
    return [(i.name, i.global_shape, i.rect, i.tensor.detach().float().cpu().numpy().copy()) for i in items]


def run_rank(case: Case) -> dict[str, Any]:
    """Two steps and an evaluation on this rank."""
    engine, mesh = make_engine(case)
    if case.warm_up:
        on_gpu = case.device == "cuda" and case.dtype == "bfloat16"  # other grouped products read their rows' numbers
        warm(engine, [own_share(global_batch(case, -1 - step), mesh) for step in range(case.warm_up)])
        assert not (case.captures and on_gpu) or engine.num_graphs > 1, "nothing has been captured"
    numbers: dict[str, list[float]] = {"lm_loss": [], "aux_loss": [], "z_loss": [], "grad_norm": [], "entropy": []}
    load, gradients = [], []
    for step in range(2):
        result = engine.train_step(own_share(global_batch(case, step), mesh))
        for name in ("lm_loss", "aux_loss", "z_loss", "grad_norm"):
            numbers[name].append(getattr(result, name))
        numbers["entropy"].append(result.routing.entropy if result.routing is not None else 0.0)
        if result.expert_load is not None:
            load.append(result.expert_load.numpy())
        if step == 0:
            gradients = copies(engine.gradients())
    weights = copies(engine.state(with_optimizer=False))
    numbers["evaluation"] = [engine.evaluate(own_share(global_batch(case, 7), mesh))]
    if "ema_decay" in case.optim:
        weights += copies(item for item in engine.state(with_optimizer=True) if ".ema." in item.name)
        with engine.mean_of_weights():
            numbers["evaluation"].append(engine.evaluate(own_share(global_batch(case, 7), mesh)))
        numbers["evaluation"].append(engine.evaluate(own_share(global_batch(case, 7), mesh)))
        assert len(set(numbers["evaluation"])) == 2, "the mean computes something else, and is gone afterwards"
    return {"numbers": numbers, "load": load, "gradients": gradients, "weights": weights}


def assemble(parts: Iterable[tuple[str, tuple[int, ...], Rect, Array]]) -> dict[str, Array]:
    """Put all ranks' rectangles together; each element must come from exactly one rank."""
    tensors: dict[str, Array] = {}
    rects: dict[str, list[tuple[Rect, str]]] = {}
    for name, shape, rect, array in parts:
        tensors.setdefault(name, np.full(shape, np.nan, np.float32))[rect.slices()] = array
        rects.setdefault(name, []).append((rect, "a rank"))
    for name, covered in rects.items():
        check_cover(name, tensors[name].shape, covered)
    return tensors


def outcome(results: list[dict[str, Any]]) -> Outcome:
    """Combine the ranks' results; numbers must be the same on all of them."""
    first = results[0]
    for rank, result in enumerate(results):
        assert result["numbers"] == first["numbers"], f"rank {rank} reports other numbers than rank 0"
        assert all((a == b).all() for a, b in zip(result["load"], first["load"], strict=True))
    return Outcome(
        first["numbers"],
        first["load"],
        assemble(part for result in results for part in result["gradients"]),
        assemble(part for result in results for part in result["weights"]),
    )


def relative(got: Array, want: Array) -> float:
    """Largest difference over largest value."""
    scale = np.abs(want).max()
    return float(np.abs(got - want).max() / scale) if scale else float(np.abs(got).max())


def errors(got: Outcome, want: Outcome) -> dict[str, float]:
    """The largest relative error of each kind of result.

    Args:
        got: of a layout.
        want: of one rank.

    Returns:
        Kind -> error; tensors are compared one by one, each against its own largest value.
    """
    assert got.gradients.keys() == want.gradients.keys()
    assert got.weights.keys() == want.weights.keys()
    out = {
        name: max(abs(a - b) / max(abs(b), 1e-30) for a, b in zip(got.numbers[name], values, strict=True))
        for name, values in want.numbers.items()
    }
    out["gradients"] = max(relative(got.gradients[name], want.gradients[name]) for name in want.gradients)
    out["weights"] = max(relative(got.weights[name], want.weights[name]) for name in want.weights)
    out["load"] = float(sum(np.abs(a - b).sum() for a, b in zip(got.load, want.load, strict=True)))
    return out
