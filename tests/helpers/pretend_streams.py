"""Streams of the pretended GPU, on which copies come as late as they may.

What is copied on a stream other than the current one arrives when somebody waits for an event after
it; before, NaN is read. The current stream works at once, as if it were always waited for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

NOW: list[Stream] = []  # inside ``with torch.cuda.stream(...)``


class Stream:
    """What stands in for ``torch.cuda.Stream``."""

    def __init__(self, device: Any = None) -> None:
        self.waiting: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.begun = self.ended = 0
        self.follows = False  # what was computed before

    def wait_stream(self, other: Any) -> None:
        self.follows = True

    def copy(self, to: torch.Tensor, source: torch.Tensor) -> None:
        if not self.follows:
            raise RuntimeError("a copy does not wait for what it copies")
        self.follows = False
        to.fill_(torch.nan)
        self.waiting.append((to, source))
        self.begun += 1

    def record_event(self) -> Event:
        return Event(self, self.begun)


class Event:
    """What stands in for ``torch.cuda.Event``."""

    def __init__(self, stream: Stream, number: int) -> None:
        self.stream, self.number = stream, number

    def synchronize(self) -> None:
        while self.stream.ended < self.number:
            to, source = self.stream.waiting.pop(0)
            to.copy_(source)
            self.stream.ended += 1


@contextmanager
def stream(on: Stream) -> Iterator[None]:
    """What stands in for ``torch.cuda.stream``."""
    NOW.append(on)
    try:
        yield
    finally:
        NOW.pop()


class Current:
    """The stream that works at once; it counts who waits for it."""

    waits = 0

    def synchronize(self) -> None:
        Current.waits += 1


def current_stream(device: Any = None) -> Current:
    """What stands in for ``torch.cuda.current_stream``."""
    return Current()
