"""Capture of a network's layer factors: one forward pass, and one batched pass back per part.

While the network runs, its calls of functions that have a layer rule (``F.linear``, ``conv2d``,
...) on a parameter are recorded, whoever makes them: a layer, a layer used twice, or a line of a
``forward`` that takes a tied weight in its own hands. The derivatives of the K outputs by what
these calls gave (the signals) then come from one batched vector-Jacobian product, which never forms
a gradient of a weight.

A probe of a few examples comes first. It finds the uses of parameters that no rule covers, which
axis of each call counts the examples, and whether examples mix.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

from jacpot.tangent.network import Inputs, Network, n_examples, quiet, take
from jacpot.tangent.rules import RULES, LayerRule, Term
from jacpot.tangent.rules.terms import Fold

__all__ = ["Capture", "Probe", "capture", "probe"]


@dataclass(frozen=True, eq=False)
class Call:
    """A recorded call of a function that has a rule.

    Attributes
    ----------
    rule
        The function's rule.
    arguments
        The call's arguments by the rule's names for them.
    parameters
        Names of the network's parameters by argument.
    edge
        Where the call's result entered the graph; unlike the result itself it stays what it is
        when a later operation writes into the result.
    shape
        The result's shape.
    version
        How often the first argument had been written to.
    """

    rule: LayerRule
    arguments: dict[str, Any]
    parameters: dict[str, str]
    edge: GradientEdge
    shape: torch.Size
    version: int

    @property
    def input(self) -> Tensor:
        """The first argument."""
        tensor: Tensor = next(iter(self.arguments.values()))
        return tensor

    @property
    def layer(self) -> str:
        """The layer that owns the parameters, for messages."""
        return next(iter(self.parameters.values())).rpartition(".")[0] or "the module itself"


class Recorder(TorchFunctionMode):
    """Records, while active, the calls that have a rule and take parameters of the network.

    Parameters
    ----------
    network
        The network that will be called.
    parameters
        The tensors it will be called with, by name.
    """

    def __init__(self, network: Network, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.network = network
        self.names = {id(tensor): name for name, tensor in parameters.items()}
        self.calls: list[Call] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        rule = RULES.get(func)
        if rule is None:
            return func(*args, **kwargs)
        arguments = dict(rule.signature.bind(None, *args, **kwargs).arguments)
        del arguments[rule.signals]
        parameters = {
            argument: self.names[id(arguments[argument])]
            for argument in rule.parameters
            if id(arguments.get(argument)) in self.names
        }
        first = next(iter(arguments.values()))
        if (
            not parameters
            or id(first) in self.names
            or not (rule.when is None or rule.when(**arguments))
        ):
            return func(*args, **kwargs)
        if not rule.integer_input and first.dtype != self.network.dtype:
            layer = next(iter(parameters.values())).rpartition(".")[0]
            raise TypeError(
                f"argument 'x' must lead to {self.network.dtype} inputs of layer {layer!r} like "
                f"its parameters, got {first.dtype}"
            )
        # The graph does not lead to parameters where a rule holds: an edge to one is then a use
        # of it that no rule covers, and no gradient of a weight is ever computed.
        ruled = {id(arguments[a]): self.network.parameters[name] for a, name in parameters.items()}
        result: Tensor = func(
            *(ruled.get(id(value), value) for value in args),
            **{key: ruled.get(id(value), value) for key, value in kwargs.items()},
        )
        if not result.requires_grad:
            result = result.requires_grad_().clone()  # no leaf, so that the network may write to it
        edge = get_gradient_edge(result)
        self.calls.append(Call(rule, arguments, parameters, edge, result.shape, first._version))
        return result


def _signals(
    outputs: Tensor, edges: Sequence[GradientEdge], cotangents: Tensor
) -> Sequence[Tensor | None]:
    """Pass ``(B, N, K)`` cotangents back to the edges: ``(B, *result)`` each, None if unused."""
    if not edges:
        return []
    if not outputs.requires_grad:
        return [None] * len(edges)
    return torch.autograd.grad(
        outputs, edges, cotangents, allow_unused=True, is_grads_batched=True, retain_graph=True
    )


@dataclass(frozen=True, eq=False)
class Probe:
    """What a few examples tell of a network.

    Attributes
    ----------
    n_outputs
        Outputs per example, K.
    axes
        For each call the axes that may count the examples, and their size for one example.
    uncovered
        Parameters with a use that no rule covers.
    bytes_per_example
        Of the results of all recorded calls.
    """

    n_outputs: int
    axes: list[dict[int, int]]
    uncovered: list[str]
    bytes_per_example: int


def probe(network: Network, x: Inputs, targets: Any = None) -> Probe:
    """Run a few examples to learn how the network uses its parameters and its batch.

    Raises
    ------
    ValueError
        If an example's output depends on the other examples, or on chance.
    """
    n = n_examples(x)
    size = 2 if n == 3 else 3  # not n, so that axes that count examples differ from the real run
    leaves = {name: value.detach().requires_grad_() for name, value in network.parameters.items()}

    def run(rows: list[int]) -> Tensor:
        index = torch.tensor(rows) % max(n, 1)
        return network(_some(x, index, n), _some(targets, index, n), parameters=leaves)

    recorder = Recorder(network, leaves)
    with recorder:
        outputs = run(list(range(size)))
    k = outputs.shape[1]
    if k == 0:
        raise ValueError("the module's output must have at least one element per example, got none")
    with torch.no_grad():
        for row in range(2):
            alone = run([row] * size)[row]
            scale = outputs[row].abs().max() + 1
            if ((alone - outputs[row]).abs() > 64 * torch.finfo(outputs.dtype).eps * scale).any():
                raise ValueError(
                    "argument 'module' must give every example an output of its own, but its "
                    "output changes with the other examples of the batch or by chance; make it "
                    "treat examples one by one (eval mode, no statistics over the batch)"
                )
    weights = torch.cos(torch.arange(1.0, k + 1, dtype=outputs.dtype, device=outputs.device))
    seeds = torch.zeros(2, size, k, dtype=outputs.dtype, device=outputs.device)
    seeds[0, 0] = seeds[1, 1] = weights
    edges = [call.edge for call in recorder.calls]
    found = _signals(outputs, [*edges, *map(get_gradient_edge, leaves.values())], seeds)
    axes = [
        _example_axes(call.shape, signal, size)
        for call, signal in zip(recorder.calls, found, strict=False)
    ]
    uncovered = [
        name
        for name, gradient in zip(leaves, found[len(edges) :], strict=True)
        if gradient is not None
    ]
    total = sum(call.shape.numel() for call in recorder.calls) * outputs.dtype.itemsize // size
    return Probe(k, axes, uncovered, total)


def _some(x: Any, index: Tensor, n: int) -> Any:
    """Give the probe's examples, zeros if there are none at all."""
    if n:
        return take(x, index)
    if isinstance(x, Tensor):
        return x.new_zeros((len(index), *x.shape[1:]))
    if isinstance(x, Mapping):
        return {key: _some(value, index, n) for key, value in x.items()}
    return tuple(_some(value, index, n) for value in x) if isinstance(x, tuple | list) else x


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


@dataclass
class Capture:
    """Terms of all calls, per example, and the outputs.

    Attributes
    ----------
    outputs
        ``(N, K)``.
    terms
        For each parameter's name what its calls add.
    """

    outputs: Tensor
    terms: dict[str, list[Term]]


def capture(
    network: Network,
    x: Inputs,
    targets: Any = None,
    probed: Probe | None = None,
    memory_budget: int = 1 << 30,
) -> Iterator[Capture]:
    """Capture the factors of all examples, in parts that fit the memory budget.

    Parameters
    ----------
    network
        The network.
    x
        ``(N, ...)`` examples.
    targets
        Given to the network's ``output`` function with the outputs.
    probed
        What `probe` found on this network; it is asked otherwise.
    memory_budget
        Bytes that the signals of one part may take.

    Yields
    ------
    Capture
        The next examples'.
    """
    with ExitStack() as stack:
        quiet(stack)
        probed = probed or probe(network, x, targets)
    n = n_examples(x)
    step = max(1, memory_budget // max(1, 2 * probed.n_outputs * probed.bytes_per_example))
    for begin in range(0, max(n, 1), step):
        part = slice(begin, begin + step)
        with ExitStack() as stack:
            quiet(stack)
            yield _capture_part(network, take(x, part), take(targets, part), probed)


def _capture_part(network: Network, x: Inputs, targets: Any, probed: Probe) -> Capture:
    keep, k = n_examples(x), probed.n_outputs
    n = max(keep, 1)
    if keep == 0:  # most layers refuse an empty batch: run one example, and keep nothing of it
        index = torch.zeros(1, dtype=torch.long)
        x, targets = _some(x, index, 0), _some(targets, index, 0)
    if probed.uncovered:
        raise NotImplementedError(str(probed.uncovered))
    recorder = Recorder(network, network.parameters)
    with recorder:
        outputs = network(x, targets)
    if not torch.isfinite(outputs).all():
        raise ValueError("the module's outputs must be finite; got inf or nan for these examples")
    for call in recorder.calls:
        if call.input._version != call.version:
            raise RuntimeError(
                f"the input of layer {call.layer!r} was written to after the layer had read it; "
                "make that operation out of place (inplace=False, x = x + y instead of x += y)"
            )
    cotangents = torch.eye(k, dtype=outputs.dtype, device=outputs.device)
    signals = _signals(
        outputs, [call.edge for call in recorder.calls], cotangents[:, None].expand(k, n, k)
    )
    terms: dict[str, list[Term]] = {}
    fold = Fold(n, keep)
    for i, call in enumerate(recorder.calls):
        signal = signals[i]
        if signal is None:
            continue
        axis = _example_axis(call, probed.axes[i] if i < len(probed.axes) else {}, n)
        given = {
            name: value.movedim(axis, 0) if j == 0 and axis else value
            for j, (name, value) in enumerate(call.arguments.items())
        }
        arrived = signal.movedim(axis + 1, 1).transpose(0, 1)
        _check_finite(call, call.input, "input")
        _check_finite(call, arrived, "signal")
        shares = call.rule.function(arrived, **given)
        for argument, name in call.parameters.items():
            terms.setdefault(name, []).append(shares[argument].folded(fold))
    return Capture(outputs.detach()[:keep], terms)


def _example_axis(call: Call, axes: Mapping[int, int], n: int) -> int:
    for axis, per_example in axes.items():
        if axis < len(call.shape) and call.shape[axis] == per_example * n:
            return axis
    raise NotImplementedError(call.layer)


def _check_finite(call: Call, x: Tensor, what: str) -> None:
    if not x.is_floating_point() or torch.isfinite(x.sum()):  # a sum reads once and stores nothing
        return
    if not torch.isfinite(x).all():
        raise ValueError(f"the {what} of layer {call.layer!r} must be finite, got inf or nan")
