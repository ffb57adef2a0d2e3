"""Taking the Jacobian of a network's outputs by its parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from jacpot.linalg.arguments import check_count
from jacpot.ops.pattern import Pattern
from jacpot.tangent.assemble import Columns, assemble
from jacpot.tangent.capture import capture
from jacpot.tangent.course import Deviates
from jacpot.tangent.factored import Jacobian
from jacpot.tangent.joined import joined
from jacpot.tangent.network import Inputs, Network, Output, n_examples, recording, take, tensors
from jacpot.tangent.probe import forget, probe

__all__ = ["Jacobian", "JacobianSource", "jacobian"]

Wrt = Literal["kept", "all"]


def jacobian(
    module: nn.Module,
    x: Inputs,
    mask: Mapping[str, Tensor] | None = None,
    wrt: Wrt = "kept",
    output: Output | None = None,
    targets: Any = None,
    memory_budget: int = 1 << 30,
) -> Jacobian:
    """Take the Jacobian of a network's outputs by its parameters, as an operator.

    Parameters
    ----------
    module
        The network, left exactly as it is found. Parameters that require no gradient are constants.
    x
        Examples ``(N, ...)``; a tuple or a dict of such tensors for a module of several inputs.
    mask
        Bool tensors by parameter name; what it does not name is kept whole. The network is
        evaluated at the masked parameters. A module that wears a mask (`jacpot.tickets.apply`) is
        its plain network with that mask, which this one may refine.
    wrt
        ``"kept"``: a column for each kept parameter. ``"all"``: pruned ones have theirs too.
    output
        Which part of what the module gives, if that is a tuple or a dict: an index, a key,
        or a function of it.
    targets
        If given, ``output`` is called with the examples' targets as well, so that
        ``output=lambda f, y: cross_entropy(f, y, reduction="none")`` makes J the gradients of a
        loss, one row for each example.
    memory_budget
        Bytes that signals on their way back through the network may take. Examples are taken in as
        many parts as that needs; the result does not depend on it beyond rounding.

    Returns
    -------
    Jacobian
        Of shape ``(N·K, P)``; an output of any shape ``(N, ...)`` counts as K = all its elements.

    Raises
    ------
    TypeError
        If an argument has the wrong type or dtype, or the output is no floating-point tensor.
    ValueError
        If the mask does not fit, the module has nothing to differentiate, an output depends on the
        other examples or on chance (BatchNorm in training mode, active dropout), or something is
        not finite.
    RuntimeError
        If the module writes to what a layer has read.

    Notes
    -----
    Gradients are recorded also under ``torch.no_grad`` and ``torch.inference_mode``; autocast is
    off inside, so the Jacobian is that of the parameters' own precision.

    Threads take turns in here, so several may ask for Jacobians of one module. None must call the
    module itself, or train it, meanwhile: other tensors are in its parameters' place.

    Whether an example's output depends on the others is told by the functions that the module
    calls. Where one is unknown, it is told by running an example among others; a module with such a
    coupling that is given a single example, or equal ones, then gives no sign of it.

    The factors of a layer, its inputs and the derivatives of the outputs by its results, are those
    of Goodfellow 2015, "Efficient per-example gradient computations".

    Examples
    --------
    >>> import torch, jacpot
    >>> net = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.ReLU(), torch.nn.Linear(5, 2))
    >>> J = jacpot.jacobian(net, torch.randn(4, 3))
    >>> J.shape, (J @ torch.ones(J.n_parameters)).shape, (J.T @ torch.ones(4, 2)).shape
    ((8, 32), torch.Size([4, 2]), torch.Size([32]))
    """
    with recording():
        source = JacobianSource(module, x, mask, wrt, output, targets, memory_budget)
        return source(x, targets=targets)


class JacobianSource:
    """Gives the Jacobians of batches of examples, all in the same blocks and columns.

    Parameters
    ----------
    module, mask, wrt, output, memory_budget
        As in :func:`jacobian`.
    x, targets
        Examples to learn from how the network uses its parameters.
    """

    def __init__(
        self,
        module: nn.Module,
        x: Inputs,
        mask: Mapping[str, Tensor] | None = None,
        wrt: Wrt = "kept",
        output: Output | None = None,
        targets: Any = None,
        memory_budget: int = 1 << 30,
    ) -> None:
        if wrt not in ("kept", "all"):
            raise ValueError(f"argument 'wrt' must be 'kept' or 'all', got {wrt!r}")
        self.memory_budget = check_count("memory_budget", memory_budget, 1)
        self._patterns: dict[str, Pattern] = {}
        with recording():
            self.network = Network(module, mask, output)
            for tensor in tensors(x):
                if tensor.device != self.network.device:
                    raise ValueError(
                        f"argument 'x' must be on {self.network.device} like the module, "
                        f"got {tensor.device}"
                    )
            kept = self.network.mask if wrt == "kept" else {}
            self.columns = Columns(self.network.parameters, kept)
            self.probe = probe(self.network, x, targets)

    @property
    def n_outputs(self) -> int:
        """Outputs per example, K."""
        return self.probe.n_outputs

    @property
    def dtype(self) -> torch.dtype:
        """Element type of the parameters."""
        return self.network.dtype

    def __call__(self, x: Inputs, examples: slice | None = None, targets: Any = None) -> Jacobian:
        """Take the Jacobian at these examples, or at some of them."""
        with recording():
            if examples is not None:
                x, targets = take(x, examples), take(targets, examples)
            try:
                return joined(self._parts(x, targets), n_examples(x))
            except Deviates:  # the module is not what it was when it was last called
                self.renew(x, targets)
                return joined(self._parts(x, targets), n_examples(x))

    def renew(self, x: Inputs, targets: Any = None) -> None:
        """Learn from examples alone how the network uses its parameters."""
        with recording():
            forget(self.network)
            self.probe = probe(self.network, x, targets)

    def _parts(self, x: Inputs, targets: Any) -> Iterator[Jacobian]:
        for part in capture(self.network, x, targets, self.probe, self.memory_budget):
            blocks, orders = assemble(part.terms, self.columns, part.outputs, self._patterns)
            outputs, shape = part.outputs, self.network.output_shape
            del part  # or it would be there still while the next is made
            yield Jacobian(outputs, blocks, self.columns, orders, shape)
            del outputs, blocks
