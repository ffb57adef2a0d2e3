"""Random state that is set for a while and then put back."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy
import torch

__all__ = ["seeded"]


@contextmanager
def seeded(*seeds: int) -> Iterator[int]:
    """Seed PyTorch, NumPy and Python from all of ``seeds``; afterwards their states are back.

    Gives the one 63-bit number that they were seeded with.
    """
    high, low = numpy.random.SeedSequence([seed % 2**64 for seed in seeds]).generate_state(2)
    seed = ((int(high) & 0x7FFFFFFF) << 32) | int(low)
    python, legacy = random.getstate(), numpy.random.get_state()  # noqa: NPY002
    devices = range(torch.cuda.device_count())
    try:
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            numpy.random.seed(seed & 0xFFFFFFFF)  # noqa: NPY002
            random.seed(seed)
            yield seed
    finally:
        random.setstate(python)
        numpy.random.set_state(legacy)  # noqa: NPY002
