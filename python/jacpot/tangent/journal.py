"""A journal of finished blocks, which lets a long computation continue after it was killed."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import time
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy
import torch
from torch import Tensor

__all__ = ["Journal", "checksum", "fingerprint"]

FLUSH_SECONDS = 10.0

Pair = tuple[int, int]

_LINE = re.compile(r"(\d+) (\d+) ([0-9a-f]{8}) \.")  # one that was written to its end


def checksum(values: Any) -> int:
    """CRC-32 of the bytes of an array's values, in their order."""
    return zlib.crc32(numpy.ascontiguousarray(values).data)


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

    A block is named only after the output was flushed, so that what the file says is on disk; and
    with its checksum, so that an output that was made anew, or damaged, is not taken for what it
    was.

    Parameters
    ----------
    path
        The file; None keeps no journal.
    header
        What identifies the computation. A journal of another one is refused; numbers with a
        fraction need only be close, as they may be rounded otherwise the next time.
    flush
        Makes what was written to the output durable.

    Attributes
    ----------
    finished
        The blocks that an earlier run finished, and the checksums of what it wrote.

    Raises
    ------
    ValueError
        If the file belongs to another computation.
    """

    def __init__(
        self, path: Path | None, header: dict[str, object], flush: Callable[[], None]
    ) -> None:
        self.path, self.flush = path, flush
        self.finished: dict[Pair, int] = {}
        self._waiting: dict[Pair, int] = {}
        self._flushed = time.monotonic()
        if path is None:
            return
        text = path.read_text(errors="replace") if path.exists() else ""
        if "\n" not in text:  # not even who began is known: then nothing was finished
            path.unlink(missing_ok=True)
            _append(path, json.dumps(header) + "\n")
            return
        first, *lines = text.splitlines()
        if not _same(first, header):
            raise ValueError(
                f"argument 'out' holds part of another computation, as {path} says: remove "
                f"that file to begin anew, or repeat the call that began it ({first})"
            )
        if not text.endswith("\n"):  # the last line was torn: it must not run into the next
            _append(path, "\n")
        for line in lines:
            if (words := _LINE.fullmatch(line)) is not None:
                i, j, found = words.groups()
                self.finished[int(i), int(j)] = int(found, 16)

    def done(self, pair: Pair, found: int) -> None:
        """Record a finished block and its checksum, at the latest at the next flush."""
        self._waiting[pair] = found
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.record()

    def record(self) -> None:
        """Flush the output, then name the blocks that it now holds."""
        if self.path is not None and self._waiting:
            self.flush()
            lines = [f"{i} {j} {found:08x} .\n" for (i, j), found in self._waiting.items()]
            _append(self.path, "".join(lines))
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


def _same(line: str, header: dict[str, object]) -> bool:
    """Whether a journal's first line says what the header says."""
    try:
        stored = json.loads(line)
    except ValueError:
        return False
    return (
        isinstance(stored, dict)
        and stored.keys() == header.keys()
        and all(
            math.isclose(value, wanted, rel_tol=1e-3)
            if isinstance(value, float) and isinstance(wanted, float)
            else value == wanted
            for value, wanted in ((stored[key], header[key]) for key in header)
        )
    )


def _append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
