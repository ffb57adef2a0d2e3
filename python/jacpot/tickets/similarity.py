"""The tangent kernels of tickets: how alike they are, and how well each one fits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from jacpot.linalg import Solution
from jacpot.tangent import jacobian
from jacpot.tangent.linearize import LinearizedModule, linearize
from jacpot.tickets.mask import Mask

__all__ = ["KernelSimilarity", "TangentFit", "kernel_similarity", "tangent_fits"]


@dataclass(eq=False)
class KernelSimilarity:
    """Two tangent kernels on the same inputs.

    Attributes
    ----------
    cka
        Centred kernel alignment, 0 to 1 (Cortes et al. 2012): the same up to scale is 1.
    distance
        Frobenius distance by the norm of the first kernel.
    spectra
        Eigenvalues of either kernel, from high to low, ``(N,)`` float64.

    Examples
    --------
    >>> import torch
    >>> from jacpot import tickets
    >>> net = torch.nn.Sequential(torch.nn.Linear(3, 20), torch.nn.ReLU(), torch.nn.Linear(20, 2))
    >>> half = tickets.prune(tickets.score.magnitude(net), 0.5)
    >>> alike = tickets.kernel_similarity(net, torch.randn(10, 3), None, half)
    >>> 0 < alike.cka < 1, alike.spectra[0].shape
    (True, torch.Size([10]))
    """

    cka: float
    distance: float
    spectra: tuple[Tensor, Tensor]

    @property
    def effective_ranks(self) -> tuple[float, float]:
        """Exponential of the entropy of either spectrum (Roy and Vetterli 2007)."""
        return _effective_rank(self.spectra[0]), _effective_rank(self.spectra[1])


def _effective_rank(spectrum: Tensor) -> float:
    shares = spectrum.clamp(min=0)
    shares = shares[shares > 0] / shares.sum()
    return float(torch.exp(-(shares * shares.log()).sum())) if len(shares) else 0.0


def kernel_similarity(
    module: nn.Module,
    x: Tensor,
    a: Mapping[str, Tensor] | None = None,
    b: Mapping[str, Tensor] | None = None,
    other: nn.Module | None = None,
) -> KernelSimilarity:
    """Compare the tangent kernels of two tickets, summed over outputs.

    Parameters
    ----------
    module
        The network, in eval mode if that matters.
    x
        Inputs ``(N, ...)``; the kernels are ``(N, N)``.
    a, b
        Masks of the first and second ticket; None is the dense network.
    other
        The network of the second ticket if it has other weights.

    Returns
    -------
    KernelSimilarity

    Examples
    --------
    >>> import torch
    >>> from jacpot import Mask, tickets
    >>> net = torch.nn.Linear(3, 2)
    >>> tickets.kernel_similarity(net, torch.randn(5, 3), None, Mask.ones(net)).distance
    0.0
    """
    first = jacobian(module, x, mask=a).gram(outputs="trace").double()
    second = jacobian(module if other is None else other, x, mask=b).gram(outputs="trace").double()
    norm = float(first.norm())
    return KernelSimilarity(
        cka=alignment(first, second),
        distance=float((first - second).norm()) / norm if norm else float("nan"),
        spectra=(torch.linalg.eigvalsh(first).flip(0), torch.linalg.eigvalsh(second).flip(0)),
    )


def alignment(first: Tensor, second: Tensor) -> float:
    """Centred alignment of two kernels ``(N, N)``; NaN where centring leaves nothing of one.

    Cortes, Mohri and Rostamizadeh 2012, eq. 6.
    """
    if not all(kernel.numel() and _varies(kernel) for kernel in (first, second)):
        return math.nan
    p, q = _centered(first), _centered(second)
    return float((p * q).sum() / (p.norm() * q.norm()))


def _varies(kernel: Tensor) -> bool:
    rounding = 10 * len(kernel) * torch.finfo(kernel.dtype).eps
    return bool(_centered(kernel).norm() > rounding * kernel.norm())


def _centered(kernel: Tensor) -> Tensor:
    kernel = kernel - kernel.mean(dim=0, keepdim=True)
    return kernel - kernel.mean(dim=1, keepdim=True)


@dataclass(eq=False)
class TangentFit:
    """What the tangent space of one ticket can do.

    Attributes
    ----------
    density
        Of the ticket.
    function
        The linearized ticket, fitted.
    solution
        How the solve went.
    train_loss, test_loss
        Mean over examples of half the squared distance to the targets.
    train_accuracy, test_accuracy
        Share of right labels; None where ``y`` is not labels.

    Examples
    --------
    >>> import torch
    >>> from jacpot import tickets
    >>> net, x = torch.nn.Linear(3, 2), torch.eye(3)
    >>> fit = tickets.tangent_fits(net, {"all": None}, x, x[:, :2], x, x[:, :2])["all"]
    >>> fit.density, round(fit.test_loss, 6), fit.test_accuracy
    (1.0, 0.0, None)
    """

    density: float
    function: LinearizedModule
    solution: Solution
    train_loss: float
    test_loss: float
    train_accuracy: float | None
    test_accuracy: float | None


def tangent_fits(
    module: nn.Module,
    masks: Mapping[str, Mapping[str, Tensor] | None],
    x: Tensor,
    y: Tensor,
    x_test: Tensor,
    y_test: Tensor,
    **options: Any,
) -> dict[str, TangentFit]:
    """Fit the tangent space of a network restricted to each of several tickets.

    This is the updated lottery ticket hypothesis put to the test without any training: the tickets
    are the functions of the tangent space, and a mask says which of them are left.

    Parameters
    ----------
    module
        The network to expand.
    masks
        Tickets by name; None is the dense network.
    x, y, x_test, y_test
        Examples, and labels ``(N,)`` or targets ``(N, K)``. Labels are fitted as one-hot minus
        ``1/K``.
    **options
        For :meth:`jacpot.LinearizedModule.fit`: ``ridge``, ``tol``, ``method``...

    Returns
    -------
    dict
        A :class:`TangentFit` by name.

    Examples
    --------
    >>> import torch
    >>> from jacpot import Mask, tickets
    >>> net = torch.nn.Sequential(torch.nn.Linear(3, 20), torch.nn.ReLU(), torch.nn.Linear(20, 2))
    >>> x = torch.randn(30, 3)
    >>> y = (x[:, 0] > 0).long()
    >>> half = tickets.prune(tickets.score.magnitude(net), 0.5)
    >>> fits = tickets.tangent_fits(net, {"dense": None, "half": half}, x, y, x, y, ridge=0.1)
    >>> fits["half"].density, fits["half"].solution.converged
    (0.5, True)
    """
    results = {}
    for name, mask in masks.items():
        function = linearize(module, mask=mask)
        with torch.no_grad():
            like = function(x[:1])
        targets, test_targets = _targets(y, like), _targets(y_test, like)
        solution = function.fit(x, targets, **options)
        with torch.no_grad():
            train, test = function(x), function(x_test)
        results[name] = TangentFit(
            density=1.0 if mask is None else Mask(mask).density,
            function=function,
            solution=solution,
            train_loss=_loss(train, targets),
            test_loss=_loss(test, test_targets),
            train_accuracy=_accuracy(train, y),
            test_accuracy=_accuracy(test, y_test),
        )
    return results


def _targets(y: Tensor, like: Tensor) -> Tensor:
    if y.is_floating_point():
        return y
    one_hot = nn.functional.one_hot(y.long(), like.shape[1])
    return one_hot.to(like) - 1 / like.shape[1]


def _loss(outputs: Tensor, targets: Tensor) -> float:
    return float((outputs - targets).double().square().sum(dim=1).mean() / 2)


def _accuracy(outputs: Tensor, y: Tensor) -> float | None:
    if y.is_floating_point():
        return None
    return float((outputs.argmax(dim=1) == y).double().mean())
