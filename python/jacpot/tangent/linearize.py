"""A network's first-order Taylor expansion in its parameters, as a module that can be fitted."""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp

from jacpot.linalg import Interrupted, Solution
from jacpot.tangent.jacobian import Jacobian, jacobian
from jacpot.tangent.operators import JacobianOperator
from jacpot.tangent.progress import observing
from jacpot.tangent.squared import fit_squared

__all__ = ["LinearizedModule", "linearize"]

LOSSES = ("mse",)


class LinearizedModule(nn.Module):
    """``x -> f(x, θ0) + J(x) Δ``. Made by :func:`linearize`.

    Its parameters are the displacement Δ, zero at first: an optimizer can train them, and
    :meth:`fit` finds the best in closed form.
    """

    def __init__(self, module: nn.Module, mask: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        base = copy.deepcopy(module)
        names = [name for name, p in base.named_parameters() if p.requires_grad]
        if not names:
            raise ValueError("argument 'module' has no parameters that require a gradient")
        self.mask = _checked_mask(base, mask)
        with torch.no_grad():
            for name, kept in self.mask.items():
                base.get_parameter(name).mul_(kept)
        # Not a submodule: the expansion point is no parameter of the linearized network.
        object.__setattr__(self, "base", base)
        self.base: nn.Module
        self._names = names
        # A parameter's name may not hold a dot.
        self.deltas = nn.ParameterDict(
            {
                name.replace(".", "/"): nn.Parameter(torch.zeros_like(base.get_parameter(name)))
                for name in names
            }
        )
        _load_forward_mode()

    @property
    def delta(self) -> dict[str, Tensor]:
        """The displacement Δ by parameter name; zero where the mask prunes."""
        return {name: value.detach() for name, value in self._displacement().items()}

    def _displacement(self) -> dict[str, Tensor]:
        out = {}
        for name in self._names:
            value = self.deltas[name.replace(".", "/")]
            out[name] = value * self.mask[name] if name in self.mask else value
        return out

    @torch.no_grad()
    def set_delta(self, delta: Mapping[str, Tensor]) -> None:
        """Set the displacement.

        Parameters
        ----------
        delta
            Tensors by parameter name; a name that is missing gets zero.

        Raises
        ------
        KeyError
            For a name that is no trainable parameter of the module.
        """
        unknown = set(delta) - set(self._names)
        if unknown:
            raise KeyError(f"argument 'delta' names {sorted(unknown)}, which are no parameters")
        for name in self._names:
            target = self.deltas[name.replace(".", "/")]
            if name in delta:
                target.copy_(delta[name])
            else:
                target.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate the linearized network; differentiable in Δ."""
        point = {name: self.base.get_parameter(name).detach() for name in self._names}

        def outputs(parameters: dict[str, Tensor]) -> Any:
            return functional_call(self.base, parameters, (x,))

        value, change = jvp(outputs, (point,), (self._displacement(),))  # type: ignore[misc]
        result: Tensor = value + change
        return result

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LinearizedModule:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.base._apply(fn)  # type: ignore[no-untyped-call]
        return self

    def fit(
        self,
        x: Tensor,
        y: Tensor,
        loss: str = "mse",
        ridge: float = 0.0,
        method: str = "auto",
        preconditioner: Any = "auto",
        tol: float = 1e-6,
        max_iter: int | None = None,
        callback: Callable[[int, float, float], Any] | None = None,
        progress: bool = False,
    ) -> Solution:
        """Find the Δ that minimises ``Σ_n loss(f(x_n) + J(x_n) Δ, y_n) + ridge/2 ‖Δ‖²``.

        Parameters
        ----------
        x
            Inputs, (N, ...).
        y
            Targets of the dtype and shape of the outputs, (N, K), or (N,) when K = 1.
        loss
            ``"mse"``: ``½ ‖·‖²`` for each example.
        ridge
            Non-negative. Zero gives, of all minimisers, the one of least norm.
        method
            ``"dual"`` (N·K unknowns), ``"primal"`` (P unknowns), ``"lsmr"``, ``"svd"`` or
            ``"auto"``, which takes the smaller space.
        preconditioner, tol, max_iter, callback
            As in :func:`jacpot.solve`.
        progress
            Show a progress bar.

        Returns
        -------
        Solution
            ``x`` is Δ in one vector; `delta` is set from it, also when it did not converge.

        Raises
        ------
        TypeError, ValueError
            For arguments that do not fit; the message names the argument.
        Interrupted
            On Ctrl-C; `delta` then holds what was reached.

        Examples
        --------
        >>> import torch, jacpot
        >>> _ = torch.manual_seed(0)
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 1))
        >>> x, y = torch.randn(20, 2), torch.randn(20, 1)
        >>> lin = jacpot.linearize(net)
        >>> solution = lin.fit(x, y, ridge=1e-3)
        >>> solution.converged, bool((lin(x) - y).abs().max() < 0.2)
        (True, True)
        """
        if loss not in LOSSES:
            raise ValueError(f"argument 'loss' must be one of {LOSSES}, got {loss!r}")
        if not (ridge >= 0 and ridge < float("inf")):
            raise ValueError(f"argument 'ridge' must be finite and at least 0, got {ridge}")
        j = jacobian(self.base, x, mask=self.mask or None)
        targets = _checked_targets(y, j.outputs)
        operator = JacobianOperator(j.blocks, j.n_examples, j.n_outputs)
        residual = targets.double() - j.outputs.double()
        with observing(callback, progress, tol) as observe:
            try:
                solution = fit_squared(
                    operator, residual, ridge, method, preconditioner, tol, max_iter, observe
                )
            except Interrupted as stop:
                raise Interrupted(self._accept(j, stop.solution)) from None
        return self._accept(j, solution)

    def _accept(self, j: Jacobian, solution: Solution) -> Solution:
        """Set Δ from a solution whose x is in the order of the blocks; give it in that of J."""
        parts = torch.split(solution.x, [block.n_parameters for block in j.blocks])
        x = j.from_blocks(parts) if parts else solution.x
        self.set_delta(j.unflatten(x.to(j.dtype)))
        return dataclasses.replace(solution, x=x)


def linearize(module: nn.Module, mask: Mapping[str, Tensor] | None = None) -> LinearizedModule:
    """Expand a network to first order in its parameters.

    Parameters
    ----------
    module
        Any module whose forward takes one tensor; it is copied, so that training it later does
        not move the expansion point.
    mask
        Bool tensors by parameter name; the network is evaluated at the masked parameters and
        only kept ones may move. What it does not name is kept whole.

    Returns
    -------
    LinearizedModule
        ``x -> f(x, θ0) + J(x) Δ`` with Δ = 0.

    Raises
    ------
    ValueError, TypeError
        If the mask does not fit the module's parameters.

    Notes
    -----
    Jacot et al. 2018; Lee et al. 2019, "Wide neural networks of any depth evolve as linear models".

    Examples
    --------
    >>> import torch, jacpot
    >>> net = torch.nn.Linear(3, 2)
    >>> lin = jacpot.linearize(net)
    >>> x = torch.randn(5, 3)
    >>> bool(torch.allclose(lin(x), net(x)))
    True
    """
    return LinearizedModule(module, mask)


@functools.cache
def _load_forward_mode() -> None:
    # The first jvp of a process loads a module that uses torch.jit.script, which warns.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        importlib.import_module("torch._decomp.decompositions_for_jvp")


def _checked_mask(module: nn.Module, mask: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    parameters = dict(module.named_parameters())
    out = {}
    for name, kept in dict(mask or {}).items():
        if name not in parameters:
            raise ValueError(f"argument 'mask' names {name!r}, no parameter of the module")
        if kept.dtype != torch.bool:
            raise TypeError(
                f"argument 'mask' must hold bool tensors, got {kept.dtype} for {name!r}"
            )
        if kept.shape != parameters[name].shape:
            raise ValueError(
                f"argument 'mask' must have shape {tuple(parameters[name].shape)} for {name!r}, "
                f"got {tuple(kept.shape)}"
            )
        out[name] = kept
    return out


def _checked_targets(y: Tensor, outputs: Tensor) -> Tensor:
    if not isinstance(y, Tensor):
        raise TypeError(f"argument 'y' must be a tensor, got {type(y).__name__}")
    if y.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"argument 'y' must be float32 or float64 for loss 'mse', got {y.dtype}; "
            "labels become targets by torch.nn.functional.one_hot(y).float()"
        )
    if y.ndim == 1 and outputs.shape[1] == 1:
        y = y[:, None]
    if y.shape != outputs.shape:
        raise ValueError(
            f"argument 'y' must have shape {tuple(outputs.shape)} like the outputs, "
            f"got {tuple(y.shape)}"
        )
    if not torch.isfinite(y).all():
        raise ValueError("argument 'y' must be finite, got NaN or infinity")
    return y.detach()
