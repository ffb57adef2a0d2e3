"""A Jacobian's blocks by parameter, for two Jacobians whose blocks do not match one another.

They need not where masks differ, where examples of other lengths make rows of what elsewhere stays
factors, or where each example takes its own way through the network.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from jacpot.ops.jacobian import Added, Block, Factors, Lookup, Rows, dense
from jacpot.ops.pattern import Pattern
from jacpot.tangent.assemble import Column, Columns

__all__ = ["Piece", "in_common", "pieces", "same_layout", "stacked"]


@dataclasses.dataclass(frozen=True, eq=False)
class Piece:
    """The block of a single parameter.

    Attributes
    ----------
    column
        The parameter's columns.
    block
        The parameter's own, without a bias.
    order
        Where among the kept elements each of the block's columns goes; None if they are in order.
    """

    column: Column
    block: Block
    order: Tensor | None

    @property
    def elements(self) -> Tensor:
        """Flat index in the parameter of each of the block's columns."""
        kept = self.column.kept
        if kept is None:
            kept = torch.arange(self.column.shape.numel(), device=self.block.device)
        return kept if self.order is None else kept[self.order.to(kept.device)]

    def rows(self) -> Rows:
        """Write the block out, in the parameter's order."""
        if isinstance(self.block, Rows):
            return self.block
        full: Tensor = dense([self.block])
        return Rows(full if self.order is None else full[:, :, self.order.argsort()])

    def restricted(self, wanted: Tensor) -> Piece:
        """Keep the columns of the elements that are wanted, a flat bool tensor."""
        kept = wanted.nonzero().squeeze(1)
        column = dataclasses.replace(self.column, kept=kept)
        chosen = wanted[self.elements]
        if isinstance(self.block, Lookup):
            kept_entries = wanted.view(self.column.shape).to(self.block.device)
            return Piece(column, dataclasses.replace(self.block, kept=kept_entries), None)
        if not isinstance(self.block, Factors):
            return Piece(column, Rows(self.rows().rows[:, :, chosen].contiguous()), None)
        g, o, i = self.block.shape
        dense_block = self.block.pattern is None
        places = torch.arange(g * o * i, device="cpu") if dense_block else self.block.kept.cpu()
        mask = torch.zeros(g * o * i, dtype=torch.bool, device="cpu")
        mask[places[chosen.cpu()]] = True
        block = dataclasses.replace(self.block, pattern=Pattern(mask.view(g * o, i)))
        order = None if self.order is None else self.elements[chosen].argsort().argsort()
        return Piece(column, block, order)


def pieces(
    columns: Columns, blocks: Sequence[Block], orders: Sequence[Tensor | None]
) -> list[Piece]:
    """Split the blocks of a Jacobian into those of single parameters, in the columns' order."""
    found = []
    names = iter(column for column in columns.parameters if column.size)
    for block, order in zip(blocks, orders, strict=True):
        if isinstance(block, Factors) and block.bias:
            found.append(Piece(next(names), dataclasses.replace(block, bias=False), order))
            found.append(Piece(next(names), Rows(block.signals.sum(2).flatten(2)), None))
        else:
            found.append(Piece(next(names), block, order))
    return found


def same_layout(a: Sequence[Block], b: Sequence[Block]) -> bool:
    """Whether two lists of blocks, of the same columns, have the same columns in each."""
    return [_layout(block) for block in a] == [_layout(block) for block in b]


def _layout(block: Block) -> tuple[object, ...]:
    if isinstance(block, Factors):
        return Factors, block.shape, block.bias
    if isinstance(block, Lookup):
        return Lookup, block.n_tokens, block.width, block.n_parameters
    if isinstance(block, Added):
        return Added, *map(_layout, block.parts)
    return Rows, block.n_parameters


def in_common(left: Sequence[Piece], right: Sequence[Piece]) -> tuple[list[Block], list[Block]]:
    """Blocks that match of the elements that both keep; all else meets zeros in a product."""
    others = {piece.column.name: piece for piece in right}
    first: list[Block] = []
    second: list[Block] = []
    for piece in left:
        if piece.column.name not in others:
            continue
        other = others[piece.column.name]
        wanted = torch.zeros(piece.column.shape.numel(), dtype=torch.int8, device="cpu")
        wanted[piece.elements.cpu()] += 1
        wanted[other.elements.cpu()] += 1
        both = (wanted == 2).to(piece.block.device)
        if not both.any():
            continue
        if not both.all():
            piece, other = piece.restricted(both), other.restricted(both)
        a, b = piece.block, other.block
        straight = piece.order is None and other.order is None
        turned = piece.order is not None and other.order is not None
        if not (same_layout([a], [b]) and (straight or turned)):
            a, b = piece.rows(), other.rows()
        first.append(a)
        second.append(b)
    return first, second


def stacked(parts: Sequence[Sequence[Piece]]) -> tuple[list[Block], list[Tensor | None]]:
    """Join the pieces of successive examples: blocks, and the orders of their columns."""
    blocks: list[Block] = []
    orders: list[Tensor | None] = []
    for same in zip(*parts, strict=True):
        # Of examples that do not use a parameter there are rows, all zero.
        used = [p for p in same if not isinstance(p.block, Rows) or p.block.rows.any()]
        factors = [p.block for p in used if not isinstance(p.block, Rows | Added)]
        layouts = {_layout(block) for block in factors}
        turned = {p.order is not None for p in used}
        if factors and len(layouts) == len(turned) == 1 and len(factors) == len(used):
            like, length = factors[0], max(block.n_positions for block in factors)
            each = [piece.block for piece in same if not isinstance(piece.block, Added)]
            padded = [_padded(block, like, length) for block in each]
            given, signals = (torch.cat(tensors) for tensors in zip(*padded, strict=True))
            if isinstance(like, Factors):
                blocks.append(Factors(given, signals, like.pattern))
            else:
                blocks.append(Lookup(given, signals, like.n_tokens, like.kept))
            orders.append(used[0].order)
        else:
            blocks.append(Rows(torch.cat([piece.rows().rows for piece in same])))
            orders.append(None)
    return blocks, orders


def _padded(
    block: Factors | Lookup | Rows, like: Factors | Lookup, length: int
) -> tuple[Tensor, Tensor]:
    """Activations or tokens, and signals, with positions of zeros added up to a number of them."""
    missing = length - (0 if isinstance(block, Rows) else block.n_positions)
    if isinstance(block, Factors):
        pad = (0, 0, 0, 0, 0, missing)
        return F.pad(block.activations, pad), F.pad(block.signals, pad)
    if isinstance(block, Lookup):
        return F.pad(block.tokens, (0, missing)), F.pad(block.signals, (0, 0, 0, missing))
    n, k = block.n_examples, block.n_outputs
    if isinstance(like, Lookup):
        return like.tokens.new_zeros(n, length), block.rows.new_zeros(n, k, length, like.width)
    g, o, i = like.shape
    return block.rows.new_zeros(n, length, g, i), block.rows.new_zeros(n, k, length, g, o)
