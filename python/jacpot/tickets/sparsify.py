"""From a network that wears a mask to one whose time and memory fall with its density."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from jacpot.nn.sparsify import can_be_sparse
from jacpot.nn.sparsify import sparsify as to_sparse_layers
from jacpot.nn.stand_ins import copy_of
from jacpot.nn.worn import checked_mask, named_parameters, owners
from jacpot.tickets.parametrization import applied_mask, apply, remove

__all__ = ["sparsify"]


def sparsify(
    module: nn.Module, mask: Mapping[str, Tensor] | None = None, max_density: float = 0.5
) -> nn.Module:
    """A copy whose masked layers are really sparse: they hold and compute kept weights only.

    It computes what the masked network does, to rounding, and trains the same. The parameters of
    a sparse layer are its kept values, so make the optimizer from the result.

    Parameters
    ----------
    module
        Any network; left as it is.
    mask
        What is kept; by default the mask that the module wears.
    max_density
        Parameters that keep more than this share stay dense and wear their mask: a dense product
        is faster there. So do those that cannot be sparse: of other layers than linear ones and
        2-d convolutions (one of several that share it suffices), or of convolutions that pad with
        something else than zeros.

    Examples
    --------
    >>> import torch
    >>> from jacpot import tickets
    >>> net = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.ReLU(), torch.nn.Linear(30, 5))
    >>> mask = tickets.prune(tickets.score.magnitude(net), 0.1, "layer")
    >>> fast = tickets.sparsify(net, mask)
    >>> x = torch.randn(4, 20)
    >>> with tickets.applied(net, mask):
    ...     bool(torch.allclose(fast(x), net(x), atol=1e-6))
    True
    """
    kept = applied_mask(module) if mask is None else checked_mask(module, mask)
    network = remove(copy_of(module))
    parameters = named_parameters(network)
    sparse: dict[str, Tensor] = {}
    worn: dict[str, Tensor] = {}
    for name, on in kept.items():
        swappable = all(can_be_sparse(*owner) for owner in owners(network, parameters[name]))
        few = int(on.sum()) <= max_density * on.numel()
        (sparse if swappable and few else worn)[name] = on
    return apply(to_sparse_layers(network, sparse), worn)
