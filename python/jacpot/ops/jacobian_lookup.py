"""The block of a table of which each position of an example looks up one entry: an embedding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from jacpot.ops.arrays import Kind
from jacpot.ops.jacobian_signals import OfSignals

__all__ = ["Lookup"]


@dataclass(frozen=True, eq=False)
class Lookup(OfSignals):
    """The block of a table of V entries, ``J[n,k,(v,d)] = Σ_t [token[n,t] = v] · δ[n,k,t,d]``.

    It takes as much room as the signals: that of nothing here but :meth:`panels` grows with V.

    Parameters
    ----------
    tokens
        ``(N, T)`` int64, which entry each of the ``T`` positions looks up.
    signals
        ``δ (N, K, T, D)``: the outputs' derivatives by what was looked up.
    n_tokens
        Entries of the table, V.
    kept
        Kept elements of the table, ``(V, D)`` bool; None keeps all. The block's columns are then
        the kept elements in row-major order.

    Raises
    ------
    TypeError
        If tokens are not int64, kept not bool, or signals neither float32 nor float64.
    ValueError
        If shapes do not fit each other.

    Examples
    --------
    >>> Lookup(torch.tensor([[2, 0, 2]]), torch.ones(1, 1, 3, 1), n_tokens=4).rows()
    tensor([[[1., 0., 2., 0.]]])
    """

    tokens: Tensor
    signals: Tensor
    n_tokens: int
    kept: Tensor | None = None

    def __post_init__(self) -> None:
        tokens, s = self.tokens, self.signals
        if tokens.dtype != torch.int64:
            raise TypeError(f"argument 'tokens' must be int64, got {tokens.dtype}")
        if s.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"argument 'signals' must be float32 or float64, got {s.dtype}")
        if tokens.ndim != 2:
            raise ValueError(f"argument 'tokens' must have 2 dimensions, got {tuple(tokens.shape)}")
        n, t = tokens.shape
        if s.ndim != 4 or (s.shape[0], s.shape[2]) != (n, t):
            raise ValueError(
                f"argument 'signals' must have shape ({n}, K, {t}, D) to go with tokens of shape "
                f"{tuple(tokens.shape)}, got {tuple(s.shape)}"
            )
        if self.kept is not None and self.kept.dtype != torch.bool:
            raise TypeError(f"argument 'kept' must be bool, got {self.kept.dtype}")
        if self.kept is not None and self.kept.shape != (self.n_tokens, s.shape[3]):
            raise ValueError(
                f"argument 'kept' must have shape ({self.n_tokens}, {s.shape[3]}), got "
                f"{tuple(self.kept.shape)}"
            )

    @property
    def kind(self) -> Kind:
        """What kind of array results are."""
        return "torch"

    @property
    def width(self) -> int:
        """Elements of an entry, ``D``."""
        return self.signals.shape[3]

    @cached_property
    def n_parameters(self) -> int:
        """Columns of the block, ``V·D`` or as many as are kept."""
        return self.n_tokens * self.width if self.kept is None else int(self.kept.sum())

    @property
    def nbytes(self) -> int:
        """Bytes that tokens and signals take."""
        return self.tokens.nbytes + self.signals.nbytes

    @cached_property
    def places(self) -> Tensor:
        """Where the kept elements are in the table, flat and rising; found once, by a wait."""
        if self.kept is None:
            return torch.arange(self.n_tokens * self.width, device=self.device)
        return self.kept.flatten().nonzero()[:, 0]

    @cached_property
    def seen(self) -> Tensor:
        """The entries that are looked up at all, rising."""
        distinct: Tensor = torch.unique(self.tokens)
        return distinct

    def jvp(self, vectors: Tensor) -> Tensor:
        """``J v`` for ``(R, P)`` vectors, ``(N, K, R)``: what positions look up in them."""
        r = len(vectors)
        if self.kept is not None:
            table = vectors.new_zeros(r, self.kept.numel())
            vectors = table.index_copy_(1, self.places, vectors)
        found = vectors.view(r, self.n_tokens, self.width)[:, self.tokens]  # (R, N, T, D)
        return self.signals.flatten(2) @ found.flatten(2).permute(1, 2, 0)

    def vjp(self, u: Tensor) -> Tensor:
        """``uᵀ J`` for ``u (N, K, R)``, ``(R, P)``: what positions add to their entries."""
        n, _, r = u.shape
        mixed = (u.mT @ self.signals.flatten(2)).view(n, r, self.n_positions, self.width)
        out = u.new_zeros(r, self.n_tokens, self.width)
        out.index_add_(1, self.tokens.flatten(), mixed.transpose(0, 1).flatten(1, 2))
        out = out.flatten(1)
        return out if self.kept is None else out.index_select(1, self.places)

    @cached_property
    def sums(self) -> tuple[Tensor, Tensor, Tensor]:
        """What is not zero: examples ``(U,)``, the entries they see, and rows ``(U, K, D)``."""
        examples = torch.arange(self.n_examples, device=self.device)[:, None]
        pairs = (examples * self.n_tokens + self.tokens).flatten()
        distinct, place = torch.unique(pairs, return_inverse=True)
        signals = self.signals.transpose(1, 2).flatten(0, 1)
        rows = signals.new_zeros(len(distinct), *signals.shape[1:]).index_add_(0, place, signals)
        seen = distinct % self.n_tokens
        if self.kept is not None:
            rows *= self.kept[seen, None]
        return distinct // self.n_tokens, seen, rows

    def row_squares(self) -> Tensor:
        """Squared norms of the rows, ``(N, K)``."""
        examples, _, rows = self.sums
        squares = rows.square().sum(2)
        out = squares.new_zeros(self.n_examples, self.n_outputs)
        return out.index_add_(0, examples, squares)

    def column_squares(self) -> Tensor:
        """Squared norms of the columns, ``(P,)``."""
        _, tokens, rows = self.sums
        squares = rows.square().sum(1)
        out = squares.new_zeros(self.n_tokens, self.width)
        out.index_add_(0, tokens, squares)
        return out.flatten() if self.kept is None else out[self.kept]

    def rows(self) -> Tensor:
        """Write the block out, ``(N, K, V·D)``."""
        return next(self.panels(torch.arange(self.n_tokens, device=self.device)))

    def panels(
        self, wanted: Tensor, budget: int | None = None, examples: int | None = None
    ) -> Iterator[Tensor]:
        """Generate the columns of the wanted entries, a rising list, in panels ``(N, K, p)``.

        No panel is larger than ``budget`` bytes unless a single entry's is, where there are
        ``examples`` (by default the block's own).
        """
        n, k, d = self.n_examples, self.n_outputs, self.width
        each = max(1, (n if examples is None else examples) * k * d * self.dtype.itemsize)
        step = max(1, len(wanted) if budget is None else budget // each)
        own, tokens, rows = self.sums
        order = tokens.argsort()
        own, tokens, rows = own[order], tokens[order], rows[order]
        for begin in range(0, max(1, len(wanted)), step):
            part = wanted[begin : begin + step]
            panel = rows.new_zeros(n, k, len(part), d)
            if len(part):
                first = int(torch.searchsorted(tokens, part[:1]))
                last = int(torch.searchsorted(tokens, part[-1:], right=True))
                place = torch.searchsorted(part, tokens[first:last])
                met = part[place] == tokens[first:last]
                panel[own[first:last][met], :, place[met]] = rows[first:last][met]
            if self.kept is None:
                yield panel.flatten(2)
            else:
                yield panel[:, :, self.kept[part]]
