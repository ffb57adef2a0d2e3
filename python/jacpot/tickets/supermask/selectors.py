"""The ways to choose weights by trained scores: each turns a frozen weight into the one used."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Biprop", "EdgePopup", "Selector", "Zhou"]


class _TopShare(torch.autograd.Function):
    """1 for the ``count`` highest scores, else 0; the gradient goes straight through."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, count: int) -> Tensor:
        order = torch.topk(scores.flatten(), count, sorted=False).indices
        return torch.zeros_like(scores).view(-1).index_fill_(0, order, 1).view_as(scores)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class _Bernoulli(torch.autograd.Function):
    """1 with the given probability; the gradient with respect to it goes straight through."""

    @staticmethod
    def forward(ctx: Any, probability: Tensor) -> Tensor:
        return torch.bernoulli(probability)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


class Selector(nn.Module):
    """A parametrization of a frozen weight by trained ``scores``."""

    def __init__(self, scores: Tensor) -> None:
        super().__init__()
        self.scores = nn.Parameter(scores)

    def mask(self) -> Tensor:
        """The weights kept, as bools."""
        raise NotImplementedError


class EdgePopup(Selector):
    """The share ``density`` of weights with the highest scores, as they are.

    Ramanujan et al. 2020, *What's hidden in a randomly weighted neural network?*
    """

    def __init__(self, weight: Tensor, density: float) -> None:
        scores = torch.empty_like(weight)
        nn.init.kaiming_uniform_(scores, a=math.sqrt(5))
        super().__init__(scores)
        self.count = math.floor(density * weight.numel() + 0.5)

    def mask(self) -> Tensor:
        """The weights kept, as bools."""
        with torch.no_grad():
            chosen: Tensor = _TopShare.apply(self.scores, self.count)  # type: ignore[no-untyped-call]
            return chosen.bool()

    def forward(self, weight: Tensor) -> Tensor:
        """The weight with the others at zero."""
        chosen: Tensor = _TopShare.apply(self.scores, self.count)  # type: ignore[no-untyped-call]
        return weight * chosen


class Biprop(EdgePopup):
    """One bit a weight: the kept ones' signs, times one scale a layer.

    The scale is the mean magnitude of the kept weights, which is the least-squares one.
    Diffenderfer and Kailkhura 2021, *Multi-prize lottery ticket hypothesis*, equation 3.
    """

    def forward(self, weight: Tensor) -> Tensor:
        """``scale * sign(weight)`` at the kept weights, zero at the others."""
        chosen: Tensor = _TopShare.apply(self.scores, self.count)  # type: ignore[no-untyped-call]
        scale = (weight.abs() * chosen.detach()).sum() / max(self.count, 1)
        return scale * weight.sign() * chosen


class Zhou(Selector):
    """Each weight is there with probability ``sigmoid(score)``, drawn at every training step.

    In eval mode the more probable is taken. With ``rescale`` the weight is multiplied by
    (all / kept), so that the layer's output keeps its size whatever the density.
    Zhou et al. 2019, *Deconstructing lottery tickets*, sections 5.1 and 5.2.
    """

    def __init__(self, weight: Tensor, density: float, rescale: bool) -> None:
        start = torch.logit(torch.tensor(density, dtype=weight.dtype)).item()
        super().__init__(torch.full_like(weight, start))
        self.rescale = rescale

    def mask(self) -> Tensor:
        """The weights that are more probably kept than not."""
        return self.scores.detach() >= 0

    def forward(self, weight: Tensor) -> Tensor:
        """The weight times a drawn mask, in eval mode times the most probable one."""
        probability = torch.sigmoid(self.scores)
        if self.training:
            chosen: Tensor = _Bernoulli.apply(probability)  # type: ignore[no-untyped-call]
        else:
            chosen = self.mask().to(weight.dtype)
        if self.rescale:
            chosen = chosen * (chosen.numel() / chosen.detach().sum().clamp(min=1))
        return weight * chosen
