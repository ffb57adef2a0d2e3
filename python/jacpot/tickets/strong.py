"""Strong tickets by construction: a random network that holds a given one, found without training.

Pensia et al. 2020, *Optimal lottery tickets via subset sum: logarithmic over-parameterization is
sufficient*, theorem 1: each weight of the target becomes a subset sum of products of random
weights, so that ``O(log(1 / epsilon))`` of them a weight suffice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from jacpot.ops.subset_sum import subset_sum
from jacpot.tickets._random import seeded
from jacpot.tickets.mask import Mask

__all__ = ["Approximation", "RandomPair", "approximate"]

# Subset sums solved at a time: bounds the memory of their samples.
_CHUNK = 1 << 16


class RandomPair(nn.Module):
    """Two random layers in the place of one linear layer: ``y_o = Σ_ij v_oij relu(u_ij x_i)``.

    Input ``i`` feeds hidden units of its own; a constant 1 comes in as one more input, for the
    bias. The first half of each input's hidden units has positive ``u`` and passes positive inputs,
    the second half negative ones; where inputs cannot be negative there is no second half.

    Attributes
    ----------
    first
        ``u (in + 1, hidden)``, uniform on [0, 1] and [-1, 0].
    second
        ``v (out, in + 1, hidden)``, uniform on [-scale, scale].
    """

    def __init__(
        self, n_in: int, n_out: int, samples: int, nonnegative: bool, scale: float, like: Tensor
    ) -> None:
        super().__init__()
        u = torch.rand(n_in + 1, samples * (1 if nonnegative else 2), device="cpu")
        u[:, samples:] *= -1
        v = (torch.rand(n_out, n_in + 1, u.shape[1], device="cpu") * 2 - 1) * scale
        self.first = nn.Parameter(u.to(like), requires_grad=False)
        self.second = nn.Parameter(v.to(like), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """From ``(..., in)`` to ``(..., out)``."""
        x = torch.cat([x, x.new_ones((*x.shape[:-1], 1))], dim=-1)
        hidden = torch.relu(x.unsqueeze(-1) * self.first)
        return nn.functional.linear(hidden.flatten(-2), self.second.flatten(1))


@dataclass(eq=False)
class Approximation:
    """A random network and the mask under which it is the target.

    Attributes
    ----------
    network
        Random and never trained: a :class:`RandomPair` in the place of each linear layer.
    mask
        Which of its weights to keep.
    epsilon
        The error a weight was allowed.
    samples
        Random products that each weight could choose among.
    weights
        Weights and biases of the target.
    failures
        Weights of the target that no subset came within ``epsilon`` of.
    max_error
        The largest error of a weight.

    Examples
    --------
    >>> import torch
    >>> from jacpot import tickets
    >>> found = tickets.approximate(torch.nn.Sequential(torch.nn.Linear(3, 4)), samples=20)
    >>> found.weights, found.failure_share
    (16, 0.0)
    >>> found.overparameterisation > found.kept > found.bound / 2
    True
    """

    network: nn.Sequential
    mask: Mask
    epsilon: float
    samples: int
    weights: int
    failures: int
    max_error: float

    @property
    def failure_share(self) -> float:
        """Failures by weights of the target."""
        return self.failures / max(self.weights, 1)

    @property
    def overparameterisation(self) -> float:
        """Random weights by weights of the target."""
        return self.mask.numel / max(self.weights, 1)

    @property
    def kept(self) -> float:
        """Random weights that the mask keeps, by weights of the target."""
        return self.mask.nnz / max(self.weights, 1)

    @property
    def bound(self) -> float:
        """``log2(1 / epsilon)``: with fewer products a weight there are not enough subsets."""
        return math.log2(1 / self.epsilon)


def approximate(
    target: nn.Sequential,
    epsilon: float = 0.01,
    samples: int = 20,
    *,
    nonnegative: bool = False,
    scale: float = 1.0,
    seed: int = 0,
) -> Approximation:
    """Draw a random network and find the mask under which it computes what ``target`` does.

    Parameters
    ----------
    target
        Linear layers and ReLUs, with Flatten where need be.
    epsilon
        The error that a weight may have; what the subsets found miss is reported, not hidden.
    samples
        Random products for each weight to choose among, up to 32.
    nonnegative
        Whether the inputs of the first layer are never negative (pixels). Inputs after a ReLU are
        known not to be, and need half the hidden units.
    scale
        Of the random weights: products lie in [-scale, scale].
    seed
        Of the random weights.

    Returns
    -------
    Approximation

    Raises
    ------
    TypeError
        If the target holds another kind of layer.
    ValueError
        If ``epsilon`` or ``scale`` is not positive, or ``samples`` is less than 1.

    Examples
    --------
    >>> import torch
    >>> from jacpot import tickets
    >>> target = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    >>> found = tickets.approximate(target, epsilon=0.01, samples=20)
    >>> found.failures, found.max_error < 0.01
    (0, True)
    >>> x = torch.randn(5, 3)
    >>> with tickets.applied(found.network, found.mask) as ticket:
    ...     bool((ticket(x) - target(x)).abs().max() < 0.2)
    True
    """
    if not epsilon > 0 or not scale > 0:
        raise ValueError(
            f"arguments 'epsilon' and 'scale' must be positive, got {epsilon} and {scale}"
        )
    if samples < 1:
        raise ValueError(f"argument 'samples' must be at least 1, got {samples}")
    layers: list[nn.Module] = []
    masks: dict[str, Tensor] = {}
    weights, failures, max_error = 0, 0, 0.0
    with seeded(seed), torch.no_grad():
        for index, layer in enumerate(target):
            if isinstance(layer, nn.Linear):
                shape = (layer.in_features, layer.out_features)
                pair = RandomPair(*shape, samples, nonnegative, scale, layer.weight)
                wanted = _with_bias(layer)
                first, second, errors = _choose(pair, wanted, samples)
                masks[f"{index}.first"], masks[f"{index}.second"] = first, second
                real = errors if layer.bias is not None else errors[:, :-1]
                weights += real.numel()
                failures += int((real > epsilon).sum())
                max_error = max(max_error, float(real.max()) if real.numel() else 0.0)
                layers.append(pair)
            elif isinstance(layer, nn.ReLU | nn.Flatten):
                layers.append(type(layer)())
            else:
                raise TypeError(
                    f"argument 'target' must hold Linear, ReLU and Flatten layers only, "
                    f"got {type(layer).__name__} at {index}"
                )
            if not isinstance(layer, nn.Flatten):
                nonnegative = isinstance(layer, nn.ReLU)
    network = nn.Sequential(*layers)
    return Approximation(network, Mask(masks), epsilon, samples, weights, failures, max_error)


def _with_bias(layer: nn.Linear) -> Tensor:
    bias = layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias
    return torch.cat([layer.weight, bias[:, None]], dim=1)


def _choose(pair: RandomPair, wanted: Tensor, samples: int) -> tuple[Tensor, Tensor, Tensor]:
    """Masks of both layers, and the error of each weight, the larger of its two signs'."""
    n_out, n_in = wanted.shape
    products = pair.second * pair.first.abs()  # (out, in, hidden)
    second = torch.zeros(products.shape, dtype=torch.bool, device="cpu")
    errors = wanted.new_zeros((n_out, n_in), dtype=torch.float64)
    rows = max(_CHUNK // max(n_in, 1), 1)
    # -relu(-x) passes the negative inputs, so the second half has to sum to minus the weight.
    for part, sign in enumerate((1, -1)[: products.shape[2] // samples]):
        own = slice(part * samples, (part + 1) * samples)
        for start in range(0, n_out, rows):
            block = slice(start, start + rows)
            goals = (sign * wanted[block]).reshape(-1)
            numbers = products[block, :, own].reshape(len(goals), samples)
            found = subset_sum(numbers.cpu(), goals.cpu())
            error = (found.sums - goals.cpu().double()).abs().view(-1, n_in).to(errors.device)
            second[block, :, own] = found.mask.view(-1, n_in, samples)
            if part == 1:  # the bias comes in as a constant 1, which is never negative
                error[:, -1] = 0
            errors[block] = torch.maximum(errors[block], error)
    if products.shape[2] > samples:
        second[:, -1, samples:] = False
    first = second.any(dim=0)  # a hidden unit that nobody listens to needs no input
    return first.to(wanted.device), second.to(wanted.device), errors
