"""SynFlow: the flow of synaptic strength, which needs no data."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from jacpot.tickets.score._functional import call, preserved, refuse_indices, scored_parameters

__all__ = ["synflow"]


def synflow(
    module: nn.Module, x: Tensor, mask: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Each weight's share of the total flow ``1ᵀ Π|θ_l| 1`` through the network, ``θ ∂R/∂θ``.

    Tanaka et al. 2020, *Pruning neural networks without any data by iteratively conserving
    synaptic flow*, equation 3. Evaluated in eval mode, in float64 (the flow of a deep network
    leaves the range of float32), at absolute values of all parameters and with biases at zero, so
    that the scores of each layer of a plain network sum to the same flow. Buffers keep their sign.

    One call gives one-shot scores; at high compression score again after every small step of
    pruning, with :func:`jacpot.tickets.prune_iteratively`.

    Parameters
    ----------
    module
        Any module with one tensor in and out whose activations pass positive numbers on.
    x
        Any batch; only its shape beyond the first dimension matters.
    mask
        Where to score; see :mod:`jacpot.tickets.score`.

    Returns
    -------
    dict
        float64 tensors, none negative.

    Raises
    ------
    TypeError
        If the input is indices of an embedding.
    RuntimeError
        If the flow is not finite even in float64.

    Examples
    --------
    >>> import torch
    >>> from jacpot import tickets
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Linear(5, 2))
    >>> scores = tickets.score.synflow(net, torch.ones(1, 4))
    >>> a, b = scores["0.weight"].sum(), scores["1.weight"].sum()
    >>> bool((a - b).abs() < 1e-12 * a)
    True
    """

    def positive(name: str, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        if name in buffers:
            return tensor.double()
        if name.rpartition(".")[2].endswith("bias"):
            return torch.zeros_like(tensor, dtype=torch.float64)
        return tensor.double().abs()

    scored = {n: w.double().abs() for n, w in scored_parameters(module, mask).items()}
    refuse_indices(module, x)
    buffers = {name for name, _ in module.named_buffers()}
    ones = torch.ones((1, *x.shape[1:]), dtype=torch.float64, device=x.device)
    with preserved(module, training=False):
        for weight in scored.values():
            weight.requires_grad_()
        flow = call(module, ones, scored, positive).sum()
        gradients = torch.autograd.grad(flow, list(scored.values()), materialize_grads=True)
    scores = {}
    for (name, weight), gradient in zip(scored.items(), gradients, strict=True):
        scores[name] = weight.detach() * gradient
        if not bool(torch.isfinite(scores[name]).all()):
            raise RuntimeError(f"the flow through {name!r} is not finite in float64")
    return scores
