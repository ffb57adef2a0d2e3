"""Which parameters a ticket keeps: a mapping from parameter name to a bool tensor."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase

import torch
from rich.table import Table
from torch import Tensor, nn

from jacpot.nn.worn import checked_mask, named_parameters
from jacpot.tickets._files import read_tensors, write_tensors

__all__ = ["Mask"]

_FORMAT = "jacpot.Mask"
_SUFFIX = ".mask"  # of the buffers that `jacpot.tickets.apply` registers


def _patterns(patterns: str | Iterable[str] | None) -> list[str]:
    return [patterns] if isinstance(patterns, str) else list(patterns or ())


class Mask(Mapping[str, Tensor]):
    """Which parameters a ticket keeps, by parameter name. What a mask does not name is kept whole.

    A mask owns its tensors: they are copies, and nothing here changes them in place.

    Parameters
    ----------
    masks
        Bool tensors by parameter name; True means kept.

    Raises
    ------
    TypeError
        If a name is no string or a tensor is not bool.
    ValueError
        If a tensor is on the meta device.

    Examples
    --------
    >>> import torch, jacpot
    >>> mask = jacpot.Mask({"weight": torch.tensor([[True, False], [True, True]])})
    >>> mask.nnz, mask.numel, mask.density
    (3, 4, 0.75)
    >>> (~mask).nnz
    1
    """

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        if not isinstance(masks, Mapping):
            raise TypeError(
                f"argument 'masks' must map names to bool tensors, got {type(masks).__name__}"
            )
        self._masks: dict[str, Tensor] = {}
        for name, mask in masks.items():
            if not isinstance(name, str):
                raise TypeError(f"argument 'masks' must have parameter names as keys, got {name!r}")
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
                kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
                raise TypeError(f"argument 'masks' must hold bool tensors, got {kind} for {name!r}")
            if mask.is_meta:
                raise ValueError(
                    "argument 'masks' must hold values, got a tensor on the meta device for "
                    f"{name!r}"
                )
            self._masks[name] = mask.detach().clone(memory_format=torch.contiguous_format)

    @classmethod
    def ones(
        cls,
        module: nn.Module,
        include: str | Iterable[str] | None = None,
        exclude: str | Iterable[str] | None = None,
    ) -> Mask:
        """Keep everything.

        Parameters
        ----------
        module
            Its parameters name the masks.
        include, exclude
            Shell patterns of parameter names. By default the parameters of two or more dimensions
            are included (weights, no biases or scales) and none is excluded.

        Raises
        ------
        ValueError
            If a pattern matches no parameter.

        Examples
        --------
        >>> import torch, jacpot
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
        >>> list(jacpot.Mask.ones(net, exclude="1.*"))
        ['0.weight']
        """
        parameters = named_parameters(module)
        included, excluded = _patterns(include), _patterns(exclude)
        for argument, patterns in (("include", included), ("exclude", excluded)):
            for pattern in patterns:
                if not any(fnmatchcase(name, pattern) for name in parameters):
                    raise ValueError(
                        f"argument {argument!r}: {pattern!r} matches no parameter; "
                        f"there are {', '.join(parameters)}"
                    )

        def chosen(name: str, parameter: Tensor) -> bool:
            if any(fnmatchcase(name, pattern) for pattern in excluded):
                return False
            if included:
                return any(fnmatchcase(name, pattern) for pattern in included)
            return parameter.dim() >= 2

        return cls(
            {
                name: torch.ones_like(
                    parameter, dtype=torch.bool, memory_format=torch.contiguous_format
                )
                for name, parameter in parameters.items()
                if chosen(name, parameter)
            }
        )

    def __getitem__(self, name: str) -> Tensor:
        return self._masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    @property
    def numel(self) -> int:
        """Weights that the mask speaks of."""
        return sum(mask.numel() for mask in self._masks.values())

    @property
    def nnz(self) -> int:
        """Weights kept."""
        return sum(int(mask.sum()) for mask in self._masks.values())

    @property
    def density(self) -> float:
        """Share of weights kept, 0 to 1; of a mask without weights, 1."""
        return self.nnz / self.numel if self.numel else 1.0

    @property
    def densities(self) -> dict[str, float]:
        """Density of each named parameter."""
        return {name: Mask({name: mask}).density for name, mask in self._masks.items()}

    def table(self, title: str | None = None) -> Table:
        """Kept weights and density by parameter, to print with rich."""
        table = Table("parameter", "shape", "kept", "of", "density", title=title)
        for name, mask in self._masks.items():
            one = Mask({name: mask})
            shape = " x ".join(str(size) for size in mask.shape)
            table.add_row(name, shape, f"{one.nnz:,}", f"{one.numel:,}", f"{one.density:.4f}")
        table.add_section()
        table.add_row("all", "", f"{self.nnz:,}", f"{self.numel:,}", f"{self.density:.4f}")
        return table

    def __repr__(self) -> str:
        return (
            f"Mask({len(self)} parameters, {self.nnz} of {self.numel} kept, "
            f"density {self.density:.4g})"
        )

    def __invert__(self) -> Mask:
        return Mask({name: ~mask for name, mask in self._masks.items()})

    def __and__(self, other: Mapping[str, Tensor]) -> Mask:
        return self._combine(other, torch.logical_and)

    def __or__(self, other: Mapping[str, Tensor]) -> Mask:
        return self._combine(other, torch.logical_or)

    def _combine(
        self, other: Mapping[str, Tensor], operation: Callable[[Tensor, Tensor], Tensor]
    ) -> Mask:
        check_same_layout("other", other, self)
        return Mask(
            {name: operation(mask, other[name].to(mask.device)) for name, mask in self.items()}
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mapping):
            return NotImplemented
        return self.keys() == other.keys() and all(
            isinstance(other[name], Tensor) and torch.equal(mask, other[name].to(mask.device))
            for name, mask in self.items()
        )

    __hash__ = None  # type: ignore[assignment]  # equality looks inside, as for list and dict

    def to(self, device: torch.device | str) -> Mask:
        """The same mask on a device."""
        return Mask({name: mask.to(device) for name, mask in self._masks.items()})

    def shuffle(self, seed: int = 0) -> Mask:
        """Permute the kept positions within each parameter: densities stay, positions do not.

        The sanity check of Frankle et al., *Pruning neural networks at initialization* (2021).
        """
        generator = torch.Generator().manual_seed(seed)
        shuffled = {}
        for name, mask in self._masks.items():
            order = torch.randperm(mask.numel(), generator=generator, device="cpu").to(mask.device)
            shuffled[name] = mask.flatten()[order].view_as(mask)
        return Mask(shuffled)

    def save(self, path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None) -> None:
        """Write a safetensors file, whole or not at all, with ``metadata`` beside the masks."""
        header = {"format": _FORMAT, "order": json.dumps(list(self)), **(metadata or {})}
        write_tensors(path, self, header)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Mask:
        """Read what :meth:`save` wrote.

        Raises
        ------
        ValueError
            If the file is no mask, or a damaged one.
        OSError
            If there is no such file, or it is a folder.
        """
        tensors, metadata = read_tensors(path)
        if metadata.get("format") != _FORMAT:
            raise ValueError(
                f"argument 'path': {os.fspath(path)} was not written by Mask.save "
                f"(its format is {metadata.get('format')!r})"
            )
        try:
            order = json.loads(metadata.get("order", ""))
        except ValueError:
            order = None
        if not isinstance(order, list) or sorted(map(str, order)) != sorted(tensors):
            raise ValueError(
                f"argument 'path': {os.fspath(path)} is damaged: its header does not list the "
                "masks that it holds"
            )
        return cls({name: tensors[name] for name in order})

    def state_dict(self) -> dict[str, Tensor]:
        """The masks under the keys that they have in a module to which they are applied."""
        keys = {name: name.rpartition(".") for name in self._masks}
        return {
            f"{path}{dot}parametrizations.{leaf}.0{_SUFFIX}": self._masks[name].clone()
            for name, (path, dot, leaf) in keys.items()
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> Mask:
        """The masks in the ``state_dict`` of a module to which a mask was applied.

        Examples
        --------
        >>> import torch, jacpot
        >>> from jacpot import tickets
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4))
        >>> mask = jacpot.Mask.ones(net).shuffle()
        >>> jacpot.Mask.from_state_dict(tickets.apply(net, mask).state_dict()) == mask
        True
        """
        found = {}
        for key, value in state.items():
            path, marker, tail = key.rpartition("parametrizations.")
            leaf, _, buffer = tail.partition(".")
            if marker and buffer.endswith(_SUFFIX) and value.dtype == torch.bool:
                found[path + leaf] = value
        return cls(found)


def chosen_mask(module: nn.Module, mask: Mapping[str, Tensor] | None) -> Mask:
    """The mask given, checked against the module's parameters, or by default the one of ones."""
    return Mask.ones(module) if mask is None else Mask(checked_mask(module, mask))


def check_same_layout(
    argument: str, given: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> None:
    """Refuse a mapping whose names or shapes are not those of ``expected``."""
    if not isinstance(given, Mapping):
        raise TypeError(
            f"argument {argument!r} must map names to tensors, got {type(given).__name__}"
        )
    if given.keys() != expected.keys():
        odd = sorted(given.keys() ^ expected.keys())
        raise ValueError(f"argument {argument!r} must name the same parameters; differs in {odd}")
    for name, tensor in expected.items():
        if given[name].shape != tensor.shape:
            raise ValueError(
                f"argument {argument!r}: {name!r} must have shape {tuple(tensor.shape)}, "
                f"got {tuple(given[name].shape)}"
            )
