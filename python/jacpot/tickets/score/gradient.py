"""Scores from the gradient of the loss: SNIP and GraSP."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from jacpot.nn.stand_ins import constant
from jacpot.tickets.score._functional import Loss, call, preserved, scored_parameters

__all__ = ["grasp", "snip"]


def _loss(
    module: nn.Module, x: Tensor, y: Tensor, loss: Loss, scored: Mapping[str, Tensor]
) -> Tensor:
    value = loss(call(module, x, scored), constant(y) if isinstance(y, Tensor) else y)
    if value.dim() != 0:
        raise ValueError(f"argument 'loss' must return one number, got shape {tuple(value.shape)}")
    return value


def _finite(score: dict[str, Tensor], what: str) -> dict[str, Tensor]:
    for name, value in score.items():
        if not bool(torch.isfinite(value).all()):
            raise RuntimeError(
                f"{what} of {name!r} is not finite: the loss or its gradient diverges"
            )
    return score


def snip(
    module: nn.Module,
    x: Tensor,
    y: Tensor,
    loss: Loss = cross_entropy,
    mask: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """How much the loss reacts to each connection, ``|θ ∂L/∂θ|``, which is ``|∂L/∂mask|``.

    Lee et al. 2019, *SNIP: single-shot network pruning based on connection sensitivity*.

    Parameters
    ----------
    module
        Scored in the mode that it is in.
    x, y
        Inputs and targets, one batch.
    loss
        From (outputs, targets) to one number.
    mask
        Where to score; see :mod:`jacpot.tickets.score`.

    Raises
    ------
    RuntimeError
        If a score is not finite.

    Examples
    --------
    >>> import torch
    >>> from jacpot import tickets
    >>> net = torch.nn.Linear(3, 2)
    >>> tickets.score.snip(net, torch.ones(4, 3), torch.tensor([0, 1, 0, 1]))["weight"].shape
    torch.Size([2, 3])
    """
    scored = scored_parameters(module, mask)
    with preserved(module):
        for weight in scored.values():
            weight.requires_grad_()
        value = _loss(module, x, y, loss, scored)
        gradients = torch.autograd.grad(value, list(scored.values()), materialize_grads=True)
    pairs = zip(scored.items(), gradients, strict=True)
    return _finite({name: (w.detach() * g).abs() for (name, w), g in pairs}, "the SNIP score")


def grasp(
    module: nn.Module,
    x: Tensor,
    y: Tensor,
    loss: Loss = cross_entropy,
    mask: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """How much removing each weight would lower the gradient norm: ``θ ∘ Hg``, with its sign.

    Wang et al. 2020, *Picking winning tickets before training by preserving gradient flow*: their
    ``S(-θ) = -θ ∘ Hg`` (equation 8) grows with what removal does for the gradient flow, and they
    prune its highest values. Higher means keep here, so this is ``-S(-θ)``; no absolute value is
    taken. For a loss that is quadratic in the scored weights it sums to ``‖g‖²``.

    Parameters are those of :func:`snip`. The loss must be twice differentiable by autograd.

    Examples
    --------
    >>> import torch
    >>> from jacpot import tickets
    >>> net = torch.nn.Linear(3, 2)
    >>> tickets.score.grasp(net, torch.ones(4, 3), torch.tensor([0, 1, 0, 1]))["weight"].shape
    torch.Size([2, 3])
    """
    scored = scored_parameters(module, mask)
    chosen = {name: torch.ones_like(w, dtype=torch.bool) for name, w in scored.items()}
    if mask is not None:
        chosen = {name: mask[name].to(w.device) for name, w in scored.items()}
    weights = list(scored.values())
    with preserved(module):
        for weight in weights:
            weight.requires_grad_()
        # Pruned weights have no part in the gradient flow.
        worn = {name: torch.where(chosen[name], w, 0) for name, w in scored.items()}
        value = _loss(module, x, y, loss, worn)
        first = torch.autograd.grad(value, weights, create_graph=True, materialize_grads=True)
        flow = sum(((g * g.detach()).sum() for g in first), start=torch.zeros((), device="cpu"))
        if flow.requires_grad:
            second = torch.autograd.grad(flow, weights, materialize_grads=True)
        else:  # a loss linear in the weights has no curvature
            second = tuple(torch.zeros_like(weight) for weight in weights)
    pairs = zip(scored.items(), second, strict=True)
    return _finite({name: w.detach() * h for (name, w), h in pairs}, "the GraSP score")
