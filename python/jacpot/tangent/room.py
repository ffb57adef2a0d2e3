"""Memory for all examples, filled by successive parts of them."""

from __future__ import annotations

from torch import Tensor

from jacpot._backend import empty

__all__ = ["Room", "in_a_row"]


class Room:
    """Where parts of the examples put their rows, so that joining them copies nothing.

    Parameters
    ----------
    n
        Examples in all.

    Examples
    --------
    >>> import torch
    >>> room, like = Room(3), torch.ones(())
    >>> room.begin(0)
    >>> first = room("weight", (2, 1, 4), like)
    >>> room.begin(2)
    >>> second = room("weight", (1, 1, 4), like)
    >>> in_a_row([first, second]).shape
    torch.Size([3, 1, 4])
    """

    def __init__(self, n: int) -> None:
        self.n = n
        self._made: dict[str, Tensor] = {}
        self.begin(0)

    def begin(self, example: int) -> None:
        """Go on with the part that begins with this example."""
        self.example = example
        self._given: set[str] = set()

    def __call__(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Give uninitialised memory of this part's shape ``(M, ...)``, its own if there is any."""
        ahead, rest = slice(self.example, self.example + shape[0]), shape[1:]
        if name in self._given or ahead.stop > self.n:
            return empty(shape, like)
        whole = self._made.get(name)
        if whole is None:
            whole = self._made[name] = empty((self.n, *rest), like)
        if whole.shape[1:] != rest:
            return empty(shape, like)
        self._given.add(name)
        return whole[ahead]


def in_a_row(parts: list[Tensor]) -> Tensor | None:
    """Give the tensor that successive parts lie in one after the other; None if they do not."""
    first = parts[0]
    end = first.data_ptr()
    for part in parts:
        together = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not (together and part.data_ptr() == end and part.is_contiguous()):
            return None
        end += part.nbytes
    return first.as_strided((sum(map(len, parts)), *first.shape[1:]), first.stride())
