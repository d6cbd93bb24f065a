"""What a run must know to go on, besides its tensors: trainer.json of a checkpoint."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from moeconv.io.trainer_file import TRAINER_VERSION, parse_trainer

TRAINER_FILE = "trainer.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainerState:
    """The position of a run. It says nothing of ranks, so a run goes on under any layout."""

    iteration: int = 0
    """Optimizer steps done."""
    consumed_train_samples: int = 0
    """Position in the training data."""
    seed: int = 0
    """With the iteration, it determines the random numbers of each step."""
    data_fingerprint: str = ""
    schedule: dict[str, Any] = field(default_factory=dict)
    """The learning rate's settings, to notice a change."""
    optimizer: dict[str, Any] = field(default_factory=dict)
    """The optimizer's numbers that are not tensors: its step count, the loss scale."""
    validation: dict[str, Any] = field(default_factory=dict)
    """What the evaluations so far have found (runtime.validation); empty where nothing depends on them."""

    def to_json(self) -> str:
        """Give the text of trainer.json."""
        return json.dumps({"version": TRAINER_VERSION} | dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, where: Path) -> TrainerState:
        """Read the text of trainer.json.

        Args:
            text: the file's content.
            where: the file, for messages.

        Returns:
            The state.

        Raises:
            SourceError: the text is malformed, of another version, or a number is of another type or range than it can be.
        """
        fields = parse_trainer(text.encode("utf-8", "surrogatepass"), str(where))
        fields.pop("version")
        return cls(**fields)


def seed_step(seed: int, iteration: int, *coordinates: int) -> None:
    """Seed torch's generators for one step; the seed and the iteration are all that a run must keep of them.

    Args:
        seed: the run's seed.
        iteration: the step.
        coordinates: of the ranks that must draw different numbers.
    """
    digest = hashlib.sha256(repr((seed, iteration, coordinates)).encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
