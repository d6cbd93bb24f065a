"""From shards to the rectangles of a checkpoint, and back."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moeconv.layout.rect import Rect
from runtime.optim.groups import DERIVED_STATES
from runtime.optim.protocol import Optimizer
from runtime.parallel.collectives import group_rank, group_size
from runtime.parallel.masters import halves, has_remainders, join, off_ties, pieces, read_masters, split
from runtime.parallel.shards import Shard, ShardPart
from runtime.parallel.topology import Block, blocks

Read = Callable[[str, Rect], npt.NDArray[Any]]
MASTER = "master"
"""The state of every optimizer that keeps the weights in full precision."""
READERS = 4
"""Rectangles of a rank that are read at a time."""


@dataclass(frozen=True, slots=True)
class StateTensor:
    """A rectangle of a global tensor that this rank writes; of each global element, one rank has it."""

    name: str
    """As on disk: the hub's name, or `optimizer.<state>.` and the hub's name."""
    global_shape: tuple[int, ...]
    rect: Rect
    live: Tensor
    """In the shape of the rectangle; a view of live memory. Of a master that has a remainder, its bf16 weight."""
    remainder: Tensor | None = None
    """In the shape of the rectangle, int16; None where `live` is all."""
    in_place: bool = False
    """Whether a save reads it (of a master that has a remainder, that) where it is, in the host's memory, which has no room
    for a second copy: until then no step may follow."""

    @property
    def tensor(self) -> Tensor:
        """The numbers: live memory, or with a remainder put together, anew at each use."""
        return self.live if self.remainder is None else join(self.live, self.remainder)

    @property
    def dtype(self) -> torch.dtype:
        """Of the numbers."""
        return self.live.dtype if self.remainder is None else torch.float32


def to_tensor(array: npt.NDArray[Any]) -> Tensor:
    """Wrap an array, also one of ml_dtypes' bfloat16 and float8_e4m3fn, which torch doesn't know."""
    array = np.ascontiguousarray(array)
    if not array.flags.writeable:
        array = array.copy()
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    if array.dtype.name == "float8_e4m3fn":
        return torch.from_numpy(array.view(np.uint8)).view(torch.float8_e4m3fn)
    return torch.from_numpy(array)


def weights(shards: Sequence[Shard]) -> Iterator[StateTensor]:
    """The weights that this rank writes."""
    for shard in shards:
        for item in shard.written() if shard.primary else ():
            slot, end = item.slot, item.begin + item.flat.numel()
            for block in blocks(slot.topology, slot.cols, item.begin, end):
                yield StateTensor(block.name, block.global_shape, block.rect, block.of(item.flat, item.begin))


def whole(name: str, tensor: Tensor) -> StateTensor:
    """A tensor that one rank has whole."""
    shape = tuple(tensor.shape)
    return StateTensor(name, shape, Rect.whole(shape), tensor)


def gradients(shards: Sequence[Shard]) -> Iterator[StateTensor]:
    """The gradients of the last step, each element on one rank, as rectangles of the weights' names."""
    for shard in shards:
        for block, part in _owned(shard):
            yield StateTensor(
                block.name, block.global_shape, block.rect, block.of(shard.grad_shard[part.range], part.begin)
            )


def optimizer_state(shards: Sequence[Shard], optimizer: Optimizer) -> Iterator[StateTensor]:
    """Master weights, where they are not the weights themselves, and the optimizer's states, each element on one rank."""
    for shard in shards:
        states = {name: optimizer.state(shard, name) for name in optimizer.states(shard)}
        if shard.separate_master and not has_remainders(shard):
            states[MASTER] = shard.master
        for block, part in _owned(shard):
            for state, flat in states.items():
                tensor = block.of(flat[part.range], part.begin)
                name, in_place = f"optimizer.{state}.{block.name}", shard.offloaded and flat.device.type == "cpu"
                yield StateTensor(name, block.global_shape, block.rect, tensor, in_place=in_place)
            if has_remainders(shard):
                weight, remainder = (block.of(half[part.range], part.begin) for half in halves(shard))
                name = f"optimizer.{MASTER}.{block.name}"
                yield StateTensor(name, block.global_shape, block.rect, weight, remainder, shard.offloaded)


def _owned(shard: Shard) -> Iterator[tuple[Block, ShardPart]]:
    """The rectangles of a shard's shard that this rank speaks for."""
    if not shard.primary:
        return
    replicas = 1 if shard.distributed else group_size(shard.group)
    turn = 0 if shard.distributed else group_rank(shard.group)
    for place, part in enumerate(shard.parts()):
        if place % replicas == turn:
            yield from _trained(part)


def _trained(part: ShardPart) -> Iterator[tuple[Block, ShardPart]]:
    """The rectangles of a part that the optimizer updates."""
    for block in blocks(part.slot.topology, part.slot.cols, part.begin, part.end):
        if not block.settings.frozen:
            yield block, part


T = TypeVar("T")
R = TypeVar("R")


def read_ahead(read: Callable[[str, Rect], R], targets: Iterable[tuple[Block, T]]) -> Iterator[tuple[T, R]]:
    """Read blocks in order, some of them ahead: a thread alone is slower than disks, links and fresh memory.

    Args:
        read: gives what is stored of a rectangle of a tensor by its hub name; called by several threads.
        targets: the blocks, each with what it is for.

    Yields:
        What a block is for, and what is stored.
    """
    waiting: deque[tuple[T, Future[R]]] = deque()
    with ThreadPoolExecutor(READERS) as pool:
        for block, target in targets:
            waiting.append((target, pool.submit(read, block.name, block.rect)))
            if len(waiting) > READERS:
                target, future = waiting.popleft()
                yield target, future.result()
        for target, future in waiting:
            yield target, future.result()


def load_weights(shards: Sequence[Shard], read: Read) -> None:
    """Fill this rank's weights, and master weights with the checkpoint's full precision.

    Args:
        shards: take them.
        read: gives a rectangle of a tensor by its hub name; called by several threads.
    """
    for shard in shards:
        targets: list[tuple[Block, Tensor]] = []
        for item in shard.held():
            slot, end = item.slot, item.begin + item.flat.numel()
            for block in blocks(slot.topology, slot.cols, item.begin, end):
                targets.append((block, block.of(item.flat, item.begin)))
        exact = True
        for target, stored in ((target, to_tensor(found)) for target, found in read_ahead(read, targets)):
            exact = exact and target.dtype in (stored.dtype, shard.master.dtype)
            target.copy_(stored)
        if exact:
            shard.masters_from_weights()
        else:
            _fill(shard, halves(shard), read, "", frozen=True)


def load_optimizer(shards: Sequence[Shard], optimizer: Optimizer, read: Read, stored: Container[str]) -> None:
    """Fill master weights, where they are kept apart and stored, and the optimizer's states.

    Args:
        shards: this rank's.
        optimizer: has the states.
        read: gives a rectangle of a tensor by its name on disk.
        stored: the names on disk.

    Raises:
        MoeconvError: a state is not stored, or can't be read.
    """
    for shard in shards:
        for name in (name for name in optimizer.states(shard) if name not in DERIVED_STATES):
            _fill(shard, [optimizer.state(shard, name)], read, f"optimizer.{name}.")
        # A run in fp32 stores no masters: its weights, read by `load_weights`, are just as precise.
        _fill(shard, halves(shard), read, f"optimizer.{MASTER}.", stored)


def start_derived(shards: Sequence[Shard], optimizer: Optimizer, read: Read, stored: Container[str]) -> None:
    """Fill the states that begin as the masters; arguments as of `load_optimizer`, after it."""
    for shard in shards:
        for name in (name for name in optimizer.states(shard) if name in DERIVED_STATES):
            state = optimizer.state(shard, name)
            for part in pieces(shard):
                state[part] = read_masters(shard, part)
            _fill(shard, [state], read, f"optimizer.{name}.", stored)


def _fill(
    shard: Shard,
    flats: Sequence[Tensor],
    read: Read,
    prefix: str,
    stored: Container[str] | None = None,
    *,
    frozen: bool = False,
) -> None:
    """Fill a shard's range, or both halves of its masters, with what is on disk; where `stored` is given, what it lacks
    stays as it is."""
    targets: list[tuple[Block, list[Tensor]]] = []
    for part in shard.parts():
        for block in blocks(part.slot.topology, part.slot.cols, part.begin, part.end):
            if block.settings.frozen and not frozen:
                continue
            name = prefix + block.name
            if stored is None or name in stored:
                views = [block.of(flat[part.range], part.begin) for flat in flats]
                targets.append((replace(block, name=name), views))
    for found, array in read_ahead(read, targets):
        values = to_tensor(array)
        # Weights that are loaded beside masters are rounded to even: so is one that is cut from its master here.
        parts = [values] if len(found) == 1 else split(off_ties(values.float()))
        for target, value in zip(found, parts, strict=True):
            target.copy_(value)
