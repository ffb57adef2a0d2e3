"""What blocks that hold signals have in common."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["OfSignals"]


class OfSignals:
    """A block with signals ``(N, K, T, ...)``, whose sizes and whereabouts are the block's."""

    signals: Tensor

    @property
    def n_examples(self) -> int:
        """Examples, ``N``."""
        return self.signals.shape[0]

    @property
    def n_outputs(self) -> int:
        """Outputs per example, ``K``."""
        return self.signals.shape[1]

    @property
    def n_positions(self) -> int:
        """Positions ``T`` at which an example uses the parameters."""
        return self.signals.shape[2]

    @property
    def dtype(self) -> torch.dtype:
        """The element type."""
        return self.signals.dtype

    @property
    def device(self) -> torch.device:
        """Where the factors lie."""
        return self.signals.device
