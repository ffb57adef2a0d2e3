"""The block of a parameter that is used in several ways, as a table that is the last layer too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from jacpot.ops.arrays import Kind

if TYPE_CHECKING:
    from jacpot.ops.jacobian_blocks import Factors, Lookup

__all__ = ["Added"]


@dataclass(frozen=True, eq=False)
class Added:
    """The sum of blocks of the same columns, which stay factors.

    Parameters
    ----------
    parts
        Blocks ``(N, K, P)`` without a bias, of the same kept entries ``(V, D)``: of a table, and of
        a weight of one group whose ``V`` outputs have ``D`` inputs.

    Raises
    ------
    ValueError
        If there are none, or they have other columns.

    Examples
    --------
    >>> import torch
    >>> from jacpot.ops.jacobian import Factors, Lookup, dense
    >>> table = Lookup(torch.tensor([[1]]), torch.tensor([[[[5.0]]]]), n_tokens=2)
    >>> a, s = torch.tensor([3.0]), torch.tensor([1.0, 2.0])
    >>> head = Factors(a.view(1, 1, 1, 1), s.view(1, 1, 1, 1, 2))
    >>> dense([Added((table, head))])
    tensor([[[ 3., 11.]]])
    """

    parts: tuple[Factors | Lookup, ...]

    def __post_init__(self) -> None:
        if len({part.n_parameters for part in self.parts}) != 1:
            sizes = [part.n_parameters for part in self.parts]
            raise ValueError(
                f"argument 'parts' must hold blocks of the same columns, got {sizes} of them"
            )

    @property
    def kind(self) -> Kind:
        """What kind of array results are."""
        return self.parts[0].kind

    @property
    def n_examples(self) -> int:
        """Examples, ``N``."""
        return self.parts[0].n_examples

    @property
    def n_outputs(self) -> int:
        """Outputs per example, ``K``."""
        return self.parts[0].n_outputs

    @property
    def n_parameters(self) -> int:
        """Columns of the block."""
        return self.parts[0].n_parameters

    @property
    def nbytes(self) -> int:
        """Bytes that all factors take."""
        return sum(part.nbytes for part in self.parts)

    @property
    def dtype(self) -> torch.dtype:
        """The element type."""
        return self.parts[0].dtype

    @property
    def device(self) -> torch.device:
        """Where the factors lie."""
        return self.parts[0].device
