"""Convex losses of the outputs: value, gradient, and a root of the Hessian for each example."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = [
    "LOSSES",
    "ConvexLoss",
    "CrossEntropy",
    "Huber",
    "Logistic",
    "Loss",
    "SquaredError",
    "Weighted",
    "flat_targets",
    "get_loss",
]


class Loss(Protocol):
    """A convex, twice differentiable loss.

    ``f`` is (N, K) float64; ``y`` is what `check` returned, one entry for each example.

    A loss whose Hessian vanishes where its gradient does not may have a method ``majorant_root``
    too: as `root`, of a matrix whose parabola touches the loss at f and is nowhere below it. Far
    from the minimum, Gauss-Newton steps on the network take it in place of the Hessian.
    """

    def check(self, y: Tensor, outputs: Tensor) -> Tensor:
        """Refuse targets that do not fit outputs (N, K); return them as the others want them."""

    def value(self, f: Tensor, y: Tensor) -> Tensor:
        """Give the loss of each example, (N,)."""

    def gradient(self, f: Tensor, y: Tensor) -> Tensor:
        """Give its gradient by the outputs, (N, K)."""

    def root(self, f: Tensor, y: Tensor) -> Tensor:
        """Give S (N, K, K) with the Hessian ``S Sᵀ``."""


def flat_targets(y: Tensor, outputs: Tensor, shape: torch.Size) -> Tensor:
    """Targets (N, *shape) of outputs with several axes as (N, K); others as they are."""
    if not isinstance(y, Tensor) or y.ndim < 3:
        return y
    if y.shape != (len(outputs), *shape):
        raise ValueError(
            f"argument 'y' must have shape {(len(outputs), *shape)} like the outputs, got "
            f"{tuple(y.shape)}"
        )
    return y.reshape(outputs.shape)


def _check_floats(y: Tensor, outputs: Tensor, name: str) -> Tensor:
    if not isinstance(y, Tensor):
        raise TypeError(f"argument 'y' must be a tensor, got {type(y).__name__}")
    if y.dtype not in (torch.float32, torch.float64):
        cure = "; labels become targets by torch.nn.functional.one_hot(y).float()"
        raise TypeError(
            f"argument 'y' must be float32 or float64 for loss {name!r}, got {y.dtype}"
            + (cure if name == "mse" else "")
        )
    if y.ndim == 1 and outputs.shape[1] == 1:
        y = y[:, None]
    if y.shape != outputs.shape:
        raise ValueError(
            f"argument 'y' must have shape {tuple(outputs.shape)} like the outputs, "
            f"got {tuple(y.shape)}"
        )
    if y.device != outputs.device:
        raise ValueError(
            f"argument 'y' must be on {outputs.device} like the outputs, got {y.device}"
        )
    if not torch.isfinite(y).all():
        raise ValueError("argument 'y' must be finite, got NaN or infinity")
    return y.detach().double()


@dataclass(frozen=True)
class SquaredError:
    """``½ ‖f - y‖²``."""

    def check(self, y: Tensor, outputs: Tensor) -> Tensor:
        """See `Loss`."""
        return _check_floats(y, outputs, "mse")

    def value(self, f: Tensor, y: Tensor) -> Tensor:
        """See `Loss`."""
        return 0.5 * (f - y).square().sum(1)

    def gradient(self, f: Tensor, y: Tensor) -> Tensor:
        """See `Loss`."""
        return f - y

    def root(self, f: Tensor, y: Tensor) -> Tensor:
        """See `Loss`."""
        return torch.eye(f.shape[1], dtype=f.dtype, device=f.device).expand(f.shape[0], -1, -1)


@dataclass(frozen=True)
class CrossEntropy:
    """Softmax cross-entropy; y holds labels (N,) int64 or probabilities (N, K)."""

    def check(self, y: Tensor, outputs: Tensor) -> Tensor:
        """See `Loss`."""
        if isinstance(y, Tensor) and y.dtype == torch.int64:
            if y.shape != outputs.shape[:1]:
                raise ValueError(
                    f"argument 'y' must have shape ({outputs.shape[0]},), got {tuple(y.shape)}"
                )
            if len(y) and not (int(y.min()) >= 0 and int(y.max()) < outputs.shape[1]):
                raise ValueError(f"argument 'y' must hold labels from 0 to {outputs.shape[1] - 1}")
            return torch.nn.functional.one_hot(y, outputs.shape[1]).double()
        y = _check_floats(y, outputs, "cross_entropy")
        if bool((y < 0).any()):
            raise ValueError(
                "argument 'y' must hold probabilities of at least 0 for loss 'cross_entropy', "
                f"got {float(y.min()):.3g}"
            )
        return y

    def value(self, f: Tensor, y: Tensor) -> Tensor:
        """See `Loss`."""
        return -(y * torch.log_softmax(f, dim=1)).sum(1)

    def gradient(self, f: Tensor, y: Tensor) -> Tensor:
        """See `Loss`."""
        return y.sum(1, keepdim=True) * torch.softmax(f, dim=1) - y

    def root(self, f: Tensor, y: Tensor) -> Tensor:
        """Give ``(I - p 1ᵀ) diag(√p)``: finite when p is saturated, with the right null space."""
        p = torch.softmax(f, dim=1)
        root = torch.diag_embed(p.sqrt()) - p[:, :, None] * p.sqrt()[:, None, :]
        return root * y.sum(1).sqrt()[:, None, None]


@dataclass(frozen=True)
class Logistic:
    """Binary cross-entropy of every output; y in [0, 1], (N, K): binary or multi-label."""

    def check(self, y: Tensor, outputs: Tensor) -> Tensor:
        """See `Loss`."""
        y = _check_floats(y, outputs, "logistic")
        if y.numel() and not (float(y.min()) >= 0 and float(y.max()) <= 1):
            raise ValueError("argument 'y' must lie in [0, 1] for loss 'logistic'")
        return y

    def value(self, f: Tensor, y: Tensor) -> Tensor:
        """See `Loss`."""
        return torch.nn.functional.binary_cross_entropy_with_logits(f, y, reduction="none").sum(1)

    def gradient(self, f: Tensor, y: Tensor) -> Tensor:
        """See `Loss`."""
        return torch.sigmoid(f) - y

    def root(self, f: Tensor, y: Tensor) -> Tensor:
        """See `Loss`."""
        return torch.diag_embed((torch.sigmoid(f) * torch.sigmoid(-f)).sqrt())


@dataclass(frozen=True)
class Huber:
    """Squared up to ``delta``, linear beyond, for every output.

    ``loss="huber"`` has a ``delta`` of 1; give the object for another.

    Examples
    --------
    >>> import torch
    >>> from jacpot.tangent.losses import Huber
    >>> f, y = torch.tensor([[3.0]]), torch.zeros(1, 1)
    >>> Huber(delta=2.0).value(f, y), Huber(delta=2.0).gradient(f, y)
    (tensor([4.]), tensor([[2.]]))
    """

    delta: float = 1.0

    def check(self, y: Tensor, outputs: Tensor) -> Tensor:
        """See `Loss`."""
        return _check_floats(y, outputs, "huber")

    def value(self, f: Tensor, y: Tensor) -> Tensor:
        """See `Loss`."""
        return torch.nn.functional.huber_loss(f, y, reduction="none", delta=self.delta).sum(1)

    def gradient(self, f: Tensor, y: Tensor) -> Tensor:
        """See `Loss`."""
        return (f - y).clamp(-self.delta, self.delta)

    def root(self, f: Tensor, y: Tensor) -> Tensor:
        """See `Loss`."""
        return torch.diag_embed(((f - y).abs() <= self.delta).double())

    def majorant_root(self, f: Tensor, y: Tensor) -> Tensor:
        """See `Loss`: the weights of iteratively reweighted least squares (Huber 1981)."""
        return torch.diag_embed((self.delta / (f - y).abs().clamp_min(self.delta)).sqrt())


@dataclass(frozen=True)
class ConvexLoss:
    """A loss of the user's.

    Parameters
    ----------
    value, gradient, hessian
        Functions of outputs (N, K) float64 and targets that give (N,), (N, K) and (N, K, K),
        positive semidefinite.

    Examples
    --------
    >>> import torch
    >>> from jacpot.tangent.losses import ConvexLoss
    >>> loss = ConvexLoss(
    ...     value=lambda f, y: torch.cosh(f - y).sum(1),
    ...     gradient=lambda f, y: torch.sinh(f - y),
    ...     hessian=lambda f, y: torch.diag_embed(torch.cosh(f - y)),
    ... )
    >>> loss.root(torch.zeros(1, 1).double(), torch.zeros(1, 1).double())
    tensor([[[1.]]], dtype=torch.float64)
    """

    value: Callable[[Tensor, Tensor], Tensor]
    gradient: Callable[[Tensor, Tensor], Tensor]
    hessian: Callable[[Tensor, Tensor], Tensor]

    def check(self, y: Tensor, outputs: Tensor) -> Tensor:
        """See `Loss`."""
        if not isinstance(y, Tensor) or y.shape[:1] != outputs.shape[:1]:
            raise ValueError(f"argument 'y' must be a tensor with {outputs.shape[0]} rows")
        return y.double() if y.is_floating_point() else y

    def root(self, f: Tensor, y: Tensor) -> Tensor:
        """See `Loss`."""
        values, vectors = torch.linalg.eigh(self.hessian(f, y))
        root: Tensor = vectors * values.clamp_min(0).sqrt()[:, None, :]
        return root


@dataclass(frozen=True)
class Weighted:
    """Another loss times a weight (N,) for each example."""

    loss: Loss
    weights: Tensor

    def check(self, y: Tensor, outputs: Tensor) -> Tensor:
        """See `Loss`."""
        return self.loss.check(y, outputs)

    def value(self, f: Tensor, y: Tensor) -> Tensor:
        """See `Loss`."""
        return self.weights * self.loss.value(f, y)

    def gradient(self, f: Tensor, y: Tensor) -> Tensor:
        """See `Loss`."""
        return self.weights[:, None] * self.loss.gradient(f, y)

    def root(self, f: Tensor, y: Tensor) -> Tensor:
        """See `Loss`."""
        return self.weights.sqrt()[:, None, None] * self.loss.root(f, y)


LOSSES: dict[str, Loss] = {
    "mse": SquaredError(),
    "cross_entropy": CrossEntropy(),
    "logistic": Logistic(),
    "huber": Huber(),
}


def get_loss(loss: str | Loss) -> Loss:
    """Look a loss up by name; an object with the methods of `Loss` is returned as it is."""
    if isinstance(loss, str):
        if loss not in LOSSES:
            raise ValueError(f"argument 'loss' must be one of {sorted(LOSSES)}, got {loss!r}")
        return LOSSES[loss]
    for name in ("check", "value", "gradient", "root"):
        if not callable(getattr(loss, name, None)):
            raise TypeError(f"argument 'loss' must be a name or have a method {name!r}")
    return loss
