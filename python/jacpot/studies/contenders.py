"""The four ways to fit the data that `jacpot compare` sets against each other.

All start from one random network θ0 and minimise half the squared distance to the targets:

- ``tangent``: the tangent-space model ``f(x, θ0) + J(x) Δ``, solved for Δ with a ridge.
- ``network``: the network itself, trained by gradient steps.
- ``last_layer``: only the output layer moves, on features frozen at θ0; closed form, same ridges.
- ``one_step``: the network at ``θ0 + Δ``, Δ from ``tangent``: one full Gauss-Newton step.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import jacpot
from jacpot.studies.split import Split
from jacpot.studies.training import Recipe, predict, train

__all__ = ["CONTENDERS", "RIDGES", "Fitted", "last_layer", "one_step", "tangent", "trained"]

CONTENDERS = {
    "tangent": "Tangent space",
    "network": "Trained network",
    "last_layer": "Last layer only",
    "one_step": "Network at θ0 + Δ",
}

# Ridges to choose from, in units of the mean diagonal of the kernel on the training examples, so
# that they mean the same for every network and data set.
RIDGES = (1.0, 0.1, 1e-2, 1e-3, 1e-4)

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Fitted:
    """A fitted function.

    Attributes
    ----------
    function
        Maps inputs ``(N, ...)`` to outputs ``(N, K)``.
    displacement
        Parameters after minus before, by name; what did not move may be absent.
    seconds
        Wall time of the fit, the choice of the ridge included.
    details
        What to record beside the errors; plain numbers, strings and lists.
    """

    function: Callable[[Tensor], Tensor]
    displacement: dict[str, Tensor]
    seconds: float
    details: dict[str, Any] = field(default_factory=dict)


def tangent(
    network: nn.Module,
    parts: Split,
    ridges: Sequence[float],
    tol: float = 1e-4,
    progress: Progress = lambda stage: None,
) -> Fitted:
    """Fit the tangent-space model of ``network``, with the ridge of the best validation loss.

    Ridges are tried from strong to weak; once the validation loss has risen the weaker ones,
    which cost most, are left out.

    Parameters
    ----------
    network
        The random network θ0, unchanged by the call.
    parts
        Training and validation sets.
    ridges
        In units of the mean diagonal of the kernel on the training examples.
    tol
        Relative residual at which the linear system counts as solved.
    progress
        Called with a line of text as the fit goes on.

    Returns
    -------
    Fitted
    """
    start = time.perf_counter()
    x, targets = parts.train.x, parts.train.targets
    scale = float(jacpot.jacobian(network, x).row_norms().double().square().mean())
    path: list[dict[str, Any]] = []
    best: jacpot.LinearizedModule | None = None
    for ridge in sorted(ridges, reverse=True):
        progress(f"tangent space, ridge {ridge:g}")
        model = jacpot.linearize(network)
        solution = model.fit(x, targets, ridge=ridge * scale, tol=tol)
        outputs = predict(model, parts.validation.x)
        loss = parts.loss(outputs, parts.validation)
        path.append(
            {
                "ridge": ridge,
                "validation_loss": loss,
                "status": solution.status.name.replace("_", " "),
                "converged": bool(solution.converged),
                "iterations": int(solution.iterations),
                "relative_residual": float(solution.relative_residual),
                "solver": str(solution),
            }
        )
        if loss > min(entry["validation_loss"] for entry in path):
            break
        best = model
    assert best is not None  # the first ridge has nothing to be worse than
    chosen = min(path, key=lambda entry: entry["validation_loss"])
    model = best
    details = {**chosen, "ridge_absolute": chosen["ridge"] * scale, "path": path}
    return Fitted(model, model.delta, time.perf_counter() - start, details)


def trained(
    network: nn.Module,
    parts: Split,
    recipe: Recipe,
    seed: int,
    progress: Progress = lambda stage: None,
) -> Fitted:
    """Train a copy of ``network`` until its validation loss no longer falls.

    Parameters
    ----------
    network
        The random network θ0, unchanged by the call.
    parts
        Training and validation sets.
    recipe, seed
        As `jacpot.studies.training.train` takes them.
    progress
        Called with a line of text as the fit goes on.

    Returns
    -------
    Fitted
        ``function`` is the trained `torch.nn.Module`.
    """
    start = time.perf_counter()
    final = copy.deepcopy(network)
    training = train(final, parts, recipe, seed, lambda epoch: progress(f"training, epoch {epoch}"))
    before = dict(network.named_parameters())
    displacement = {
        name: (value - before[name]).detach() for name, value in final.named_parameters()
    }
    details = {
        "converged": training.converged,
        "epochs": len(training.train_loss),
        "best_epoch": training.best_epoch,
        "train_loss": training.train_loss,
        "validation_loss": training.validation_loss,
    }
    return Fitted(final, displacement, time.perf_counter() - start, details)


@torch.no_grad()
def last_layer(network: nn.Sequential, parts: Split, ridges: Sequence[float]) -> Fitted:
    """Fit the output layer of ``network`` on its frozen random features, in closed form.

    One eigendecomposition of the features' second moments gives the fit for every ridge.

    Parameters
    ----------
    network
        The random network θ0, its last module a linear layer; unchanged by the call.
    parts
        Training and validation sets.
    ridges
        In units of the mean squared norm of the features, the bias's 1 among them.

    Returns
    -------
    Fitted
    """
    start = time.perf_counter()
    body, head = network[:-1], network[-1]
    assert isinstance(head, nn.Linear)

    def features(x: Tensor) -> Tensor:
        hidden = predict(body, x).double()
        return torch.cat([hidden, torch.ones_like(hidden[:, :1])], 1)

    weight = torch.cat([head.weight, head.bias[:, None]], 1).double().T  # (features, K)
    phi = features(parts.train.x)
    residual = parts.train.targets.double() - phi @ weight
    values, vectors = torch.linalg.eigh(phi.T @ phi)
    scale = float(phi.square().sum(1).mean())
    projected = vectors.T @ (phi.T @ residual)
    phi_validation = features(parts.validation.x)
    # What is below the rounding of the largest eigenvalue is no feature: without a ridge the fit
    # then has the least norm.
    kept = values > len(values) * torch.finfo(values.dtype).eps * values[-1]
    path: list[dict[str, Any]] = []
    deltas: list[Tensor] = []
    for ridge in ridges:
        gains = torch.where(kept, 1 / (values + ridge * scale), torch.zeros_like(values))
        deltas.append(vectors @ (gains[:, None] * projected))
        loss = parts.loss(phi_validation @ (weight + deltas[-1]), parts.validation)
        path.append({"ridge": ridge, "validation_loss": loss})
    best = min(range(len(path)), key=lambda i: path[i]["validation_loss"])
    delta = deltas[best].T.to(head.weight.dtype)
    name = str(len(network) - 1)
    displacement = {f"{name}.weight": delta[:, :-1], f"{name}.bias": delta[:, -1]}
    moved = _displaced(network, displacement)
    details = {**path[best], "ridge_absolute": path[best]["ridge"] * scale, "path": path}
    return Fitted(moved, displacement, time.perf_counter() - start, details)


def one_step(network: nn.Module, fitted: Fitted) -> Fitted:
    """Put the tangent-space solution back into the network itself: ``f(x, θ0 + Δ)``.

    Parameters
    ----------
    network
        The random network θ0, unchanged by the call.
    fitted
        What `tangent` returned.

    Returns
    -------
    Fitted
        Its time is that of the tangent-space fit.
    """
    moved = _displaced(network, fitted.displacement)
    return Fitted(moved, fitted.displacement, fitted.seconds)


@torch.no_grad()
def _displaced(network: nn.Module, displacement: Mapping[str, Tensor]) -> nn.Module:
    """Copy a network and move the copy's parameters."""
    moved = copy.deepcopy(network)
    for name, parameter in moved.named_parameters():
        if name in displacement:
            parameter.add_(displacement[name].reshape(parameter.shape))
    return moved
