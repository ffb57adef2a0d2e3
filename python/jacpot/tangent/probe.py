"""How a network uses its parameters and its batch: by proof, or from a run of a few examples."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from jacpot._backend import empty
from jacpot.tangent.examplewise import follow
from jacpot.tangent.network import Inputs, Network, n_examples, over_tensors, take, tensors
from jacpot.tangent.recorder import Call, Recorder

__all__ = ["Probe", "cannot_map", "probe", "signals", "stand_in"]


@dataclass(frozen=True, eq=False)
class Probe:
    """How a network uses its parameters and its batch.

    Attributes
    ----------
    n_outputs
        Outputs per example, K.
    axes
        For each recorded call the axes that may count the examples, and their size for one.
    uncovered
        Parameters with a use that no rule covers.
    bytes_per_example
        Of the results of all recorded calls.
    reduces
        Whether a call's result has more elements than its parameters, so that rows take less room
        than factors.
    writes_input
        Whether the network writes to the very tensors that it is given.
    """

    n_outputs: int
    axes: list[dict[int, int]]
    uncovered: list[str]
    bytes_per_example: int
    reduces: bool
    writes_input: bool

    @property
    def together(self) -> bool:
        """Whether rules cover all, and every call has an axis that counts examples."""
        return not self.uncovered and all(self.axes)


def signals(
    outputs: Tensor, sources: Sequence[Any], cotangents: Tensor, together: bool = True
) -> Sequence[Tensor | None]:
    """Pass ``(B, N, K)`` cotangents back to tensors or edges of the graph.

    Gives ``(B, *source)`` for each, None where nothing leads. All cotangents go back ``together``
    or, which needs less memory on the way, one after the other.
    """
    led = [source for source in sources if source is not None]
    if not led or not outputs.requires_grad:
        return [None] * len(sources)
    if len(led) < len(sources):  # what the network evaluates under torch.no_grad has no place
        found = iter(signals(outputs, led, cotangents, together))
        return [None if source is None else next(found) for source in sources]
    if not together:
        return _one_by_one(outputs, sources, cotangents)
    try:
        with warnings.catch_warnings():
            # what torch warns of here, derivatives taken one after the other, is exact as well
            warnings.filterwarnings("ignore", message="There is a performance drop")
            return _mapped(outputs, sources, cotangents)
    except RuntimeError as error:
        if not cannot_map(error):
            raise
    return _one_by_one(outputs, sources, cotangents)


def _mapped(outputs: Tensor, sources: Sequence[Any], cotangents: Tensor) -> Sequence[Tensor | None]:
    # not by ``is_grads_batched``, an older vmap that does not know how to batch our operators
    led: list[bool] = []

    def back(one: Tensor) -> list[Tensor]:
        found = torch.autograd.grad(outputs, sources, one, allow_unused=True, retain_graph=True)
        led[:] = [gradient is not None for gradient in found]
        return [gradient for gradient in found if gradient is not None]

    found = iter(torch.func.vmap(back)(cotangents))
    return [next(found) if leads else None for leads in led]


def _one_by_one(
    outputs: Tensor, sources: Sequence[Any], cotangents: Tensor
) -> Sequence[Tensor | None]:
    """Give ``(B, *source)`` for each source, in memory that has ``source[0]`` before B."""
    b = len(cotangents)
    found: list[Tensor | None] = [None] * len(sources)
    for i, one in enumerate(cotangents):
        gradients = torch.autograd.grad(outputs, sources, one, allow_unused=True, retain_graph=True)
        for j, gradient in enumerate(gradients):
            room = found[j]
            if room is None and gradient is not None:
                if b == 1:
                    found[j] = gradient.unsqueeze(0)
                    continue
                ahead = gradient.shape[:1]
                room = empty((*ahead, b, *gradient.shape[1:]), gradient).movedim(len(ahead), 0)
                found[j] = room
                room[:i] = 0
            if room is not None:
                room[i] = 0 if gradient is None else gradient
    return found


def cannot_map(error: RuntimeError) -> bool:
    """Whether this is torch saying that `vmap` does not know an operation."""
    return "vmap" in str(error).lower() or "batching rule" in str(error).lower()


def stand_in(x: Any, count: int) -> Any:
    """Examples of zeros, for where there are none."""
    return over_tensors(x, lambda tensor: tensor.new_zeros((count, *tensor.shape[1:])))


def probe(network: Network, x: Inputs, targets: Any = None) -> Probe:
    """Learn how the network uses its parameters and its batch.

    A run of a few examples tells, unless the functions that the network calls are proof enough.

    Parameters
    ----------
    network
        The network.
    x, targets
        Its examples ``(N, ...)``, any number of them.

    Returns
    -------
    Probe
        What was found.

    Raises
    ------
    ValueError
        If an example's output depends on the other examples, or on chance.
    """
    return _proven(network, x, targets) or _tried(network, x, targets)


def _proven(network: Network, x: Inputs, targets: Any) -> Probe | None:
    size = 3 if n_examples(x) == 2 else 2  # not n, so that what fits all examples does not fit
    own, own_targets = stand_in(x, size), stand_in(targets, size)
    versions = _versions(own)
    found = follow(network, own, own_targets)
    if found is None or found[0].numel() == 0:
        return None
    outputs, calls = found
    axes = [{0: 1} for _ in calls]
    written = versions != _versions(own)
    return _gathered(network, calls, size, outputs.shape[1], axes, [], written)


def _tried(network: Network, x: Inputs, targets: Any) -> Probe:
    n = n_examples(x)
    size = 5 if n == 4 else 4  # not n, so that axes that count examples differ from the real run
    leaves = {name: value.detach().requires_grad_() for name, value in network.parameters.items()}

    def batch(rows: list[int]) -> tuple[Any, Any]:
        if n == 0:
            return stand_in(x, size), stand_in(targets, size)
        index = torch.tensor(rows) % n
        return take(x, index), take(targets, index)

    recorder = Recorder(network, leaves)
    own, own_targets = batch(list(range(size)))
    versions = _versions(own)
    outputs = recorder.run(own, own_targets, leaves)
    k = outputs.shape[1]
    if k == 0:
        raise ValueError("the module's output must have at least one element per example, got none")
    with torch.no_grad():  # the first and the last again, among others
        again = network(*batch([0] * (size - 1) + [size - 1]))
    for row in (0, size - 1):
        _check_alone(outputs[row], again[row])
    # Outputs of the first two examples, weighted so that no symmetry of a network (a softmax's
    # sum) hides a use.
    weights = torch.cos(torch.arange(1.0, k + 1, dtype=outputs.dtype, device=outputs.device))
    seeds = torch.zeros(2, size, k, dtype=outputs.dtype, device=outputs.device)
    seeds[0, 0] = seeds[1, 1] = weights
    edges = [call.edge for call in recorder.calls]
    found = signals(outputs, [*edges, *map(get_gradient_edge, leaves.values())], seeds)
    axes = [
        _example_axes(call.shape, signal, size)
        for call, signal in zip(recorder.calls, found, strict=False)
    ]
    uncovered = [
        name
        for name, gradient in zip(leaves, found[len(edges) :], strict=True)
        if gradient is not None
    ]
    return _gathered(network, recorder.calls, size, k, axes, uncovered, versions != _versions(own))


def _versions(x: Inputs) -> list[int]:
    return [tensor._version for tensor in tensors(x)]


def _gathered(
    network: Network, calls: Sequence[Call], size: int, k: int, axes: list[dict[int, int]],
    uncovered: list[str], written: bool,
) -> Probe:  # fmt: skip
    """Add what the calls of some examples tell."""
    parameters = network.parameters
    total = sum(call.shape.numel() for call in calls) * network.dtype.itemsize // size
    reduces = any(
        call.shape.numel() > size * sum(parameters[p].numel() for p in call.parameters.values())
        for call in calls
    )
    return Probe(k, axes, uncovered, total, reduces, written)


def _check_alone(output: Tensor, again: Tensor) -> None:
    """Compare an example's output with that among other examples: the same sums, bit for bit."""
    tolerance = 64 * torch.finfo(output.dtype).eps * (output.abs().max() + 1)
    if ((again - output).abs() > tolerance).any():
        raise ValueError(
            "argument 'module' must give every example an output of its own, but its output "
            "changes with the other examples of the batch or by chance; make it treat examples "
            "one by one (eval mode, no statistics over the batch)"
        )


def _example_axes(shape: torch.Size, signal: Tensor | None, size: int) -> dict[int, int]:
    """Axes along which the first example's signals are in the first part, the second's in its."""
    axes = {}
    for axis, length in enumerate(shape):
        if length == 0 or length % size:
            continue
        if signal is not None:
            parts = signal.movedim(axis + 1, 1).reshape(len(signal), size, -1)
            reached = parts.ne(0).any(2)  # (seed, example)
            if (reached & ~torch.eye(2, size, dtype=torch.bool, device=reached.device)).any():
                continue
        axes[axis] = length // size
    return axes
