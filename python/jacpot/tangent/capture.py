"""Capture of a network's layer factors: one forward pass, and one batched pass back per part.

While the network runs, its calls of functions that have a layer rule (``F.linear``, ``conv2d``,
...) on a parameter are recorded, whoever makes them: a layer, a layer used twice, or a line of a
``forward`` that takes a tied weight in its own hands. The derivatives of the K outputs by what
these calls gave (the signals) then come from one batched vector-Jacobian product, which never forms
a gradient of a weight.

A parameter's use that no rule covers (a class token, a PReLU, position embeddings, a weight that is
made of other parameters) is a call like any other, differentiated by itself, where the functions
that the network calls are proof that it treats examples one by one. Where they are not, the network
is mapped over examples by ``torch.func.vmap``, and each example has its own copies of the
parameters that no rule covers. A network that cannot be mapped is run on one example at a time.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor

from jacpot.tangent.backward import cannot_map, signals
from jacpot.tangent.course import Deviates
from jacpot.tangent.examplewise import Follower
from jacpot.tangent.local import example_major
from jacpot.tangent.network import (
    Inputs,
    Network,
    n_examples,
    over_tensors,
    take,
    tensors,
)
from jacpot.tangent.probe import Probe, forget, stand_in
from jacpot.tangent.recorder import Call, Recorder
from jacpot.tangent.room import Room
from jacpot.tangent.rules import Rows, Term
from jacpot.tangent.rules.terms import Fold, reduced

__all__ = ["Captured", "capture"]

# Signals up to this size go back through the network as one batch, as the kernels of few examples
# and of small images want. Of more, one output after the other goes back: that needs less memory on
# the way.
TOGETHER_BYTES = 256 << 20

# Where rows take less room than the factors they are made of, factors are multiplied out a few
# examples at a time, while they are near, and never stored: this many bytes of signals, but no
# fewer examples than make a layer's products efficient.
PART_BYTES = 32 << 20
PART_EXAMPLES = 4

_announced: set[str] = set()


@dataclass(frozen=True, eq=False)
class Captured:
    """Outputs of some examples, and what each parameter's uses add to their Jacobian.

    Attributes
    ----------
    outputs
        ``(N, K)``.
    terms
        By parameter name.
    """

    outputs: Tensor
    terms: dict[str, list[Term]]


@dataclass(frozen=True, eq=False)
class Seen:
    """A call with its examples in the leading axis, and the signals ``(K, M, ...)`` it was sent."""

    call: Call
    given: dict[str, Tensor]
    signals: Tensor | None


def capture(
    network: Network,
    x: Inputs,
    targets: Any,
    probed: Probe,
    memory_budget: int,
) -> Iterator[Captured]:
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
        What `probe` found on this network.
    memory_budget
        Bytes that the signals of one part may take.

    Yields
    ------
    Captured
        The next examples'.

    Raises
    ------
    Deviates
        If what was found is remembered, and holds no longer.
    """
    _announce(network, probed)
    n = n_examples(x)
    if probed.n_outputs == 0:
        yield Captured(torch.empty(n, 0, dtype=network.dtype, device=network.device), {})
        return
    copies = sum(network.parameters[name].numel() for name in probed.uncovered)
    per_example = 2 * (probed.bytes_per_example + copies * network.dtype.itemsize)
    step = max(1, memory_budget // max(1, probed.n_outputs * per_example))
    if probed.reduces and network.device.type == "cpu":
        few = PART_BYTES // max(1, probed.n_outputs * probed.bytes_per_example)
        step = min(step, max(few, PART_EXAMPLES))
    room = Room(n)
    for begin in range(0, max(n, 1), step):
        part = slice(begin, begin + step)
        room.begin(begin)
        yield from _capture_part(network, take(x, part), take(targets, part), probed, room)


def _announce(network: Network, probed: Probe) -> None:
    for name in probed.uncovered:
        owner, _, own = name.rpartition(".")
        layer = network.module.get_submodule(owner)
        kind = type(layer).__name__
        if kind not in _announced and next(layer.children(), None) is None:
            _announced.add(kind)
            warnings.warn(
                f"{kind} (layer {owner!r}, parameter {own!r}) has no layer rule: the rows of its "
                "parameters are found through torch.func, exactly, at N·K·P numbers of memory. "
                "jacpot.register_layer_rule can teach one.",
                stacklevel=5,
            )


def _capture_part(
    network: Network, x: Inputs, targets: Any, probed: Probe, room: Room
) -> Iterator[Captured]:
    keep = n_examples(x)
    if keep == 0:  # most layers refuse an empty batch: run one example, and keep nothing of it
        x, targets = stand_in(x, 1), stand_in(targets, 1)
    n = n_examples(x)
    if probed.writes_input or (probed.remembered and n == 1):
        x = over_tensors(x, torch.clone)
    if probed.together or n == 1:
        yield _together(network, x, targets, probed, keep, room)
        return
    captured = (
        None if probed.differentiates else _mapped_if_possible(network, x, targets, probed, room)
    )
    if captured is not None:
        yield captured
        return
    first = room.example
    for i in range(n):
        row = slice(i, i + 1)
        room.begin(first + i)
        yield _together(network, take(x, row), take(targets, row), probed, 1, room)


def _together(
    network: Network, x: Inputs, targets: Any, probed: Probe, keep: int, room: Room
) -> Captured:
    """Capture all examples in one run of the network as it is."""
    n = n_examples(x)
    leaves = {name: p.detach().requires_grad_() for name, p in network.parameters.items()}
    if probed.course is not None and n > 1:
        recorder, outputs = _followed(network, x, targets, leaves, probed)
    else:
        named = {} if probed.differentiates else leaves
        recorder = Recorder(network, named, faster=probed.course is not None)
        outputs = recorder.run(x, targets, leaves)
    edges = [call.edge for call in recorder.calls]
    # to the parameters themselves lead the uses that no rule covers, of a single example
    found = _signals(outputs, [*edges, *(leaves.values() if n == 1 else ())], probed)
    seen = []
    for i, (call, signal) in enumerate(zip(recorder.calls, found, strict=False)):
        axis, rounds = 0, 1
        if isinstance(recorder, Follower):
            axis, rounds = recorder.places[i]
        elif n > 1:
            axis = _example_axis(call, probed.axes[i:], n)
        given, arrived = call.input, signal
        if n == len(call.shape) == 1:  # one example that came without its axis
            given, arrived = given[None], None if signal is None else signal[:, None]
        elif axis or rounds > 1:
            arrived = None if signal is None else _in_front(signal, axis + 1, rounds, n, 1)
            given = given if call.rule.local else _in_front(given, axis, rounds, n, 0)
        seen.append(Seen(call, {} if call.rule.local else {call.rule.input: given}, arrived))
    rows = dict(zip(leaves, found[len(edges) :], strict=False))
    rows = {name: None if r is None else r[:, None] for name, r in rows.items()}
    captured = _finish(outputs, seen, rows, Fold(n, keep), room)
    return _led_back(captured, recorder) if isinstance(recorder, Follower) else captured


def _followed(
    network: Network, x: Inputs, targets: Any, leaves: Mapping[str, Tensor], probed: Probe
) -> tuple[Recorder, Tensor]:
    """Run the network, with proof that it treats the examples one by one."""
    follower = Follower(network, leaves, [x, targets], probed.course, strict=probed.remembered)
    outputs = follower.run(x, targets, leaves)
    if probed.remembered and outputs.shape[1] != probed.n_outputs:
        raise Deviates
    if follower.deviates:  # from fewer examples: by their number, or by chance?
        forget(network)
        own = [over_tensors(value, torch.clone) for value in (x, targets)]
        again = Follower(network, leaves, own, follower.course, strict=True)
        try:
            again.run(own[0], own[1], leaves)
        except Deviates:
            raise ValueError(
                "argument 'module' must treat examples one by one, but the functions that it calls "
                "change by chance"
            ) from None
    return follower, outputs


def _led_back(captured: Captured, follower: Follower) -> Captured:
    """Give the rows of parameters for those of what was made of them."""
    terms = dict(captured.terms)
    for name, made in follower.made.items():
        found = terms.pop(name, [])
        if not found:
            continue
        rows = torch.stack([term.rows() for term in found]).sum(0)
        leaves = follower.made_of(name)
        led = signals(made, [*leaves.values()], rows.reshape(-1, *made.shape))
        for leaf, values in zip(leaves, led, strict=True):
            if values is not None:
                own = Rows(values.reshape(*rows.shape[:2], *values.shape[1:]))
                terms[leaf] = [*terms.get(leaf, []), own]
    return Captured(captured.outputs, terms)


def _in_front(x: Tensor, axis: int, rounds: int, n: int, first: int) -> Tensor:
    """Bring the axis of examples forward, with each example's entries in a row."""
    if rounds > 1:
        x = example_major(x, (axis, rounds), n).flatten(axis, axis + 1)
    return x.movedim(axis, first)


def _example_axis(call: Call, probed: Sequence[Mapping[int, int]], n: int) -> int:
    for axis, per_example in (probed[0] if probed else {}).items():
        if axis < len(call.shape) and call.shape[axis] == per_example * n:
            return axis
    raise RuntimeError(
        f"layer {call.layer!r} was called otherwise for {n} examples than for a few: what the "
        "module computes must not depend on how many examples it is given"
    )


def _mapped_if_possible(
    network: Network, x: Inputs, targets: Any, probed: Probe, room: Room
) -> Captured | None:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="There is a performance drop")
            return _mapped(network, x, targets, probed, room)
    except RuntimeError as error:
        if not cannot_map(error):
            raise
    return None


def _mapped(network: Network, x: Inputs, targets: Any, probed: Probe, room: Room) -> Captured:
    """Capture through `torch.func.vmap`: the network sees one example at a time."""
    n = n_examples(x)
    covered = {key: p for key, p in network.parameters.items() if key not in probed.uncovered}
    dry, leaves = Recorder(network, covered), {**network.parameters}
    for name in probed.uncovered:
        leaves[name] = leaves[name].detach().requires_grad_()
    dry.run(take(x, slice(1)), take(targets, slice(1)), leaves)
    zero = torch.zeros((), dtype=network.dtype, device=network.device)
    taps = [zero.expand(n, *call.shape).requires_grad_() for call in dry.calls]
    copies = {
        name: network.parameters[name].expand(n, *network.parameters[name].shape).requires_grad_()
        for name in probed.uncovered
    }
    calls: list[Call] = []

    def one(example: Any, target: Any, taps: Any, copies: Any) -> Any:
        recorder = Recorder(network, covered, taps)
        ahead = iter([*example, *target])
        f = recorder.run(
            over_tensors(x, lambda _: next(ahead).unsqueeze(0)),
            over_tensors(targets, lambda _: next(ahead).unsqueeze(0)),
            copies,
        )
        calls[:] = recorder.calls
        mapped = [
            {
                name: value
                for name, value in call.arguments.items()
                if isinstance(value, Tensor)
                and (name == call.rule.input or is_batchedtensor(value))
            }
            for call in calls
        ]
        return f[0], mapped

    outputs, mapped = torch.func.vmap(one)(tensors(x), tensors(targets), taps, copies)
    found = _signals(outputs, [*taps, *copies.values()], probed)
    seen = []
    for call, given, signal in zip(calls, mapped, found, strict=False):
        if len(call.shape) > 1:  # a leading axis of the call's own becomes one of instances
            given = {name: v.flatten(0, 1) if v.ndim > 1 else v for name, v in given.items()}
            signal = None if signal is None else signal.flatten(1, 2)
        seen.append(Seen(call, given, signal))
    rows = dict(zip(copies, found[len(taps) :], strict=True))
    return _finish(outputs, seen, rows, Fold(n, n), room)


def _signals(outputs: Tensor, sources: Sequence[Any], probed: Probe) -> Sequence[Tensor | None]:
    """Derivatives ``(K, *source)`` of every output: in one batch where that stays in cache."""
    n, k = outputs.shape
    eye = torch.eye(k, dtype=outputs.dtype, device=outputs.device)
    together = k > 1 and n * k * probed.bytes_per_example <= TOGETHER_BYTES
    together = together or outputs.is_cuda
    known = probed.course is not None
    return signals(outputs, sources, eye[:, None].expand(k, n, k), together, known)


@torch.no_grad()
def _finish(
    outputs: Tensor,
    calls: Sequence[Seen],
    rows: Mapping[str, Tensor | None],
    fold: Fold,
    room: Room,
) -> Captured:
    """Apply the rules to what was seen; ``rows`` ``(K, N, ...)`` are of what no rule covers."""
    if not _is_finite(outputs):
        raise ValueError("the module's outputs must be finite, got inf or nan for these examples")
    terms: dict[str, list[Term]] = {}
    for seen in calls:
        if seen.signals is None:
            continue
        arrived = seen.signals.transpose(0, 1)
        arguments = {**seen.call.arguments, **seen.given}
        shares = seen.call.rule.function(arrived, **arguments)
        named = reduced(
            {
                name: shares[argument].folded(fold)
                for argument, name in seen.call.parameters.items()
            },
            room,
        )
        # Rows, where all is rows, are smaller than what they are made of, and no more finite.
        if not all(isinstance(term, Rows) and _is_finite(term.values) for term in named.values()):
            _check_finite(seen.call, arguments[seen.call.rule.input], "input")
            _check_finite(seen.call, arrived, "signal")
        for name, term in named.items():
            terms.setdefault(name, []).append(term)
    for name, found in rows.items():
        if found is not None:
            terms.setdefault(name, []).append(Rows(found.transpose(0, 1)).folded(fold))
    return Captured(outputs.detach()[: fold.keep], terms)


def _check_finite(call: Call, x: Tensor, what: str) -> None:
    if x.is_floating_point() and not _is_finite(x):
        raise ValueError(f"the {what} of layer {call.layer!r} must be finite, got inf or nan")


def _is_finite(x: Tensor) -> bool:
    return math.isfinite(x.sum()) or bool(torch.isfinite(x).all())  # a sum stores nothing
