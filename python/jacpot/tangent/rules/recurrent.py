"""Recurrent layers as what they are made of: linear layers, used once for every step.

Torch runs them as one function, which has no batched derivative and shows nothing of its inside.
Written out, each of their weights is a linear layer's, with a position for each step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["unrolled"]

State: TypeAlias = tuple[Tensor, ...]  # h, or h and c
Step: TypeAlias = Callable[[Tensor, Tensor, State], State]  # of W x + b, U h + b' and the state


def _plain(activation: Callable[[Tensor], Tensor], x: Tensor, h: Tensor, state: State) -> State:
    return (activation(x + h),)


def _gru(x: Tensor, h: Tensor, state: State) -> State:
    x_reset, x_update, x_new = x.chunk(3, -1)
    h_reset, h_update, h_new = h.chunk(3, -1)
    update = torch.sigmoid(x_update + h_update)
    new = torch.tanh(x_new + torch.sigmoid(x_reset + h_reset) * h_new)
    return (new + update * (state[0] - new),)


def _lstm(x: Tensor, h: Tensor, state: State) -> State:
    enter, forget, new, leave = (x + h).chunk(4, -1)
    c = torch.sigmoid(forget) * state[1] + torch.sigmoid(enter) * torch.tanh(new)
    return torch.sigmoid(leave) * torch.tanh(c), c


def _advance(step: Step, x: Tensor, state: State, weights: Sequence[Tensor]) -> State:
    """Step from ``x = W input + b`` on; ``weights`` are U and, if any, b' and a projection."""
    biases = [w for w in weights[1:] if w.ndim == 1]
    projections = [w for w in weights[1:] if w.ndim == 2]
    state = step(x, F.linear(state[0], weights[0], *biases), state)
    for projection in projections:
        state = F.linear(state[0], projection), *state[1:]
    return state


def _cell(
    step: Step, input: Tensor, hx: Any, w: Tensor, u: Tensor, b: Any = None, c: Any = None
) -> Any:
    """What a cell module calls: ``(N, I)`` inputs and ``(N, H)`` states."""
    several = not isinstance(hx, Tensor)
    weights = [u] if c is None else [u, c]
    state = _advance(step, F.linear(input, w, b), tuple(hx) if several else (hx,), weights)
    return state if several else state[0]


def _layers(
    step: Step,
    input: Tensor,
    hx: Any,
    weights: Sequence[Tensor],
    has_bias: bool,
    num_layers: int,
    dropout: float,
    training: bool,
    bidirectional: bool,
    batch_first: bool,
) -> Any:
    """What a module of several layers calls: ``(N, T, I)`` inputs, ``(layers, N, H)`` states."""
    initial = (hx,) if isinstance(hx, Tensor) else tuple(hx)
    directions = 1 + bidirectional
    each = len(weights) // (num_layers * directions)
    x = input if batch_first else input.transpose(0, 1)
    last: list[State] = []
    for layer in range(num_layers):
        sides = []
        for side in range(directions):
            index = layer * directions + side
            w, u, *rest = weights[index * each : (index + 1) * each]
            b = rest.pop(0) if has_bias else None
            gates = F.linear(x, w, b).unbind(1)
            state = tuple(s[index] for s in initial)
            given = []
            for gate in reversed(gates) if side else gates:
                state = _advance(step, gate, state, [u, *rest])
                given.append(state[0])
            sides.append(torch.stack(given[::-1] if side else given, 1))
            last.append(state)
        x = torch.cat(sides, -1)
    output = x if batch_first else x.transpose(0, 1)
    return output, *(torch.stack(parts) for parts in zip(*last, strict=True))


_STEPS: dict[str, Step] = {
    "rnn_tanh": partial(_plain, torch.tanh),
    "rnn_relu": partial(_plain, torch.relu),
    "gru": _gru,
    "lstm": _lstm,
}
_LAYERS = {getattr(torch, name): partial(_layers, step) for name, step in _STEPS.items()}
_CELLS = {getattr(torch, f"{name}_cell"): partial(_cell, step) for name, step in _STEPS.items()}


def unrolled(function: Any, args: Sequence[Any]) -> Callable[..., Any] | None:
    """Give what a recurrent function of torch is made of; None for any other.

    Sequences of different lengths come packed, without an axis of examples: they stay what they
    are.
    """
    packed = len(args) > 3 and isinstance(args[3], list | tuple)
    return _CELLS.get(function) if packed else _LAYERS.get(function, _CELLS.get(function))
