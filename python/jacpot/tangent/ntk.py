"""The tangent kernel of a network, streamed block by block."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from jacpot.tangent.jacobian import Outputs, Wrt, jacobian
from jacpot.tangent.network import Inputs, Output

__all__ = ["ntk"]


def ntk(
    module: nn.Module,
    x1: Inputs,
    x2: Inputs | None = None,
    mask: Mapping[str, Tensor] | None = None,
    wrt: Wrt = "kept",
    outputs: Outputs = "full",
    output: Output | None = None,
) -> Tensor:
    """Compute the tangent kernel ``J(x1) J(x2)ᵀ`` of a network.

    Parameters
    ----------
    module, mask, wrt, output
        As in :func:`jacpot.jacobian`.
    x1, x2
        Examples ``(N, ...)`` and ``(M, ...)``; without ``x2`` the kernel of x1 with itself.
    outputs
        ``"full"``: ``(N, K, M, K)``. ``"trace"``: the sum over equal outputs, ``(N, M)``.
        ``"diagonal"``: equal outputs only, ``(N, M, K)``.

    Returns
    -------
    Tensor
        The kernel.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As :func:`jacpot.jacobian`.

    Examples
    --------
    >>> import torch, jacpot
    >>> net = torch.nn.Linear(3, 2)
    >>> x = torch.tensor([[1.0, 2.0, 3.0], [0.0, 1.0, 0.0]])
    >>> jacpot.ntk(net, x, outputs="trace")  # K (⟨x, x'⟩ + 1)
    tensor([[30.,  6.],
            [ 6.,  4.]])
    """
    left = jacobian(module, x1, mask, wrt, output)
    right = None if x2 is None else jacobian(module, x2, mask, wrt, output)
    return left.gram(right, outputs)
