"""Numbers on their way from the device to the host."""

from __future__ import annotations

import torch
from torch import Tensor


class Reading:
    """A copy of a tensor on the host, begun at once: waiting for it doesn't wait for what is launched later."""

    def __init__(self, values: Tensor) -> None:
        self._host, self._event = values, None
        if values.is_cuda:
            self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._host.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def wait(self) -> Tensor:
        """The values, on the host."""
        if self._event is not None:
            self._event.synchronize()
        return self._host
