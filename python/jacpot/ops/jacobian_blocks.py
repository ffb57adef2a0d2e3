"""The blocks that a Jacobian is made of: factors of a layer, lookups, or rows as they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from jacpot._backend import core, empty, settle, threads
from jacpot.ops.arrays import Kind, as_tensor, kind_of
from jacpot.ops.jacobian_added import Added
from jacpot.ops.jacobian_kernels import kernels
from jacpot.ops.jacobian_lookup import Lookup
from jacpot.ops.jacobian_signals import OfSignals

__all__ = [
    "Added",
    "Block",
    "Factors",
    "KeptWeights",
    "Lookup",
    "Rows",
    "check_blocks",
    "row_panels",
]

PANEL_BYTES = 64 << 20  # rows are generated in panels of about this size

# Products without the units that are off are faster than those of a BLAS with all of them where at
# most this part of them is on, of at least so many rows that share a panel of the weight.
MOST_LIVE = 0.7
FEWEST_ROWS = 64
FEW_UNITS = 16  # up to here a BLAS is slower even at a layer that is on everywhere


class KeptWeights(Protocol):
    """What is needed of a :class:`jacpot.Pattern`: the kept weights, row by row (CSR)."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""

    @property
    def nnz(self) -> int:
        """How many are kept."""

    @property
    def row_offsets(self) -> Any:
        """Where each row's kept weights begin, and the end of the last."""

    @property
    def column_indices(self) -> Any:
        """Column of each kept weight, rising inside a row."""


_known: Any = WeakTensorKeyDictionary()


def _row_offsets(pattern: KeptWeights, device: torch.device) -> Tensor:
    """Give row offsets in int64: of one pattern the same tensor, by which kernels know it."""
    block = getattr(pattern, "block", None)
    known: Tensor | None = None if block is None else _known.get(block)
    if known is None or known.device != device:
        known = torch.as_tensor(pattern.row_offsets, device=device).to(torch.int64)
        if block is not None:
            settle(known)
            _known[block] = known
    return known


def _tensor(array: Any, name: str, rank: int) -> Tensor:
    """Give the argument as a tensor that shares its memory, or a refusal that names it."""
    tensor = as_tensor(name, array)
    if tensor.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"argument {name!r} must be float32 or float64, got {tensor.dtype}")
    if tensor.device.type not in ("cpu", "cuda"):
        raise ValueError(
            f"argument {name!r} must be on the CPU or a CUDA device, got {tensor.device}"
        )
    if tensor.ndim != rank:
        raise ValueError(
            f"argument {name!r} must have {rank} dimensions, got shape {tuple(tensor.shape)}"
        )
    return tensor.detach()


@dataclass(frozen=True, eq=False)
class Factors(OfSignals):
    """The factored block of a layer's weight, ``J[n,k,(g,o),i] = Σ_t δ[n,k,t,g,o] · a[n,t,g,i]``.

    Parameters
    ----------
    activations
        ``a (N, T, G, I)``: what the layer saw at its ``T`` positions, in its ``G`` groups.
    signals
        ``δ (N, K, T, G, O)``: the outputs' derivatives by what the layer gave.
    pattern
        Kept weights of the ``(G·O, I)`` block; None keeps all. The block's columns are then the
        kept weights in row-major order.
    bias
        Whether the layer has a bias, whose ``G·O`` columns ``Σ_t δ`` follow those of the weight.

    Raises
    ------
    TypeError
        If an array is neither float32 nor float64, or the two differ.
    ValueError
        If shapes or devices do not fit each other.

    Examples
    --------
    >>> import torch
    >>> Factors(torch.ones(5, 1, 1, 3), torch.ones(5, 2, 1, 1, 4), bias=True).n_parameters
    16
    """

    activations: Tensor
    signals: Tensor
    pattern: KeptWeights | None = None
    bias: bool = False
    kind: Kind = field(init=False, default="torch")

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", kind_of(self.activations))
        a = _tensor(self.activations, "activations", 4)
        s = _tensor(self.signals, "signals", 5)
        if a.dtype != s.dtype:
            raise TypeError(
                f"argument 'signals' must be {a.dtype} like 'activations', got {s.dtype}"
            )
        if a.device != s.device:
            raise ValueError(
                f"argument 'signals' must be on {a.device} like 'activations', got {s.device}"
            )
        n, t, g, i = a.shape
        if (s.shape[0], s.shape[2], s.shape[3]) != (n, t, g):
            raise ValueError(
                f"argument 'signals' must have shape ({n}, K, {t}, {g}, O) to go with "
                f"'activations' of shape {tuple(a.shape)}, got {tuple(s.shape)}"
            )
        if self.pattern is not None and tuple(self.pattern.shape) != (g * s.shape[4], i):
            raise ValueError(
                f"argument 'pattern' must have shape ({g * s.shape[4]}, {i}), "
                f"got {tuple(self.pattern.shape)}"
            )
        object.__setattr__(self, "activations", a)
        object.__setattr__(self, "signals", s)

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """Groups, outputs and inputs of the weight, ``(G, O, I)``."""
        return self.signals.shape[3], self.signals.shape[4], self.activations.shape[3]

    @property
    def nbytes(self) -> int:
        """Bytes that both factors take."""
        return self.activations.nbytes + self.signals.nbytes

    @cached_property
    def n_weights(self) -> int:
        """Kept weights, the bias not counted."""
        g, o, i = self.shape
        return g * o * i if self.pattern is None else int(self.pattern.nnz)

    @cached_property
    def n_parameters(self) -> int:
        """Columns of the block: kept weights, and the bias if there is one."""
        return self.n_weights + (self.shape[0] * self.shape[1] if self.bias else 0)

    @cached_property
    def row_offsets(self) -> Tensor:
        """Where the kept weights of each of the ``G·O`` rows begin and end, int64."""
        if self.pattern is None:
            raise RuntimeError("a block without a pattern has no row offsets")
        return _row_offsets(self.pattern, self.device)

    @cached_property
    def column_indices(self) -> Tensor:
        """Input of each kept weight, int32."""
        if self.pattern is None:
            raise RuntimeError("a block without a pattern has no column indices")
        return torch.as_tensor(self.pattern.column_indices, device=self.device).to(torch.int32)

    @cached_property
    def operands(self) -> tuple[Tensor, Tensor]:
        """Both factors as the products read them; a copy is made of what is laid out otherwise.

        Activations are contiguous; signals are so from their positions on, or have these innermost
        as convolutions give them, and may be expanded.
        """
        a, s = self.activations.contiguous(), self.signals
        one = s[0, 0] if s.shape[0] and s.shape[1] else s
        dense = s.numel() == 0 or one.is_contiguous() or one.permute(1, 2, 0).is_contiguous()
        return a, s if dense else s.contiguous()

    @cached_property
    def live(self) -> Any:
        """The factors without the units that are off, or None where that is not worth it.

        A unit is off at an example's position where its signals are zero for all outputs, as behind
        a ReLU. Made when the first product is asked for; takes the room of the signals that are
        left besides.
        """
        rows = self.n_examples * self.n_positions
        if self.device.type != "cpu" or rows < FEWEST_ROWS:
            return None
        few_units = self.n_positions == 1 and self.shape[0] * self.shape[1] <= FEW_UNITS
        most = 1.0 if few_units and self.pattern is None else MOST_LIVE
        return core.jacobian_live_factors(
            (self.activations.contiguous(), self.signals), *self.layout, self.bias, most, threads()
        )

    @cached_property
    def strided(self) -> tuple[Tensor, Tensor]:
        """Both factors with an innermost stride of 1, which is all that most kernels ask for."""
        s = self.signals
        s = s if s.stride(4) == 1 or s.shape[4] <= 1 else s.contiguous()
        return self.strided_activations, s

    @property
    def for_rows(self) -> tuple[Tensor, Tensor]:
        """Both factors as rows are generated from: signals may have their positions innermost."""
        if self.signals.stride(2) == 1 and self.n_positions > 1:
            return self.strided_activations, self.signals
        return self.strided

    @cached_property
    def strided_activations(self) -> Tensor:
        """The activations with an innermost stride of 1."""
        a = self.activations
        return a if a.stride(3) == 1 or a.shape[3] <= 1 else a.contiguous()

    @cached_property
    def layout(self) -> tuple[Tensor | None, Tensor | None]:
        """Row offsets and column indices of the pattern, or two times None."""
        return (None, None) if self.pattern is None else (self.row_offsets, self.column_indices)

    @cached_property
    def kept(self) -> Tensor:
        """Flat index of each kept weight in the ``(G·O, I)`` block, int64."""
        counts = self.row_offsets.diff()
        rows = torch.arange(len(counts), device=self.device)
        rows = torch.repeat_interleave(rows, counts, output_size=self.n_weights)
        return rows * self.shape[2] + self.column_indices.long()


@dataclass(frozen=True, eq=False)
class Rows:
    """A block whose rows are given, for parameters that do not factorise.

    Parameters
    ----------
    rows
        ``(N, K, P_block)``, already restricted to kept parameters.

    Examples
    --------
    >>> import torch
    >>> Rows(torch.ones(5, 2, 7)).n_parameters
    7
    """

    rows: Tensor
    kind: Kind = field(init=False, default="torch")

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", kind_of(self.rows))
        object.__setattr__(self, "rows", _tensor(self.rows, "rows", 3))

    @property
    def n_examples(self) -> int:
        """Examples, ``N``."""
        return self.rows.shape[0]

    @property
    def n_outputs(self) -> int:
        """Outputs per example, ``K``."""
        return self.rows.shape[1]

    @property
    def n_parameters(self) -> int:
        """Columns of the block."""
        return self.rows.shape[2]

    @property
    def dtype(self) -> torch.dtype:
        """The element type."""
        return self.rows.dtype

    @property
    def device(self) -> torch.device:
        """Where the rows lie."""
        return self.rows.device

    @property
    def nbytes(self) -> int:
        """Bytes that the rows take."""
        return self.rows.nbytes


Block: TypeAlias = Factors | Lookup | Added | Rows


def check_blocks(blocks: Sequence[Block], name: str = "blocks") -> tuple[int, int, torch.dtype]:
    """``(N, K, dtype)`` that all blocks share.

    Raises
    ------
    TypeError
        If an entry is no block, or dtypes differ.
    ValueError
        If there are none, or they differ in device, examples or outputs.
    """
    if not blocks:
        raise ValueError(f"argument {name!r} must hold at least one block, got none")
    for i, block in enumerate(blocks):
        if not isinstance(block, Factors | Lookup | Added | Rows):
            raise TypeError(
                f"argument '{name}[{i}]' must be Factors, Lookup, Added or Rows, "
                f"got {type(block).__name__}"
            )
    first = blocks[0]
    for i, block in enumerate(blocks):
        if block.dtype != first.dtype:
            raise TypeError(
                f"argument '{name}[{i}]' must be {first.dtype} like '{name}[0]', got {block.dtype}"
            )
        if block.device != first.device:
            raise ValueError(
                f"argument '{name}[{i}]' must be on {first.device} like '{name}[0]', "
                f"got {block.device}"
            )
        if (block.n_examples, block.n_outputs) != (first.n_examples, first.n_outputs):
            raise ValueError(
                f"argument '{name}[{i}]' must have {first.n_examples} examples and "
                f"{first.n_outputs} outputs like '{name}[0]', got {block.n_examples} and "
                f"{block.n_outputs}"
            )
    return first.n_examples, first.n_outputs, first.dtype


def row_panels(
    block: Block, budget: int = PANEL_BYTES, weights: bool = True, examples: int | None = None
) -> Iterator[Tensor]:
    """Generate the block's rows ``(N, K, p)``, in panels of columns in the order of parameters.

    No panel is larger than ``budget`` bytes unless a single row of the weight is. Without
    ``weights``, the columns of the bias alone. Panels are cut for ``examples`` (by default the
    block's own), so that those of blocks with different numbers of them can hold the same columns.
    """
    if isinstance(block, Rows):
        yield block.rows
        return
    if isinstance(block, Lookup):
        every = torch.arange(block.n_tokens, device=block.device)
        yield from block.panels(every, budget, examples)
        return
    if isinstance(block, Added):
        n = block.n_examples if examples is None else examples
        each = [row_panels(part, budget, examples=n) for part in block.parts]
        for first, *others in zip(*each, strict=True):
            for panel in others:
                first += panel
            yield first
        return
    n, k = block.n_examples, block.n_outputs
    g, o, i = block.shape
    if weights and block.n_weights:
        a, s = block.for_rows
        rows = k * (n if examples is None else examples)
        width = min(o, max(1, budget // max(1, rows * i * block.dtype.itemsize)))
        for group in range(g):
            for start in range(0, o, width):
                stop = min(o, start + width)
                factors = a[:, :, group : group + 1], s[:, :, :, group : group + 1, start:stop]
                panel = empty((n, k, (stop - start) * i), a)
                kernels(panel).jacobian_rows(factors, panel, 0, threads())
                if block.pattern is not None:
                    low, high = group * o + start, group * o + stop
                    kept = block.kept[block.row_offsets[low] : block.row_offsets[high]]
                    panel = panel.index_select(2, kept - low * i)
                yield panel
    if block.bias:
        s = block.signals
        yield (s[:, :, 0] if s.shape[2] == 1 else s.sum(2)).reshape(n, k, g * o)
