"""What the largest number of an 8-bit format stands for, tensor by tensor.

A bound is the absolute value that becomes the format's largest number; a product of 8-bit numbers is scaled by its
operands' bounds. Tensorwise, a tensor's bound is its own largest absolute value, for which it is read once more. Delayed,
it is the largest of the last steps, so that the pass which makes a tensor can write it in 8 bits at once; what is larger
saturates. Blockwise there are no bounds: `runtime.fp8.blocks`.

Products are scaled back before their results meet those of other ranks, so ranks needn't scale alike to be right. A
delayed bound is shared all the same: it is the largest value of all ranks that hold the tensor or a part of it, and of all
micro-batches. So a tensor of the model has one history, whatever the layout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from moeconv.errors import MoeconvError
from runtime.fp8.config import Fp8Config
from runtime.parallel.collectives import Group

HISTORY_STEPS = 16
FP8_HISTORY = "fp8_history"
"""Of a checkpoint's numbers, the one that `Scaling.history` gives."""


class Scaling:
    """The bounds of all tensors of this rank that are quantised, in places (slots) that modules take when they are built."""

    def __init__(self, config: Fp8Config, device: torch.device, group: Group = None) -> None:
        """Begin with no history; the arrays come with the first step.

        Args:
            config: what is computed in FP8.
            device: where the tensors are.
            group: all ranks that compute the same layers, in parts or on other data; None: this rank alone.
        """
        self.config = config
        self._step, self._replayed = 0, -1  # counts `begin`
        self._device, self._group = device, group
        self._names: list[str] = []
        self._trains = False
        self._used: set[int] = set()
        self._known: set[int] = set()
        self._amaxes = self._bounds = self._history = torch.empty(0)
        self._unused = torch.zeros(1, device=device)

    @property
    def blockwise(self) -> bool:
        """Whether blocks are scaled by themselves, and no tensor has a bound."""
        return self.config.recipe == "blockwise"

    def take_slot(self, name: str = "") -> int:
        """Make a place for a tensor's history.

        Args:
            name: the tensor's, the same under every layout and no other's; only what is saved needs one.
        """
        self._names.append(name)
        return len(self._names) - 1

    def begin(self, *, trains: bool) -> None:
        """Begin a step, or an evaluation: weights may have changed. Collective.

        Args:
            trains: a step follows, and delayed bounds what the last one found; an evaluation keeps them, and leaves no trace.
        """
        self._step += 1
        self._trains = trains
        if self.config.recipe == "delayed":
            self._make_room()
            if trains:
                self._take_over()

    @property
    def step(self) -> int:
        """Weights that were quantised at another one are stale."""
        return self._step

    @property
    def replayed(self) -> bool:
        """Whether a CUDA graph has quantised all weights in this step."""
        return self._replayed == self._step

    @property
    def settled(self) -> bool:
        """Whether no tensor of this step has been scaled by itself for want of earlier ones: what is captured is done in every step."""
        return self._used <= self._known

    def note_replay(self) -> None:
        """Take note that a graph has done what a step's first micro-batch does: it has quantised the weights, and met all tensors."""
        self._replayed = self._step
        self._used |= self._known

    def forget_capture(self) -> None:
        """Take weights as stale that a capture has marked as quantised: it has come to nothing, and no kernel has run."""
        self._step += 1

    def bound(self, slot: int, find: Callable[[Tensor], object]) -> tuple[Tensor, Tensor | None]:
        """Give a tensor's bound.

        Args:
            slot: its place.
            find: raises a number [1] on the device to the tensor's largest absolute value; called where the bound depends on
                it: tensorwise, and delayed in a tensor's first step.

        Returns:
            [1] fp32; and, [1], what the pass that quantises is to raise to the largest absolute value that it meets, None if
            that is known.
        """
        records = self.config.recipe == "delayed" and self._trains
        if records:
            self._used.add(slot)
        if slot in self._known:
            return self._bounds[slot : slot + 1], self._amaxes[slot : slot + 1] if records else self._unused
        amax = torch.zeros(1, device=self._device)
        find(amax)
        if records:
            place = self._amaxes[slot : slot + 1]
            torch.maximum(place, amax, out=place)
        return amax, None

    def history(self, stages: Group = None) -> dict[str, list[float]]:
        """Give what delayed bounds follow from: the largest values of the last steps, the latest first, by tensor. Collective.

        Args:
            stages: the ranks that compute other layers.
        """
        if self.config.recipe != "delayed":
            return {}
        self._make_room()
        self._take_over()
        columns = self._history.t().tolist()
        mine = {self._names[slot]: columns[slot] for slot in sorted(self._known)}
        if stages is None:
            return mine
        everyone: list[dict[str, list[float]]] = [{} for _ in range(dist.get_world_size(stages))]
        dist.all_gather_object(everyone, mine, group=stages)
        return {name: column for part in everyone for name, column in part.items()}

    def load_history(self, saved: Mapping[str, Sequence[float]]) -> list[str]:
        """Go on from what `history` gave, under whatever layout.

        Args:
            saved: by tensor; those of other stages may be among them.

        Returns:
            A line for the log where tensors of this rank have none: their first step is scaled by the tensor itself.

        Raises:
            MoeconvError: what is saved is no history.
        """
        if self.config.recipe != "delayed":
            return []
        self._make_room()
        missing: list[str] = []
        for slot, name in enumerate(self._names):
            if name not in saved:
                missing.append(name)
                continue
            self._history[:, slot] = _column(name, saved[name]).to(self._device)
            self._known.add(slot)
        self._bounds.copy_(_bounds_of(self._history))
        if not missing:
            return []
        which = "" if len(missing) == len(self._names) else f" of {len(missing)} tensors ({missing[0]}, ...)"
        return [
            f"--fp8-recipe delayed: the checkpoint has no largest values of earlier steps{which}: the next step is scaled by each tensor itself"
        ]

    def _make_room(self) -> None:
        if self._amaxes.shape[0] != len(self._names):
            assert not self._known, "modules take their slots when they are built"
            self._amaxes = torch.zeros(len(self._names), device=self._device)
            self._bounds = torch.ones_like(self._amaxes)
            self._history = self._amaxes.repeat(HISTORY_STEPS, 1)

    def _take_over(self) -> None:
        """Put what the last step found, on all ranks of the group, into the history; nothing where there was no step since."""
        if not self._used:
            return
        found = torch.where(torch.isfinite(self._amaxes), self._amaxes, self._bounds)
        if self._group is not None:
            dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self._group)
        # In place: graphs read and raise what lies here.
        self._history.copy_(torch.cat([found.unsqueeze(0), self._history[:-1]]))
        self._bounds.copy_(_bounds_of(self._history))
        self._amaxes.zero_()
        self._known |= self._used
        self._used = set()


def _bounds_of(history: Tensor) -> Tensor:
    most = history.amax(0)
    return torch.where(most > 0, most, 1.0)


def _column(name: str, values: Sequence[float]) -> Tensor:
    try:
        column = torch.tensor(values, dtype=torch.float32)
    except (TypeError, ValueError):
        column = torch.empty(0)
    if column.shape != (HISTORY_STEPS,) or not bool((torch.isfinite(column) & (column >= 0)).all()):
        raise MoeconvError(
            f"the checkpoint's FP8 history of {name} is {str(values)[:80]}; expected {HISTORY_STEPS} finite numbers of at least 0: "
            "trainer.json is damaged; go on from another checkpoint (--ckpt-step)"
        )
    return column
