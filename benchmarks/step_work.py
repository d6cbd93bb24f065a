"""The work that the systems of `benchmarks.train_step --peers` do: slices of models, and how ranks share them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from benchmarks.models import at_depth
from moeconv.families import family_of
from moeconv.families.base import Model
from runtime.log.flops import training_flops

Step = Callable[[], object]
MakeStep = Callable[[int], Step]
"""From a number of micro-batches to what does a step of them."""


def model_of(hub: str, layers: int) -> Model:
    """Give some layers of one of `benchmarks.models`."""
    config = at_depth(hub, layers)
    return Model.from_config(family_of(config), config)


@dataclass(frozen=True)
class Slice:
    """Some layers of a model."""

    layers: int
    hidden: int
    ffn: int
    experts: int
    """0: the layers are dense."""
    topk: int
    """1 for dense layers."""
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    positions: int = 4096
    """Tokens of a sequence."""
    hub: str | None = None
    """Key of `benchmarks.models.MODELS`: a model of a family of its own, which these sizes alone don't make; None: a Mixtral or
    a Llama."""

    @classmethod
    def of_hub(cls, name: str, layers: int) -> Slice:
        """Take some layers of one of `benchmarks.models`."""
        sizes = model_of(name, layers).sizes
        named = (sizes[key] for key in ("hidden", "ffn", "experts", "top_k", "heads", "kv_heads", "head_dim", "vocab"))
        return cls(layers, *named, hub=name)

    def flops(self, tokens: int) -> float:
        """Forward and backward: 6 for each active weight but the embedding's, and causal attention."""
        if self.hub is not None:
            return training_flops(model_of(self.hub, self.layers), self.positions) * tokens
        attention = self.heads * self.head_dim
        layer = self.topk * 3 * self.hidden * self.ffn + 2 * self.hidden * attention + self.experts * self.hidden
        layer += 2 * self.hidden * self.kv_heads * self.head_dim
        weights = self.layers * layer + self.hidden * self.vocab
        return 6.0 * weights * tokens + self.layers * 6.0 * tokens * self.positions * attention


@dataclass(frozen=True)
class Layout:
    """How ranks share the work; tensor parallelism is sequence-parallel, and leaves experts whole."""

    tp: int = 1
    ep: int = 1
    sequences: int = 2
    """Of a micro-batch."""
    balanced: bool = False
    """Each expert gets as many tokens, whatever the routers choose: no rank waits for one whose experts drew more."""

    @property
    def world(self) -> int:
        """Ranks of this launch."""
        return int(os.environ.get("WORLD_SIZE", "1"))

    @property
    def rank(self) -> int:
        """This process's."""
        return int(os.environ.get("RANK", "0"))

    @property
    def data_ranks(self) -> int:
        """Ranks with data of their own."""
        return self.world // self.tp

    @property
    def data_rank(self) -> int:
        """Which of them this one is."""
        return self.rank // self.tp


MODELS = {
    "mixtral": Slice(2, 4096, 14336, 8, 2, 32, 8, 128, 32000),
    "qwen3": Slice(4, 2048, 768, 128, 8, 32, 4, 128, 151936),
    # Llama 2's 70B, dense: with tensor parallelism its products are large enough to hide what travels.
    "llama": Slice(2, 8192, 28672, 0, 1, 64, 8, 128, 32000),
    "gpt-oss-20b": Slice.of_hub("gpt-oss-20b", 4),
    "deepseek-v2-lite": Slice.of_hub("deepseek-v2-lite", 5),
    "glm-4.5-air": Slice.of_hub("glm-4.5-air", 2),
    "glm-4.7-flash": Slice.of_hub("glm-4.7-flash", 4),
    # To try a command out where there is no GPU; no figure of it says anything.
    "tiny": Slice(2, 128, 128, 4, 2, 4, 2, 32, 512, positions=64),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What the systems are compared in."""

    model: str
    """Key of `MODELS`."""
    layers: int
    ranks: int
    tp: int
    ep: int
    sequences: int
    """Of a micro-batch."""
    numbers: tuple[int, ...]
    """Of micro-batches of a step: each is measured."""
    balanced: bool = False
    """As of `Layout`."""

    @classmethod
    def of(
        cls,
        model: str,
        layers: int | None,
        ranks: int,
        layout: str,
        sequences: int,
        numbers: Sequence[int],
        *,
        balanced: bool = False,
    ) -> Work:
        """Read a layout such as `tp2 ep2`; dp is what it leaves of the ranks.

        Raises:
            SystemExit: it is none, or not one of so many ranks.
        """
        degrees = {"tp": 1, "ep": 1, "dp": 0}
        for part in layout.split():
            found = re.fullmatch(r"(tp|ep|dp)([1-9]\d*)", part)
            if found is None:
                raise SystemExit(f"--layout is {layout!r}; expected degrees such as 'ep4', 'tp2 ep2' or 'dp4'")
            degrees[found[1]] = int(found[2])
        tp, ep, dp = degrees.values()
        if ranks % tp or ranks % ep or dp not in (0, ranks // tp):
            raise SystemExit(f"--layout is {layout!r}, which is none of --ranks {ranks}")
        shares = {"ranks": ranks, "tp": tp, "ep": ep, "sequences": sequences, "numbers": tuple(numbers)}
        return cls(model=model, layers=layers or MODELS[model].layers, **shares, balanced=balanced)

    @property
    def slice(self) -> Slice:
        """The model's layers."""
        return replace(MODELS[self.model], layers=self.layers)

    @property
    def arguments(self) -> list[str]:
        """The command line of `benchmarks.step_systems` behind the system's name."""
        options = {"layers": self.layers, "tp": self.tp, "ep": self.ep, "sequences": self.sequences}
        named = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        return [self.model, *map(str, self.numbers), *named, *(["--balanced"] if self.balanced else [])]

    def __str__(self) -> str:
        shares = {"tp": self.tp, "ep": self.ep, "dp": self.ranks // self.tp}
        layout = " ".join(f"{axis}{degree}" for axis, degree in shares.items() if degree > 1)
        work = f"{self.layers} layers of {self.model}, micro-batches of {self.sequences} x {self.slice.positions}"
        return ", ".join([work, *([layout] if layout else []), *(["balanced"] if self.balanced else [])])


def device_of_rank() -> torch.device:
    """The GPU of this rank; where there is none, the CPU, on which the systems are tested."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def join_ranks() -> None:
    """Let the ranks of a launch meet; one alone meets itself, since Megatron-Core wants process groups."""
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    for name, value in alone.items():
        os.environ.setdefault(name, value)
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
