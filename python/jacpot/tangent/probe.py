"""How a network uses its parameters and its batch: by proof, or from a run of a few examples."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.utils.weak import WeakIdKeyDictionary

from jacpot.tangent.backward import signals
from jacpot.tangent.course import Course
from jacpot.tangent.examplewise import follow
from jacpot.tangent.network import Inputs, Network, n_examples, over_tensors, take, tensors
from jacpot.tangent.recorder import Call, OwnDerivatives, Recorder

__all__ = ["Probe", "forget", "probe", "stand_in"]


@dataclass(frozen=True, eq=False)
class Probe:
    """How a network uses its parameters and its batch.

    Attributes
    ----------
    n_outputs
        Outputs per example, K.
    axes
        For each recorded call the axes that may count the examples, and their size for one; none
        where there is a course.
    uncovered
        Parameters with a use that no rule covers.
    bytes_per_example
        Of the results of all recorded calls, and of what is made of parameters.
    reduces
        Whether a call's result has more elements than its parameters, so that rows take less room
        than factors.
    writes_input
        Whether the network writes to the very tensors that it is given.
    course
        The calls that the network makes, if it treats examples one by one by all that these tell;
        then the rows of uncovered parameters are those of their uses alone.
    remembered
        Whether an earlier call found that out.
    differentiates
        Whether the network takes derivatives itself, so that rules say nothing of its weights.
    """

    n_outputs: int
    axes: list[dict[int, int]]
    uncovered: list[str]
    bytes_per_example: int
    reduces: bool
    writes_input: bool
    course: Course | None = None
    remembered: bool = False
    differentiates: bool = False

    @property
    def together(self) -> bool:
        """Whether all uses of parameters are calls that have an axis that counts examples."""
        known = self.course is not None or not self.uncovered
        return known and all(self.axes) and not self.differentiates


def stand_in(x: Any, count: int) -> Any:
    """Examples of zeros, for where there are none."""
    return over_tensors(x, lambda tensor: tensor.new_zeros((count, *tensor.shape[1:])))


# What was found last, by module. It is no proof, nor taken for one: a course says what calls to
# expect of the run of the examples, all else how much memory that needs.
_remembered: Any = WeakIdKeyDictionary()


def probe(network: Network, x: Inputs, targets: Any = None) -> Probe:
    """Learn how the network uses its parameters and its batch.

    A run of a few examples tells, or what such a run found before.

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
    layout = [
        [(value.shape[first:], value.dtype, value.device) for value in values]
        for values, first in ((tensors([x, targets]), 1), (network.parameters.values(), 0))
    ]
    known = [layout, list(network.parameters), _identity(network.output)]
    last: tuple[Any, Probe] | None = _remembered.get(network.module)
    if last is not None and last[0] == known and n_examples(x) > 1:  # one alone is not followed
        return last[1]
    found = _proven(network, x, targets) or _tried(network, x, targets)
    if found.course is not None:
        _remembered[network.module] = known, dataclasses.replace(found, remembered=True)
    return found


def forget(network: Network) -> None:
    """Have the next `probe` look anew."""
    _remembered.pop(network.module, None)


def _identity(output: Any) -> Any:
    """Give what equals that of the same output alone, and keeps no function alive."""
    try:
        return weakref.ref(output) if callable(output) else output
    except TypeError:
        return object()


def _proven(network: Network, x: Inputs, targets: Any) -> Probe | None:
    # Not n, so that what fits all examples does not fit; and few tensors have seven layers,
    # which could be taken for examples.
    size = 11 if n_examples(x) == 7 else 7
    own, own_targets = stand_in(x, size), stand_in(targets, size)
    versions = _versions(own)
    found = follow(network, own, own_targets)
    if found is None or found[0].numel() == 0:
        return None
    outputs, follower = found
    written = versions != _versions(own)
    gathered = _gathered(
        network, follower.calls, size, outputs.shape[1], [], follower.uncovered(), written
    )
    made = sum(value.numel() for value in follower.made.values()) * network.dtype.itemsize
    total = gathered.bytes_per_example + made
    return dataclasses.replace(gathered, course=follower.course, bytes_per_example=total)


def _tried(network: Network, x: Inputs, targets: Any) -> Probe:
    n = n_examples(x)
    size = 5 if n == 4 else 4  # not n, so that axes that count examples differ from the real run
    leaves = {name: value.detach().requires_grad_() for name, value in network.parameters.items()}

    def batch(rows: list[int]) -> tuple[Any, Any]:
        if n == 0:
            return stand_in(x, size), stand_in(targets, size)
        index = torch.tensor(rows, device="cpu") % n
        return take(x, index), take(targets, index)

    recorder = Recorder(network, leaves)
    own, own_targets = batch(list(range(size)))
    versions = _versions(own)
    differentiates = False
    try:
        outputs = recorder.run(own, own_targets, leaves)
    except OwnDerivatives:
        differentiates = True
        outputs = network(own, own_targets)
    k = outputs.shape[1]
    if k == 0:
        return Probe(0, [], [], 0, False, False)
    for row in (0, size - 1):  # the first and the last again, with none of the others
        again = network(*batch([row] * size))
        _check_alone(outputs[row].detach(), again[row].detach())
    written = versions != _versions(own)
    if differentiates:
        return Probe(k, [], [], 0, False, written, differentiates=True)
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
    shared = True
    while shared:  # rules hold for all parameters of a call, or for none
        names = {
            name
            for c in recorder.calls
            for name in c.parameters.values()
            if set(c.parameters.values()) & set(uncovered)
        }
        shared = not names.issubset(uncovered)
        uncovered = [name for name in leaves if name in names.union(uncovered)]
    return _gathered(network, recorder.calls, size, k, axes, uncovered, written)


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
        if not call.rule.local and all(p in parameters for p in call.parameters.values())
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
