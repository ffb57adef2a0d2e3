"""Work on a GPU that is recorded once and replayed: launches without the host's share of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

__all__ = ["Replayed"]


@cache
def _stream(make: Any, device: torch.device) -> Any:
    """Give the stream to record on: one, because cuBLAS keeps workspace for each that it meets."""
    return make(device)


class Replayed:
    """A step that does the same with the same memory each time, by a CUDA graph where possible.

    The first call runs the step, so that libraries set themselves up; the second records it; from
    then on it is replayed. What cannot be recorded goes on as it is.

    Parameters
    ----------
    device
        The GPU.
    possible
        Whether to record at all.
    """

    def __init__(self, device: torch.device, possible: bool) -> None:
        self.device, self.possible = device, possible
        self.called = False
        self.graph: Any = None

    def __call__(self, step: Callable[[], None]) -> None:
        """Do the step, which takes and returns nothing and reads no result on the host.

        It is given each time, and not held: its owner holds this, and a circle would keep the
        memory of both until Python looks for circles.
        """
        if self.possible and self.called and self.graph is None:
            self.graph = self._record(step)
            self.possible = self.graph is not None
        self.called = True
        if self.graph is not None:
            self.graph.replay()
        else:
            step()

    def _record(self, step: Callable[[], None]) -> Any:
        """Record the step without doing it; None where it does what a graph cannot hold."""
        try:
            graph, side = torch.cuda.CUDAGraph(), _stream(torch.cuda.Stream, self.device)
            side.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(side):
                # Other threads may allocate meanwhile.
                graph.capture_begin(capture_error_mode="thread_local")
                try:
                    step()
                finally:
                    graph.capture_end()
        except RuntimeError:  # as PyTorch and CUDA say it, whatever the reason
            return None
        return graph
