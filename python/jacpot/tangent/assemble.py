"""From the terms of each parameter to the blocks of the Jacobian, under a mask."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from jacpot.ops.jacobian import Added, Block, Factors, Lookup, Rows
from jacpot.ops.pattern import Pattern
from jacpot.tangent.rules.terms import LookedUp, Outer, Summed, Term

__all__ = ["Column", "Columns", "assemble"]


@dataclass(frozen=True, eq=False)
class Column:
    """The columns of one parameter.

    Attributes
    ----------
    name, shape
        The parameter's.
    kept
        Flat indices of its kept elements, rising; None keeps all.
    """

    name: str
    shape: torch.Size
    kept: Tensor | None

    @property
    def size(self) -> int:
        """How many columns."""
        return self.shape.numel() if self.kept is None else len(self.kept)


class Columns:
    """The columns of a Jacobian: kept elements of the parameters in the module's order.

    Parameters
    ----------
    parameters
        By name in the module's order.
    mask
        Kept elements by name; what is not named is kept whole.
    """

    def __init__(self, parameters: Mapping[str, Tensor], mask: Mapping[str, Tensor]) -> None:
        self.parameters = [
            Column(
                name,
                value.shape,
                None
                if name not in mask or mask[name].all()
                else mask[name].flatten().nonzero().squeeze(1),
            )
            for name, value in parameters.items()
        ]
        self.size = sum(column.size for column in self.parameters)

    def same_as(self, other: Columns) -> bool:
        """Whether these are the very columns of another Jacobian.

        Raises
        ------
        ValueError
            If the other's parameters have other names or shapes.
        """
        if self is other:
            return True
        left = {column.name: tuple(column.shape) for column in self.parameters}
        right = {column.name: tuple(column.shape) for column in other.parameters}
        if left != right:
            name = next(n for n in (*left, *right) if left.get(n) != right.get(n))
            here, there = left.get(name, "none"), right.get(name, "none")
            raise ValueError(
                "argument 'other' must be the Jacobian of the same parameters, but "
                f"{name!r} has shape {here} here and {there} there"
            )
        return list(left) == list(right) and all(
            a.kept is b.kept
            or (a.kept is not None and b.kept is not None and torch.equal(a.kept, b.kept))
            for a, b in zip(self.parameters, other.parameters, strict=True)
        )

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Tensors by parameter name -> ``(P,)``; elements that are not kept are left out.

        Raises
        ------
        ValueError
            If names or shapes differ from the parameters'.
        """
        names = [column.name for column in self.parameters]
        if set(tensors) != set(names):
            raise ValueError(f"argument 'tensors' must name {names}, got {list(tensors)}")
        parts = []
        for column in self.parameters:
            tensor = tensors[column.name]
            if tensor.shape != column.shape:
                raise ValueError(
                    f"argument 'tensors' must have shape {tuple(column.shape)} for "
                    f"{column.name!r}, got {tuple(tensor.shape)}"
                )
            flat = tensor.detach().flatten()
            parts.append(flat if column.kept is None else flat[column.kept])
        return torch.cat(parts)

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        """``(P,)`` or ``(P, R)`` -> tensors by parameter name, zero where nothing is kept.

        Raises
        ------
        ValueError
            If the vector has another length.
        """
        if vector.ndim not in (1, 2) or len(vector) != self.size:
            raise ValueError(
                f"argument 'vector' must have shape ({self.size},) or ({self.size}, R), got "
                f"{tuple(vector.shape)}"
            )
        tensors = {}
        parts = torch.split(vector, [column.size for column in self.parameters])
        for column, part in zip(self.parameters, parts, strict=True):
            if column.kept is not None:
                full = part.new_zeros(column.shape.numel(), *part.shape[1:])
                full[column.kept] = part
                part = full
            tensors[column.name] = part.reshape((*column.shape, *part.shape[1:]))
        return tensors


def assemble(
    terms: Mapping[str, Sequence[Term]],
    columns: Columns,
    like: Tensor,
    patterns: dict[str, Pattern],
) -> tuple[list[Block], list[Tensor | None]]:
    """Make the blocks of a Jacobian, in the order of its columns.

    Parameters
    ----------
    terms
        What each parameter's uses add, by name.
    columns
        The columns wanted.
    like
        The outputs ``(N, K)``.
    patterns
        Compiled patterns by parameter name, added to.

    Returns
    -------
    blocks
        One for each parameter or weight with its bias.
    orders
        For a block whose columns are not in the parameter's order, where among them each goes.
    """
    blocks: list[Block] = []
    orders: list[Tensor | None] = []
    waiting = list(columns.parameters)
    while waiting:
        column = waiting.pop(0)
        found = terms.get(column.name, [])
        if column.size == 0:
            continue
        if found and all(isinstance(term, LookedUp) for term in found):
            blocks.append(_lookup(found, column))
            orders.append(None)
            continue
        added = _added(found, column, like, patterns)
        if added is not None:
            blocks.append(added)
            orders.append(None)
            continue
        weight = _joined(found)
        if weight is None:
            rows = _rows(found, like, column.shape.numel())
            blocks.append(
                Rows(_contiguous([rows if column.kept is None else rows[:, :, column.kept]], 0))
            )
            orders.append(None)
            continue
        bias = bool(waiting) and _is_bias(terms.get(waiting[0].name, []), found, waiting[0])
        if bias:
            waiting.pop(0)
        pattern, order = _layout(weight, column, patterns)
        blocks.append(Factors(weight.written, weight.signals, pattern, bias))
        orders.append(order)
    return blocks, orders


def _added(
    found: Sequence[Term], column: Column, like: Tensor, patterns: dict[str, Pattern]
) -> Added | None:
    """All uses of a parameter that is a table and a layer's weight, if rows take more room."""
    looked = [term for term in found if isinstance(term, LookedUp)]
    if not looked:
        return None
    weight = _joined([term for term in found if not isinstance(term, LookedUp)])
    if weight is None or weight.transposed or weight.pattern is not None:
        return None
    pattern, _ = _layout(weight, column, patterns)
    added = Added((_lookup(looked, column), Factors(weight.written, weight.signals, pattern)))
    return added if added.nbytes < like.nbytes * column.size else None


def _lookup(found: Sequence[Term], column: Column) -> Lookup:
    """All uses of a table, whose positions follow each other."""
    looked = [term.block for term in found if isinstance(term, LookedUp)]
    tokens, signals = [b.tokens for b in looked], [b.signals for b in looked]
    kept = None
    if column.kept is not None:
        kept = torch.zeros(column.shape, dtype=torch.bool, device=column.kept.device)
        kept.view(-1)[column.kept] = True
    return Lookup(_contiguous(tokens, 1), _contiguous(signals, 2), looked[0].n_tokens, kept)


def _joined(found: Sequence[Term]) -> Outer | None:
    """One outer product for all uses, whose positions follow each other; None if they differ."""
    weights = [term for term in found if isinstance(term, Outer)]
    if not weights or len(weights) != len(found):
        return None
    first = weights[0]
    kind = first.shape, first.transposed, first.pattern
    if any((w.shape, w.transposed, w.pattern) != kind for w in weights):
        return None
    activations = _contiguous([w.written for w in weights], 1)
    if len(weights) == 1 and _positions_innermost(first.signals):
        return dataclasses.replace(first, activations=activations)
    signals = _contiguous([w.signals for w in weights], 2)
    return dataclasses.replace(first, activations=activations, signals=signals)


def _positions_innermost(signals: Tensor) -> bool:
    """Whether ``(N, K, T, G, O)`` lie as convolutions give them, which every kernel takes."""
    laid_so = signals.stride(2) == 1 and signals.permute(0, 1, 3, 4, 2).is_contiguous()
    return laid_so and signals.numel() > 0  # without elements, strides mean nothing


def _contiguous(parts: Sequence[Tensor], axis: int) -> Tensor:
    # of parts with axes of size 1 torch.cat may lay out what it gives with channels last
    x = (parts[0] if len(parts) == 1 else torch.cat(list(parts), axis)).contiguous()
    strides = [1]  # axes of size 0 and 1 keep odd strides otherwise
    for size in reversed(x.shape[1:]):
        strides.insert(0, strides[0] * max(size, 1))
    return x.as_strided(x.shape, strides)


def _is_bias(found: Sequence[Term], weight: Sequence[Term], column: Column) -> bool:
    """Whether these are the sums of the weight's own signals, and none of them is pruned."""
    return (
        column.kept is None
        and len(found) == len(weight)
        and not any(isinstance(w, Outer) and w.transposed for w in weight)
        and all(
            isinstance(b, Summed) and isinstance(w, Outer) and b.signals is w.signals
            for b, w in zip(found, weight, strict=True)
        )
    )


def _rows(found: Sequence[Term], like: Tensor, size: int) -> Tensor:
    """Rows ``(N, K, P)`` of a parameter without factors: the sum over its uses."""
    if not found:
        return like.new_zeros(*like.shape, size)
    total = found[0].rows()
    for term in found[1:]:
        total = total + term.rows()
    return total


def _layout(
    weight: Outer, column: Column, patterns: dict[str, Pattern]
) -> tuple[Pattern | None, Tensor | None]:
    """Pattern of the ``(G·O, I)`` block, and the columns' order if it is not the parameter's."""
    if column.kept is None and not weight.transposed:
        return weight.pattern, None
    g, o, i = weight.shape
    # rank among the kept elements, -1 for the others; where the block has each element
    rank = torch.arange(g * o * i, device="cpu")
    if column.kept is not None:
        kept = column.kept.cpu()
        if weight.pattern is not None:  # of the elements that there are at all
            kept = weight.pattern.mask().flatten().nonzero().squeeze(1).cpu()[kept]
        rank = torch.full((g * o * i,), -1, device="cpu")
        rank[kept] = torch.arange(len(kept), device="cpu")
    if weight.transposed:
        rank = rank.view(g, i, o).transpose(1, 2).flatten()
    order = rank[rank >= 0] if weight.transposed else None
    if column.kept is None:
        return None, order
    if column.name not in patterns:
        patterns[column.name] = Pattern((rank >= 0).view(g * o, i))
    return patterns[column.name], order
