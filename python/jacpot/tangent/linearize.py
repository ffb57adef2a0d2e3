"""A network's first-order Taylor expansion in its parameters, as a module that can be fitted."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from jacpot.linalg import Interrupted, Solution
from jacpot.linalg.arguments import check_limits, check_number
from jacpot.nn.stand_ins import call_with, copy_of
from jacpot.nn.worn import checked_mask, merged_mask, plain_parameters
from jacpot.tangent.directional import along, load_forward_mode
from jacpot.tangent.fit import Fit
from jacpot.tangent.jacobian import jacobian
from jacpot.tangent.losses import Loss
from jacpot.tangent.network import (
    Inputs,
    Output,
    arguments,
    check_network,
    one_at_a_time,
    part_of,
    plain_attention,
)
from jacpot.tangent.problem import Problem, pose
from jacpot.tangent.progress import Callback, observing
from jacpot.tangent.ridge import choose_ridge

__all__ = ["LinearizedModule", "linearize"]


class LinearizedModule(nn.Module):
    """``x -> f(x, θ0) + J(x) Δ``. Made by :func:`linearize`.

    Its parameters are the displacement Δ, zero at first: an optimizer can train them, and
    :meth:`fit` finds the best in closed form. Its ``state_dict`` holds the expansion point and the
    mask as well, without which Δ means nothing: loaded, it is the same function.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> import jacpot
    >>> net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
    >>> lin = jacpot.linearize(net)
    >>> isinstance(lin, jacpot.LinearizedModule)
    True
    >>> x = torch.randn(5, 3)
    >>> torch.equal(lin(x), net(x))  # Δ = 0 until it is fitted or trained
    True
    """

    def __init__(
        self,
        module: nn.Module,
        mask: Mapping[str, Tensor] | None = None,
        output: Output | None = None,
    ) -> None:
        super().__init__()
        check_network(module)
        self.output = output
        with torch.inference_mode(False):
            self._expand(copy_of(module), mask)
        load_forward_mode()

    def _expand(self, base: nn.Module, mask: Mapping[str, Tensor] | None) -> None:
        every = plain_parameters(base)
        self.mask = merged_mask(base, mask)
        with torch.no_grad():
            for name, kept in self.mask.items():
                every[name][1].masked_fill_(~kept, 0)
        point = {name: (own, p) for name, (own, p) in every.items() if p.requires_grad}
        if not point:
            raise ValueError("argument 'module' has no parameters that require a gradient")
        # Not a submodule: the expansion point is no parameter of the linearized network.
        object.__setattr__(self, "base", base)
        self.base: nn.Module
        self._names = {name: own for name, (own, _) in point.items()}  # as the base calls them
        # A parameter's name may not hold a dot.
        self.deltas = nn.ParameterDict(
            {
                name.replace(".", "/"): nn.Parameter(torch.zeros_like(parameter))
                for name, (_, parameter) in point.items()
            }
        )

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
        TypeError, ValueError
            For what is no tensor, or has another shape than the parameter.
        """
        unknown = set(delta) - set(self._names)
        if unknown:
            raise KeyError(f"argument 'delta' names {sorted(unknown)}, which are no parameters")
        for name, value in delta.items():
            if not isinstance(value, Tensor):
                raise TypeError(
                    f"argument 'delta' must hold tensors, got {type(value).__name__} for {name!r}"
                )
            shape = self.deltas[name.replace(".", "/")].shape
            if value.shape != shape:
                raise ValueError(
                    f"argument 'delta' must have shape {tuple(shape)} for {name!r}, got "
                    f"{tuple(value.shape)}"
                )
        targets = [self.deltas[name.replace(".", "/")] for name in self._names]
        values = [delta.get(n, t.new_zeros(())) for n, t in zip(self._names, targets, strict=True)]
        # One call, so that an interrupt comes before or after all of them.
        torch._foreach_copy_(targets, values)

    def get_extra_state(self) -> dict[str, Any]:
        """Give what Δ belongs to: the state of the network at θ0, and the mask."""
        return {"base": self.base.state_dict(), "mask": dict(self.mask)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take over the expansion point and the mask of a ``state_dict``.

        Raises
        ------
        RuntimeError, ValueError, TypeError
            If they are those of a network of other parameters.
        """
        mask = checked_mask(self.base, state["mask"])
        # Loading copies what fits and then raises, so that it is tried on a copy first.
        copy_of(self.base).load_state_dict(state["base"])
        self.base.load_state_dict(state["base"])
        self.mask = mask

    def forward(self, x: Inputs) -> Tensor:
        """Evaluate the linearized network; differentiable in Δ."""
        change = {self._names[name]: value for name, value in self._displacement().items()}

        def outputs(parameters: Mapping[str, Tensor], x: Inputs) -> Tensor:
            return part_of(call_with(self.base, parameters, *arguments(x)), self.output)

        # One at a time, as other tensors are in the place of the base's parameters.
        with one_at_a_time, plain_attention():
            every = plain_parameters(self.base)
            point = {own: every[name][1].detach() for name, own in self._names.items()}
            value, derivative = along(outputs, point, change, x)
            result: Tensor = value + derivative
        return result

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LinearizedModule:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.base._apply(fn)  # type: ignore[no-untyped-call]
        self.mask = {name: fn(kept) for name, kept in self.mask.items()}
        return self

    def fit(
        self,
        x: Inputs,
        y: Tensor,
        loss: str | Loss = "mse",
        ridge: float | str = 0.0,
        method: str = "auto",
        preconditioner: Any = "auto",
        tol: float = 1e-6,
        max_iter: int | None = None,
        callback: Callback | None = None,
        progress: bool = False,
        weights: Tensor | None = None,
        ridges: Sequence[float] | None = None,
        validation: tuple[Tensor, Tensor] | None = None,
        batch_size: int | None = None,
        warm_start: bool = False,
    ) -> Fit:
        """Find the Δ that minimises ``Σ_n w_n loss(f(x_n) + J(x_n) Δ, y_n) + ridge/2 ‖Δ‖²``.

        Parameters
        ----------
        x
            Inputs, (N, ...); a tuple or a dict of them for a module of several.
        y
            Targets: of the shape of the outputs, or (N, K), or (N,) when K = 1; labels (N,) int64
            for ``"cross_entropy"``.
        loss
            ``"mse"`` (``½ ‖·‖²`` for each example), ``"cross_entropy"``, ``"logistic"``,
            ``"huber"``, or an object like `jacpot.tangent.losses.ConvexLoss`.
        ridge
            Non-negative. Zero gives, of all minimisers of the squared loss, the one of least norm;
            other losses need more than zero. Or how to choose it, for the squared loss: ``"gcv"``,
            ``"loo"`` (leave one out), ``"evidence"`` (marginal likelihood) or ``"validation"``.
        method
            ``"dual"`` (N·K unknowns), ``"primal"`` (P unknowns), ``"lsmr"``, ``"svd"`` or
            ``"auto"``, which takes the smaller space.
        preconditioner
            As in :func:`jacpot.solve`, an object of `jacpot.tangent.preconditioners`, or
            ``"auto"``, ``"trace"`` or ``"kronecker"``.
        tol, max_iter, callback
            As in :func:`jacpot.solve`; for losses but the squared one of Newton's method, where
            the residual is the norm of the gradient relative to its first.
        progress
            Show a progress bar.
        weights
            Non-negative weights of the examples, (N,).
        ridges
            What to choose the ridge from, above zero (``"validation"``: at least); by default 40
            over the range of the kernel's spectrum.
        validation
            ``(x, y)`` for ``ridge="validation"``.
        batch_size
            Hold the factors of this many examples at a time and make them again for every
            product; by default all are held.
        warm_start
            Start from the Δ there is (squared loss: in the dual after a fit of the same number of
            examples, or in the primal).

        Returns
        -------
        Fit
            A `Solution` whose ``x`` is Δ in one vector; `delta` is set from it, also when it did
            not converge.

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
        check_limits(tol, max_iter)
        capture = functools.partial(jacobian, self.base, mask=self.mask or None, output=self.output)
        problem = pose(capture, x, y, loss, weights, batch_size)
        if isinstance(ridge, str):
            ridge = choose_ridge(problem, ridge, ridges, validation)
        problem = dataclasses.replace(problem, ridge=check_number("ridge", ridge))
        start = self._start(problem) if warm_start else None
        with observing(callback, progress, tol) as observe:
            try:
                solution = problem.solve(method, preconditioner, tol, max_iter, observe, start)
            except Interrupted as stop:
                raise Interrupted(self._accept(problem, stop.solution)) from None
        return self._accept(problem, solution)

    def _accept(self, problem: Problem, solution: Solution) -> Fit:
        """Set Δ from a solution whose x is in the order of the blocks."""
        self.set_delta(problem.delta(solution.x))
        values = {f.name: getattr(solution, f.name) for f in dataclasses.fields(Solution)}
        values["x"] = problem.flat(solution.x)
        return Fit(**values, ridge=problem.ridge, problem=problem)

    def _start(self, problem: Problem) -> Tensor:
        """Give the present Δ in the order of the blocks."""
        columns = problem.columns
        delta = {name: value.to(columns.dtype) for name, value in self.delta.items()}
        return problem.by_blocks(columns.flatten(delta)).double()


def linearize(
    module: nn.Module,
    mask: Mapping[str, Tensor] | None = None,
    output: Output | None = None,
) -> LinearizedModule:
    """Expand a network to first order in its parameters.

    Parameters
    ----------
    module
        Any module; it is copied, as it is, so that training it later does not move the expansion
        point. Of several inputs, it is called with a tuple or a dict of them.
    mask
        Bool tensors by parameter name; the network is evaluated at the masked parameters and
        only kept ones may move. What it does not name is kept whole, or as a mask that the module
        wears (`jacpot.tickets.apply`) has it.
    output
        Which part of what the module gives, if that is a tuple or a dict: an index, a key, or a
        function of it.

    Returns
    -------
    LinearizedModule
        ``x -> f(x, θ0) + J(x) Δ`` with Δ = 0.

    Raises
    ------
    ValueError, TypeError
        If the mask does not fit the module's parameters, or outputs depend on other examples or on
        chance (BatchNorm in training mode, active dropout).

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
    return LinearizedModule(module, mask, output)
