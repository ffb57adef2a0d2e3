"""A journal of finished blocks, which lets a long computation continue after it was killed."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

__all__ = ["Journal", "fingerprint"]

FLUSH_SECONDS = 10.0

Pair = tuple[int, int]


def fingerprint(words: Iterable[object], tensors: Iterable[Tensor]) -> str:
    """Digest of everything that a result depends on."""
    digest = hashlib.blake2b(digest_size=16)
    for word in words:
        digest.update(repr(word).encode() + b"\0")
    for tensor in tensors:
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{values.dtype}{tuple(values.shape)}\0".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class Journal:
    """Names the finished blocks in a file beside the output.

    A block is named only after the output was flushed, so that what the file says is on disk.

    Parameters
    ----------
    path
        The file; None keeps no journal.
    header
        What identifies the computation. A journal of another one is refused.
    flush
        Makes what was written to the output durable.

    Attributes
    ----------
    finished
        The blocks that an earlier run finished.

    Raises
    ------
    ValueError
        If the file belongs to another computation.
    """

    def __init__(
        self, path: Path | None, header: dict[str, object], flush: Callable[[], None]
    ) -> None:
        self.path, self.flush = path, flush
        self.finished: set[Pair] = set()
        self._waiting: list[Pair] = []
        self._flushed = time.monotonic()
        if path is None:
            return
        if path.exists():
            first, *lines = path.read_text().splitlines() or [""]
            if first != json.dumps(header):
                raise ValueError(
                    f"argument 'out' holds part of another computation, as {path} says: remove "
                    f"that file to begin anew, or repeat the call that began it ({first})"
                )
            for line in lines:
                words = line.split()
                if len(words) == 3 and words[2] == ".":  # a line that was written to its end
                    self.finished.add((int(words[0]), int(words[1])))
        else:
            _append(path, json.dumps(header) + "\n")

    def done(self, pair: Pair) -> None:
        """Record a finished block, at the latest at the next flush."""
        self._waiting.append(pair)
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.record()

    def record(self) -> None:
        """Flush the output, then name the blocks that it now holds."""
        if self.path is not None and self._waiting:
            self.flush()
            _append(self.path, "".join(f"{i} {j} .\n" for i, j in self._waiting))
        self._waiting.clear()
        self._flushed = time.monotonic()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.record()
        if kind is None and self.path is not None:
            self.flush()
            self.path.unlink()


def _append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
