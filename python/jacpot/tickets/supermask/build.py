"""From a network to a supermask over it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from jacpot.linalg.arguments import check_number
from jacpot.nn.stand_ins import copy_of
from jacpot.nn.worn import named_parameters, owners
from jacpot.tickets._parametrize import parametrizations, refuse_another, register, unregister
from jacpot.tickets._random import seeded
from jacpot.tickets.mask import Mask, chosen_mask
from jacpot.tickets.parametrization import applied_mask
from jacpot.tickets.supermask.selectors import Biprop, EdgePopup, Selector, Zhou

__all__ = ["Supermask", "signed_constant", "supermask"]


class Supermask(nn.Module):
    """A network whose weights are frozen and whose choice among them is trained.

    Attributes
    ----------
    network
        A copy of the original; its chosen parameters are parametrized by a score each.

    Examples
    --------
    >>> import torch
    >>> from jacpot import tickets
    >>> hidden = tickets.supermask(torch.nn.Linear(8, 4), density=0.25)
    >>> optimizer = torch.optim.SGD([p for p in hidden.parameters() if p.requires_grad], lr=0.1)
    >>> hidden(torch.randn(5, 8)).square().sum().backward()
    >>> optimizer.step()  # moves scores, and so the choice
    >>> plain = hidden.bake()
    >>> plain, int((plain.weight != 0).sum())
    (Linear(in_features=8, out_features=4, bias=True), 8)
    """

    def __init__(self, network: nn.Module, selectors: Mapping[str, Selector]) -> None:
        super().__init__()
        self.network = network
        self._selectors = dict(selectors)  # registered inside `network` already

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The output of ``network``."""
        return self.network(*args, **kwargs)

    def mask(self) -> Mask:
        """The weights chosen, by the names they have in the original network.

        Of stochastic masks, the most probable one.
        """
        return Mask({name: selector.mask() for name, selector in self._selectors.items()})

    def bake(self) -> nn.Module:
        """A plain copy of the network with the weights that eval mode uses."""
        was_training = self.training
        self.eval()
        try:
            with torch.no_grad():
                state = {name: _value(self.network, name).clone() for name in self._selectors}
                plain = copy_of(self.network)
        finally:
            self.train(was_training)
        for child in list(plain.modules()):
            for leaf in reversed(parametrizations(child)):
                unregister(child, leaf)
        parameters = named_parameters(plain)
        with torch.no_grad():
            for name, value in state.items():
                parameters[name].copy_(value)
        return plain.requires_grad_()


def _value(module: nn.Module, name: str) -> Tensor:
    path, _, leaf = name.rpartition(".")
    value: Tensor = getattr(module.get_submodule(path), leaf)
    return value


def signed_constant(weight: Tensor) -> Tensor:
    """Each weight's sign times the root mean square of them all: the same second moment."""
    return weight.sign() * weight.square().mean().sqrt()


def supermask(
    module: nn.Module,
    kind: Literal["edge_popup", "zhou", "biprop"] = "edge_popup",
    density: float = 0.5,
    *,
    weights: Literal["initial", "signed_constant"] = "initial",
    rescale: bool = True,
    mask: Mapping[str, Tensor] | None = None,
    seed: int = 0,
) -> Supermask:
    """Make a network learn by masking alone: its weights never change.

    Train the result with any optimizer; only the scores have gradients.

    Parameters
    ----------
    module
        Where the weights come from; it is copied and left alone.
    kind
        ``"edge_popup"``: the weights of highest score, the same share in each parameter.
        ``"biprop"``: the same with one-bit weights. ``"zhou"``: a probability a weight.
    density
        The share kept of each parameter; for ``"zhou"`` the probability to begin with.
    weights
        ``"initial"``, or ``"signed_constant"``: only their signs, times one constant a parameter.
    rescale
        For ``"zhou"``: dynamic weight rescaling. For ``"edge_popup"``: divide the frozen weights
        by ``sqrt(density)``, so that what is kept has the variance that all had. Ignored by
        ``"biprop"``, which finds its own scale.
    mask
        Which parameters to mask: those that it names. By default those of :meth:`Mask.ones`. The
        others are frozen too.
    seed
        Of the scores.

    Returns
    -------
    Supermask

    Raises
    ------
    ValueError
        If an argument is out of range, or the module wears a mask already.

    Examples
    --------
    >>> import torch
    >>> from jacpot import tickets
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> hidden = tickets.supermask(net, "edge_popup", density=0.25)
    >>> hidden.mask().densities
    {'0.weight': 0.25, '2.weight': 0.25}
    >>> [name for name, p in hidden.named_parameters() if p.requires_grad]  # doctest: +ELLIPSIS
    ['network.0.parametrizations.weight.0.scores', 'network.2.parametrizations.weight.0.scores']
    """
    if kind not in ("edge_popup", "zhou", "biprop"):
        raise ValueError(f"argument 'kind' must be 'edge_popup', 'zhou' or 'biprop', got {kind!r}")
    if weights not in ("initial", "signed_constant"):
        raise ValueError(
            f"argument 'weights' must be 'initial' or 'signed_constant', got {weights!r}"
        )
    density = check_number("density", density)
    if not 0 < density < 1 and not (density == 1 and kind != "zhou"):
        raise ValueError(f"argument 'density' must lie in (0, 1), got {density}")
    if len(applied_mask(module)):
        raise ValueError("argument 'module' wears a mask already; bake or remove it first")
    chosen = chosen_mask(module, mask)
    network = copy_of(module).requires_grad_(False)
    parameters = named_parameters(network)
    selectors: dict[str, Selector] = {}
    with seeded(seed), torch.no_grad():
        for name in chosen:
            weight = parameters[name]
            if weights == "signed_constant":
                weight.copy_(signed_constant(weight))
            if kind == "zhou":
                selectors[name] = Zhou(weight, density, rescale)
            elif kind == "biprop":
                selectors[name] = Biprop(weight, density)
            else:
                if rescale:
                    weight.div_(density**0.5)
                selectors[name] = EdgePopup(weight, density)
            for child, leaf in owners(network, weight):
                refuse_another(name, child)
                register(child, leaf, selectors[name])
    return Supermask(network, selectors)
