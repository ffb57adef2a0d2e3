"""Scores from the tangent kernel: what each weight contributes to it.

The kernel is a sum over parameters, ``Θ = Σ_p J_p J_pᵀ`` with ``J_p`` the Jacobian's column of
parameter ``p``, so its trace, its alignment with labels and its norm split into one share a weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from jacpot.nn.stand_ins import copy_of
from jacpot.nn.worn import named_parameters
from jacpot.tangent import Jacobian, jacobian
from jacpot.tickets.mask import Mask, chosen_mask
from jacpot.tickets.parametrization import remove
from jacpot.tickets.score._functional import scored_parameters

__all__ = ["centered_targets", "fisher", "ntk"]

# Right-hand sides at a time: bounds the memory of (P, columns) products.
_COLUMNS = 64


def scored_jacobian(
    module: nn.Module, x: Tensor, mask: Mapping[str, Tensor] | None
) -> tuple[Jacobian, Mask]:
    """The Jacobian by the scored parameters alone, in eval mode, at the masked weights."""
    chosen = chosen_mask(module, mask)
    network = remove(copy_of(module)).eval()  # scoring leaves no trace on the module
    for name, parameter in named_parameters(network).items():
        parameter.requires_grad_(name in chosen)
    return jacobian(network, x, mask=chosen), chosen


def centered_targets(y: Tensor, outputs: Tensor) -> Tensor:
    """Targets ``(N, K)`` in float64 with the mean of each output at zero; labels become one-hot."""
    if not y.is_floating_point():
        y = nn.functional.one_hot(y.long(), outputs.shape[1])
    if y.shape != outputs.shape:
        raise ValueError(
            f"argument 'y' must be labels (N,) or targets {tuple(outputs.shape)}, "
            f"got shape {tuple(y.shape)}"
        )
    y = y.to(outputs.device, torch.float64)
    return y - y.mean(dim=0)


def fisher(
    module: nn.Module, x: Tensor, mask: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The change of the outputs when a weight is removed, ``θ² mean_n ‖J_np‖²``.

    The diagonal of the Gauss-Newton matrix of the squared loss (the Fisher information of a
    Gaussian output) in the place of the Hessian of LeCun et al. 1990, *Optimal brain damage*. It
    needs no labels.

    Parameters
    ----------
    module
        Scored in eval mode.
    x
        Inputs.
    mask
        Where to score; see :mod:`jacpot.tickets.score`.

    Examples
    --------
    >>> import torch
    >>> from jacpot import tickets
    >>> layer = torch.nn.Linear(2, 1)
    >>> _ = layer.weight.data.fill_(2.0)
    >>> tickets.score.fisher(layer, torch.tensor([[1.0, 3.0]]))["weight"].tolist()
    [[4.0, 36.0]]
    """
    columns, _ = scored_jacobian(module, x, mask)
    squared = columns.unflatten(columns.column_norms().square() / max(columns.n_examples, 1))
    weights = scored_parameters(module, mask)
    return {name: squared[name] * weight.square() for name, weight in weights.items()}


def ntk(
    module: nn.Module,
    x: Tensor,
    y: Tensor | None = None,
    criterion: Literal["trace", "alignment", "distance"] = "trace",
    mask: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Each weight's part in the tangent kernel at ``x``.

    Parameters
    ----------
    module
        Scored in eval mode.
    x
        Inputs; the kernel is taken on them.
    y
        Labels ``(N,)`` or targets ``(N, K)``, for ``"alignment"``.
    criterion
        ``"trace"``: ``‖J_p‖²``; a ticket's scores sum to the trace of its kernel at these weights.
        ``"alignment"``: ``(J_pᵀ y)²`` with centred targets; they sum to ``yᵀ Θ y`` (kernel-target
        alignment, Cristianini et al. 2001). ``"distance"``: how much further the kernel gets
        from that of the dense network, in squared Frobenius norm, when the weight's column is
        dropped: ``2 J_pᵀ (Θ_dense - Θ) J_p + ‖J_p‖⁴`` (the objective of Liu and Zenke 2020,
        *Finding trainable sparse networks through neural tangent transfer*). It changes with the
        mask, so prune iteratively.
    mask
        Where to score; see :mod:`jacpot.tickets.score`. Pruned weights have no column, and score 0.

    Raises
    ------
    ValueError
        If ``criterion`` is unknown, or ``"alignment"`` has no fitting ``y``.

    Examples
    --------
    >>> import torch, jacpot
    >>> from jacpot import Mask, tickets
    >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    >>> x = torch.randn(5, 3)
    >>> total = sum(s.sum() for s in tickets.score.ntk(net, x, mask=Mask.ones(net, "*")).values())
    >>> kernel = jacpot.ntk(net, x, outputs="trace")
    >>> bool((total - kernel.trace()).abs() < 1e-4 * total)
    True
    """
    columns, chosen = scored_jacobian(module, x, mask)
    if criterion == "trace":
        values = columns.column_norms().square()
    elif criterion == "alignment":
        if y is None:
            raise ValueError("argument 'y' is needed for the criterion 'alignment'")
        targets = centered_targets(y, columns.outputs).to(columns.dtype)
        values = (columns.T @ targets).square()
    elif criterion == "distance":
        values = columns.column_norms() ** 4
        if mask is not None:
            dense, _ = scored_jacobian(module, x, Mask(chosen) | ~chosen)
            values = values + 2 * _quadratic_form(columns, dense.gram() - columns.gram())
    else:
        raise ValueError(
            f"argument 'criterion' must be 'trace', 'alignment' or 'distance', got {criterion!r}"
        )
    return columns.unflatten(values)


def _quadratic_form(columns: Jacobian, kernel: Tensor) -> Tensor:
    """``J_pᵀ R J_p`` for every column; R is ``(N, K, N, K)`` and symmetric."""
    size = columns.shape[0]
    roots, vectors = torch.linalg.eigh(kernel.reshape(size, size).double())
    total = columns.outputs.new_zeros(columns.n_parameters)
    vectors = vectors.to(columns.dtype).view(*columns.outputs.shape, size)
    for start in range(0, size, _COLUMNS):
        block = slice(start, start + _COLUMNS)
        products = columns.T @ vectors[..., block].contiguous()
        total += products.square() @ roots[block].to(columns.dtype)
    return total
