"""The tokens of a text, one after another, the same on every rank."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Literal

import torch
import torch.distributed as dist

from moeconv.errors import MoeconvError
from runtime.engine import Engine
from runtime.generate.config import GenerateConfig
from runtime.generate.sampling import Sampler
from runtime.generate.stepper import Stepper

Stopped = Literal["end", "length", "positions"]
_BROKEN = -1


class GenerationError(MoeconvError):
    """A text that the model can't go on with."""


def check_room(ids: Sequence[int], longest: int) -> None:
    """Refuse a text that a model can't go on with.

    Args:
        ids: the text.
        longest: positions that the model was made for; 0 where there is no limit.

    Raises:
        GenerationError: the text is empty, or fills the positions.
    """
    if not ids:
        raise GenerationError("a text without a token: there is nothing to go on with")
    if longest and len(ids) >= longest:
        raise GenerationError(
            f"a text of {len(ids):,} tokens leaves no room for another one: the model was made for {longest:,} positions. "
            "Shorten it, or begin a new conversation"
        )


class Generator:
    """Writes texts with a model that all ranks share."""

    def __init__(self, engine: Engine, config: GenerateConfig, ends: Collection[int], seed: int) -> None:
        """Take a model.

        Args:
            engine: has the weights.
            config: how tokens are chosen, and how many.
            ends: ids that end a text.
            seed: of what is drawn.
        """
        self._stepper, self._config, self._ends, self._seed = Stepper(engine), config, frozenset(ends), seed
        self._mesh, self._device = engine.mesh, engine.device
        self._longest = engine.context.model.compute.max_positions
        # Of the ranks that have the logits, one chooses: the first of the last stage.
        self._chooser = self._mesh.world_size - self._mesh.world_size // self._mesh.size("pp")
        self.stopped: Stopped = "length"
        """Why the last text ended: its end was written, enough tokens were, or the model has no more positions."""

    def tokens(self, ids: Sequence[int], number: int = 0) -> Iterator[int]:
        """Go on with a text. Collective; every rank gives the same ids, and takes all tokens.

        Args:
            ids: the text.
            number: which text of the run it is: each draws numbers of its own.

        Yields:
            Each token, the same on every rank, without the one that ends the text; `stopped` says why there are no more.

        Raises:
            GenerationError: the text is empty or too long, or logits are NaN or infinite.
        """
        check_room(ids, self._longest)
        config, text = self._config, list(ids)
        sampler = Sampler(config.temperature, config.top_k, config.top_p, self._seed, number)
        for _ in range(config.max_new_tokens):
            if self._longest and len(text) >= self._longest:
                self.stopped = "positions"
                return
            token = self._agree(self._stepper.logits(text), sampler)
            if token in self._ends:
                self.stopped = "end"
                return
            text.append(token)
            yield token
        self.stopped = "length"

    def _agree(self, logits_V: torch.Tensor | None, sampler: Sampler) -> int:
        """Choose a token on one rank, and tell it to the others."""
        token = _BROKEN
        if self._mesh.global_rank == self._chooser:
            assert logits_V is not None
            token = sampler.choose(logits_V) if bool(torch.isfinite(logits_V).all()) else _BROKEN
        if self._mesh.world_size > 1:
            told = torch.tensor([token], dtype=torch.int64, device=self._device)
            dist.broadcast(told, self._chooser)
            token = int(told)
        if token == _BROKEN:
            raise GenerationError(
                "the model's logits are NaN or infinite: its weights are broken, or --dtype is too narrow"
            )
        return token
