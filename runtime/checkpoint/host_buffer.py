"""Host memory that the saves of a run share: allocated once, and page-locked beside a GPU."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from moeconv.dtypes import Bytes
from runtime.host_memory import allocate, page_lock, page_unlock

ALIGNMENT = 64


class HostBuffer:
    """One block of host memory for the tensors of a save.

    Fresh memory costs a page fault a page, which takes longer than the copy, and a GPU copies into memory that is not
    page-locked through a small buffer of the driver's: hence one block, kept from save to save.
    """

    def __init__(self, note: Callable[[str], None] | None = None) -> None:
        """Make a buffer without memory.

        Args:
            note: told once if the memory can't be page-locked; None warns.
        """
        self.memory = torch.empty(0, dtype=torch.uint8)
        self._note = note or warnings.warn
        self._unlock: Callable[[], object] | None = None
        self._lockable = True

    def stage(self, tensors: Sequence[Tensor]) -> list[Bytes]:
        """Copy tensors to the host; returns when the copies are done.

        Args:
            tensors: any dtypes, strides and devices.

        Returns:
            [nbytes] uint8 of each, row-major; views of the buffer, valid until the next call.

        Raises:
            HostMemoryError: there is not enough memory.
        """
        places, total = _places(tensors)
        devices = {tensor.device for tensor in tensors if tensor.is_cuda}
        self.reserve(total, page_locked=bool(devices))
        for tensor, place in zip(tensors, places, strict=True):
            # Viewed through torch: numpy has no bfloat16.
            copy = self.memory[place].view(tensor.dtype).view(tensor.shape)
            copy.copy_(tensor.detach(), non_blocking=True)
        for device in devices:
            torch.cuda.current_stream(device).synchronize()
        memory: Bytes = self.memory.numpy()
        return [memory[place] for place in places]

    def missing(self, tensors: Sequence[Tensor]) -> int:
        """Give the bytes that `stage` would take beyond what the buffer has."""
        return max(0, _places(tensors)[1] - self.memory.nbytes)

    def reserve_for(self, tensors: Sequence[Tensor]) -> None:
        """Make room for `stage`; what was staged is lost if the buffer must grow.

        Args:
            tensors: any dtypes, strides and devices.

        Raises:
            HostMemoryError: there is not enough memory.
        """
        self.reserve(_places(tensors)[1], page_locked=any(tensor.is_cuda for tensor in tensors))

    def reserve(self, num_bytes: int, *, page_locked: bool) -> None:
        """Make room; what was staged is lost if the buffer must grow.

        Args:
            num_bytes: the least that is needed.
            page_locked: whether a GPU will copy to it.

        Raises:
            HostMemoryError: there is not enough memory.
        """
        if num_bytes > self.memory.nbytes:
            self.close()  # first: the old and the new block needn't fit together
            self.memory = allocate(num_bytes)
        if not page_locked or not self._lockable or self._unlock is not None or not self.memory.nbytes:
            return
        failure = page_lock(self.memory)
        if failure is None:
            unlock = weakref.finalize(self, page_unlock, self.memory.data_ptr())
            unlock.atexit = False  # the end of the process does it anyway, and can't hang or fail
            self._unlock = unlock
        else:
            self._lockable = False
            self._note(f"saves copy slower than they could: host memory can't be page-locked ({failure})")

    def close(self) -> None:
        """Give the memory back."""
        if self._unlock is not None:
            self._unlock()
            self._unlock = None
        self.memory = torch.empty(0, dtype=torch.uint8)


def _places(tensors: Iterable[Tensor]) -> tuple[list[slice], int]:
    """Line up tensors, each aligned.

    Returns:
        The bytes of each, and how many there are in all.
    """
    places, end = [], 0
    for tensor in tensors:
        begin = -(-end // ALIGNMENT) * ALIGNMENT
        end = begin + tensor.nbytes
        places.append(slice(begin, end))
    return places, end
