"""Results of a GPU on their way to the host, while the next ones are computed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["IN_FLIGHT", "HostCopies"]

IN_FLIGHT = 2  # copies under way at a time, and as many buffers


class HostCopies:
    """Copies tensors of a GPU to the host, on a stream of their own, into pinned memory.

    Only the start of a third copy waits, for the first: until then the GPU has the next tensor to
    compute and the one before to copy, while the host stores what has come.

    Parameters
    ----------
    device
        The GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._buffers: list[Tensor] = []  # those that are free
        self._under_way: deque[tuple[Any, Tensor, Tensor, Callable[[Tensor], None]]] = deque()

    def start(self, tensor: Tensor, store: Callable[[Tensor], None]) -> None:
        """Copy a tensor that is being computed, and hand its copy to ``store`` later.

        The copy is only valid inside ``store``.
        """
        if len(self._under_way) == IN_FLIGHT:
            self._complete()
        count = tensor.numel()
        buffer = self._buffers.pop() if self._buffers else None
        if buffer is None or buffer.numel() < count or buffer.dtype != tensor.dtype:
            buffer = torch.empty(count, dtype=tensor.dtype, device="cpu", pin_memory=True)
        copy = buffer[:count].view(tensor.shape)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            copy.copy_(tensor, non_blocking=True)
        tensor.record_stream(self.stream)  # its memory is not given out again before
        self._under_way.append((self.stream.record_event(), buffer, copy, store))

    def finish(self) -> None:
        """Wait for all copies, and store them."""
        while self._under_way:
            self._complete()

    def _complete(self) -> None:
        copied, buffer, copy, store = self._under_way.popleft()
        copied.synchronize()
        store(copy)
        self._buffers.append(buffer)
