"""What a layer rule returns for a parameter: its share of the Jacobian, factored where it can be.

``M`` counts the instances that the layer saw: examples, or examples times something (frames,
windows) that the network folded into the leading axis. ``K`` counts the outputs of the network.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

from torch import Tensor

from jacpot.ops.jacobian import Factors, Lookup, dense
from jacpot.ops.jacobian_windows import Windows
from jacpot.ops.pattern import Pattern

__all__ = ["Fold", "LookedUp", "Outer", "Rows", "Summed", "Term", "positions", "reduced"]


class Fold:
    """From M instances to N examples: what an example's S = M/N instances add are more positions.

    The same tensor folds to the same tensor, so that terms that share one still do.

    Parameters
    ----------
    n
        Examples that were run.
    keep
        How many of them to keep.
    """

    def __init__(self, n: int, keep: int) -> None:
        self.n, self.keep = n, keep
        self._done: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, x: Tensor, axis: int) -> Tensor:
        """``(N·S, *, T, ...)`` with ``T`` at ``axis`` -> ``(N, *, S·T, ...)``."""
        if id(x) not in self._done:
            s = x.shape[0] // self.n
            y = x
            if s > 1:
                y = x.reshape(self.n, s, *x.shape[1:]).movedim(1, axis).flatten(axis, axis + 1)
            self._done[id(x)] = x, y[: self.keep]
        return self._done[id(x)][1]


@dataclass(frozen=True, eq=False)
class Outer:
    """A weight's share, ``J[m,k,(g,o),i] = Σ_t signals[m,k,t,g,o] · activations[m,t,g,i]``.

    Parameters
    ----------
    activations
        ``(M, T, G, I)``; those of a convolution need not be written out.
    signals
        ``(M, K, T, G, O)``.
    transposed
        Whether the parameter is laid out as ``(G, I, O)`` instead of ``(G, O, I)``.
    pattern
        Of a sparse weight ``(G·O, I)`` whose kept entries, row by row, are the parameter.

    Examples
    --------
    >>> import torch
    >>> from jacpot.tangent.rules import Outer
    >>> share = Outer(activations=torch.tensor([[[[1.0, 2.0]]]]),
    ...               signals=torch.tensor([[[[[3.0, 4.0]]]]]))
    >>> share.rows()  # one instance, one output, a weight of shape (2, 2)
    tensor([[[3., 6., 4., 8.]]])
    """

    activations: Tensor | Windows
    signals: Tensor
    transposed: bool = False
    pattern: Pattern | None = None

    def folded(self, fold: Fold) -> Outer:
        """Count per example."""
        whole = isinstance(self.activations, Windows) and self.activations.shape[0] == fold.n
        a = self.activations[: fold.keep] if whole else fold(self.written, 1)
        return dataclasses.replace(self, activations=a, signals=fold(self.signals, 2))

    @property
    def written(self) -> Tensor:
        """The activations, written out."""
        a = self.activations
        return a.written() if isinstance(a, Windows) else a

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(G, O, I)``."""
        return self.signals.shape[3], self.signals.shape[4], self.activations.shape[3]

    @property
    def reduces(self) -> bool:
        """Whether the rows take less room than the factors, as with many positions they do."""
        k, t = self.signals.shape[1:3]
        g, o, i = self.shape
        weights = g * o * i if self.pattern is None else self.pattern.nnz
        return t > 1 and k * weights < t * g * (k * o + i)

    def rows(self, room: Callable[..., Tensor] | None = None) -> Tensor:
        """Multiply out, ``(M, K, G·O·I)`` in the parameter's own order.

        ``room(shape, like)`` may be asked for memory for them.
        """
        a = self.activations
        if isinstance(a, Windows):
            if self.transposed or self.pattern is not None:
                room = None
            shape = *self.signals.shape[:2], math.prod(self.shape)
            product = a.rows(self.signals, room and room(shape, self.signals))
        else:
            product = dense([Factors(a, self.signals)])
        if self.transposed:
            product = product.reshape(*product.shape[:2], *self.shape).transpose(3, 4).flatten(2)
        if self.pattern is not None:
            product = product[:, :, self.pattern.mask().flatten().to(product.device)]
        return product


@dataclass(frozen=True, eq=False)
class LookedUp:
    """A table's share, ``J[m,k,v,d] = Σ_t [tokens[m,t] = v] · signals[m,k,t,d]``.

    Parameters
    ----------
    tokens
        ``(M, T)`` int64, the entry of the table that each position looks up.
    signals
        ``(M, K, T, D)``.
    n_tokens
        Entries of the table, V.

    Examples
    --------
    >>> import torch
    >>> from jacpot.tangent.rules import LookedUp
    >>> share = LookedUp(torch.tensor([[2, 0, 2]]), torch.ones(1, 1, 3, 1), n_tokens=3)
    >>> share.rows()  # one instance, one output, a table of shape (3, 1)
    tensor([[[1., 0., 2.]]])
    """

    tokens: Tensor
    signals: Tensor
    n_tokens: int

    def folded(self, fold: Fold) -> LookedUp:
        """Count per example."""
        return LookedUp(fold(self.tokens, 1), fold(self.signals, 2), self.n_tokens)

    @property
    def reduces(self) -> bool:
        """Whether the rows take less room, as those of a table of fewer entries than positions."""
        return self.n_tokens < self.tokens.shape[1]

    @property
    def block(self) -> Lookup:
        """The same as a block of a Jacobian."""
        return Lookup(self.tokens, self.signals, self.n_tokens)

    def rows(self) -> Tensor:
        """Add up, ``(M, K, V·D)``."""
        return self.block.rows()


@dataclass(frozen=True, eq=False)
class Summed:
    """A bias' share, ``J[m,k,(g,o)] = Σ_t signals[m,k,t,g,o]``.

    Give the very tensor that an :class:`Outer` holds: the two are then one block.

    Examples
    --------
    >>> import torch
    >>> from jacpot.tangent.rules import Summed
    >>> Summed(torch.ones(1, 1, 5, 1, 2)).rows()  # five positions
    tensor([[[5., 5.]]])
    """

    signals: Tensor

    def folded(self, fold: Fold) -> Summed:
        """Count per example."""
        return Summed(fold(self.signals, 2))

    def rows(self) -> Tensor:
        """Add up, ``(M, K, G·O)``."""
        return self.signals.sum(2).flatten(2)


@dataclass(frozen=True, eq=False)
class Rows:
    """A share that does not factorise, ``J[m,k,p] = values[m,k,p]``.

    Parameters
    ----------
    values
        ``(M, K, ...)``, the parameter's elements in its own order.

    Examples
    --------
    >>> import torch, jacpot
    >>> from jacpot.tangent.rules import Rows
    >>> class Scale(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.factor = torch.nn.Parameter(torch.ones(3))
    ...     def forward(self, x):
    ...         return self.factor * x
    >>> @jacpot.register_layer_rule(Scale)
    ... def scale(signals, layer, x):  # signals (M, K, 3), x (M, 3)
    ...     return {"factor": Rows(signals * x[:, None])}
    >>> jacpot.jacobian(Scale(), torch.tensor([[1.0, 2.0, 3.0]])).dense()[0].diagonal()
    tensor([1., 2., 3.])
    """

    values: Tensor

    def folded(self, fold: Fold) -> Rows:
        """Count per example."""
        return Rows(fold(self.values.unsqueeze(2), 2).sum(2))

    def rows(self) -> Tensor:
        """Give the values, ``(M, K, P)``."""
        m, k, *shape = self.values.shape
        return self.values.reshape(m, k, math.prod(shape))  # a number has no axis to flatten


Term: TypeAlias = Outer | LookedUp | Summed | Rows


def reduced(terms: Mapping[str, Term], room: Callable[..., Tensor]) -> dict[str, Term]:
    """Multiply out the factors that take more room than their rows, and biases that share them.

    ``room(name, shape, like)`` may be asked for memory for the rows.
    """
    kept = {
        id(term.signals)
        for term in terms.values()
        if isinstance(term, Outer | LookedUp) and not term.reduces
    }

    def multiplied(name: str, term: Term) -> Term:
        if isinstance(term, Rows) or id(term.signals) in kept:
            return term
        return Rows(term.rows(partial(room, name)) if isinstance(term, Outer) else term.rows())

    return {name: multiplied(name, term) for name, term in terms.items()}


def positions(x: Tensor, first: int, last: int) -> tuple[int, ...]:
    """Sizes with all axes from ``first`` up to the ``last`` ones merged into one."""
    end = x.ndim - last
    return (*x.shape[:first], math.prod(x.shape[first:end]), *x.shape[end:])
