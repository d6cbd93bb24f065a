"""From shards to the rectangles of a checkpoint, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moeconv.errors import MoeconvError
from moeconv.layout.rect import Rect
from runtime.optim.adamw import MOMENTS, AdamW
from runtime.parallel.buckets import Bucket, BucketStore, ShardPart
from runtime.parallel.collectives import group_rank, group_size
from runtime.parallel.topology import Block, blocks

Read = Callable[[str, Rect], npt.NDArray[Any]]


@dataclass(frozen=True, slots=True)
class StateTensor:
    """A rectangle of a global tensor that this rank writes; of each global element, one rank has it."""

    name: str
    """As on disk: the hub's name, or `optimizer.<state>.` and the hub's name."""
    global_shape: tuple[int, ...]
    rect: Rect
    tensor: Tensor
    """In the shape of the rectangle; a view of live memory."""


def to_tensor(array: npt.NDArray[Any]) -> Tensor:
    """Wrap an array, also one of ml_dtypes' bfloat16, which torch doesn't know."""
    array = np.ascontiguousarray(array)
    if not array.flags.writeable:
        array = array.copy()
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def weights(store: BucketStore) -> Iterator[StateTensor]:
    """The weights that this rank writes: data-parallel copies take turns, parameter by parameter."""
    for bucket in store.buckets:
        if not bucket.primary:
            continue
        for place, slot in enumerate(bucket.slots):
            if place % group_size(bucket.group) != group_rank(bucket.group):
                continue
            flat = bucket.view(slot).view(-1)
            for block in blocks(slot.topology, slot.cols, 0, slot.size):
                yield StateTensor(block.name, block.global_shape, block.rect, block.of(flat))


def gradients(store: BucketStore) -> Iterator[StateTensor]:
    """The gradients of the last step, each element on one rank, as rectangles of the weights' names."""
    for bucket in store.buckets:
        for block, part in _owned(bucket):
            yield StateTensor(
                block.name, block.global_shape, block.rect, block.of(bucket.grad_shard[part.range], part.begin)
            )


def optimizer_state(store: BucketStore, optimizer: AdamW) -> Iterator[StateTensor]:
    """Master weights, where they are not the weights themselves, and moments, each element on one rank."""
    for bucket in store.buckets:
        states = {name: optimizer.moment(bucket, name) for name in MOMENTS}
        if bucket.master is not bucket.weight_shard:
            states["master"] = bucket.master
        for block, part in _owned(bucket):
            for state, flat in states.items():
                tensor = block.of(flat[part.range], part.begin)
                yield StateTensor(f"optimizer.{state}.{block.name}", block.global_shape, block.rect, tensor)


def _owned(bucket: Bucket) -> Iterator[tuple[Block, ShardPart]]:
    """The rectangles of a bucket's shard that this rank speaks for."""
    if not bucket.primary:
        return
    replicas = 1 if bucket.distributed else group_size(bucket.group)
    turn = 0 if bucket.distributed else group_rank(bucket.group)
    for place, part in enumerate(bucket.parts()):
        if place % replicas == turn:
            for block in blocks(part.slot.topology, part.slot.cols, part.begin, part.end):
                yield block, part


def load_weights(store: BucketStore, read: Read) -> None:
    """Fill this rank's weights, and master weights with the checkpoint's full precision.

    Args:
        store: takes them.
        read: gives a rectangle of a tensor by its hub name.
    """
    for bucket in store.buckets:
        for slot in bucket.slots:
            flat = bucket.view(slot).view(-1)
            for block in blocks(slot.topology, slot.cols, 0, slot.size):
                block.of(flat).copy_(to_tensor(read(block.name, block.rect)))
        if bucket.master is not bucket.weight_shard:
            _fill(bucket, bucket.master, read, "")


def load_optimizer(store: BucketStore, optimizer: AdamW, read: Read) -> None:
    """Fill master weights, where they are kept apart and stored, and moments.

    Args:
        store: has the shards.
        optimizer: has the moments.
        read: gives a rectangle of a tensor by its name on disk.
    """
    for bucket in store.buckets:
        for name in MOMENTS:
            _fill(bucket, optimizer.moment(bucket, name), read, f"optimizer.{name}.")
        # A run in fp32 stores no masters: its weights, read by `load_weights`, are just as precise.
        _fill(bucket, bucket.master, read, "optimizer.master.", optional=True)
    store.weights_from_masters()


def _fill(bucket: Bucket, flat: Tensor, read: Read, prefix: str, *, optional: bool = False) -> None:
    for part in bucket.parts():
        for block in blocks(part.slot.topology, part.slot.cols, part.begin, part.end):
            try:
                array = read(prefix + block.name, block.rect)
            except (KeyError, MoeconvError):
                if optional:
                    return
                raise
            block.of(flat[part.range], part.begin).copy_(to_tensor(array))
