"""A network whose edges all weigh a power of two, where masking alone makes any weight exactly.

Between two units runs a bundle of edges, one for each power of two and sign. A floating-point
number is a sum of distinct powers of two, so some choice of edges weighs exactly as much.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from jacpot.nn.stand_ins import copy_of

__all__ = ["MultigraphLinear", "multigraph", "powers_of_two"]


def powers_of_two(weight: Tensor, bits: int | None = None) -> tuple[list[int], Tensor]:
    """Write numbers in binary.

    Parameters
    ----------
    weight
        float32 or float64, finite.
    bits
        Keep the highest so many powers only; by default as many as exactness takes.

    Returns
    -------
    exponents : list of int
        From high to low.
    edges : Tensor
        ``(2, len(exponents), *weight.shape)`` bool: the powers that sum to each positive number,
        and to minus each negative one.

    Examples
    --------
    >>> import torch
    >>> from jacpot.tickets import powers_of_two
    >>> exponents, edges = powers_of_two(torch.tensor([0.75, -2.0]))
    >>> exponents, edges[0, :, 0].tolist(), edges[1, :, 1].tolist()
    ([1, 0, -1, -2], [False, False, True, True], [True, False, False, False])
    """
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("argument 'weight' must be finite")
    size = weight.detach().double().abs()
    if not bool((size > 0).any()):
        return [], torch.zeros((2, 0, *weight.shape), dtype=torch.bool, device=weight.device)
    high = math.frexp(float(size.max()))[1] - 1
    exponents: list[int] = []
    planes: list[Tensor] = []
    rest = size.clone()
    while bool((rest > 0).any()) and (bits is None or len(exponents) < bits):
        power = math.ldexp(1.0, high - len(exponents))
        plane = rest >= power
        rest = torch.where(plane, rest - power, rest)
        exponents.append(high - len(exponents))
        planes.append(plane)
    stacked = torch.stack(planes)
    return exponents, torch.stack([stacked & (weight > 0), stacked & (weight < 0)])


class MultigraphLinear(nn.Module):
    """A linear layer of bundles of edges that weigh ``±2**e``, and a mask over them.

    Attributes
    ----------
    edges
        ``(2 * E,)``: what the edges of every bundle weigh.
    mask
        ``(2 * E, out, in + 1)`` bool; the last input is the constant 1 of the bias.

    Examples
    --------
    >>> import torch
    >>> from jacpot import tickets
    >>> layer = torch.nn.Linear(2, 1)
    >>> _ = layer.weight.data.copy_(torch.tensor([[0.75, -2.0]])), layer.bias.data.zero_()
    >>> graph = tickets.MultigraphLinear(layer)
    >>> graph.edges.tolist()
    [2.0, 1.0, 0.5, 0.25, -2.0, -1.0, -0.5, -0.25]
    >>> graph(torch.tensor([4.0, 1.0])).item()
    1.0
    """

    edges: Tensor
    mask: Tensor

    def __init__(self, layer: nn.Linear, bits: int | None = None) -> None:
        super().__init__()
        weight = layer.weight.detach()
        bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.detach()
        exponents, chosen = powers_of_two(torch.cat([weight, bias[:, None]], dim=1), bits)
        powers = [math.ldexp(1.0, e) for e in exponents]
        edges = torch.tensor([*powers, *(-p for p in powers)], dtype=weight.dtype, device="cpu")
        self.register_buffer("edges", edges.to(weight.device))
        self.register_buffer("mask", chosen.flatten(0, 1))

    def weights(self) -> tuple[Tensor, Tensor]:
        """Weight ``(out, in)`` and bias ``(out,)`` that the chosen edges add up to.

        Exact in any order of summation: each partial sum has some of the bits of the result.
        """
        total = self.edges.new_zeros(self.mask.shape[1:])
        for edge, chosen in zip(self.edges, self.mask, strict=True):
            total = torch.where(chosen, total + edge, total)
        return total[:, :-1], total[:, -1]

    def forward(self, x: Tensor) -> Tensor:
        """From ``(..., in)`` to ``(..., out)``."""
        return nn.functional.linear(x, *self.weights())


def multigraph(module: nn.Module, bits: int | None = None) -> nn.Module:
    """A copy in which every linear layer is a masked multigraph of powers of two.

    Parameters
    ----------
    module
        Any module.
    bits
        Powers of two in a bundle; by default as many as it takes for every weight to be exact.
        With fewer, each weight of a layer is off by less than the lowest power kept.

    Examples
    --------
    >>> import torch
    >>> from jacpot import tickets
    >>> layer = torch.nn.Linear(5, 3)
    >>> torch.equal(tickets.multigraph(layer).weights()[0], layer.weight)
    True
    """
    if bits is not None and bits < 1:
        raise ValueError(f"argument 'bits' must be at least 1, got {bits}")
    if isinstance(module, nn.Linear):
        return MultigraphLinear(module, bits)
    result = copy_of(module)
    for name, child in list(result.named_modules()):
        if isinstance(child, nn.Linear):
            path, _, leaf = name.rpartition(".")
            setattr(result.get_submodule(path), leaf, MultigraphLinear(child, bits))
    return result
