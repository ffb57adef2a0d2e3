"""Proof that a network treats its examples one by one, from the functions that it calls.

Of most functions that networks call it is known what they do to the examples (see `tracks`). A run
on stand-in examples follows along which axis they are in every value. If they are so in the
outputs, and no other function was called, then the network treats any examples one by one: none of
the known functions tells the network of a value on which it could base another course. For that
reason the products with weights, which are what takes time, need not be computed in this run.

A course may still hang on the number of examples. So the run of the examples themselves is followed
too: it has to take the same course, with the examples along the same axes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import get_gradient_edge
from torch.utils.weak import WeakTensorKeyDictionary

from jacpot.tangent.local import local_rule, writes
from jacpot.tangent.network import Inputs, Network, n_examples, over_tensors, tensors
from jacpot.tangent.recorder import Recorder
from jacpot.tangent.rules import LayerRule
from jacpot.tangent.tracks import (
    FILLS,
    NEEDS_CARE,
    TELL_SHAPE,
    TRACKS,
    WEIGHT_PRODUCTS,
    Axis,
    Examples,
    Place,
)

__all__ = ["Course", "Follower", "follow"]


@dataclass(frozen=True)
class Step:
    """A call: the function, and where the examples are in what it took and gave."""

    function: Any
    taken: tuple[Axis, ...]
    given: tuple[Axis, ...]


Course = list[Step]


def follow(network: Network, x: Any, targets: Any) -> tuple[Tensor, Follower] | None:
    """Run stand-in examples, to prove that the network treats examples one by one.

    Parameters
    ----------
    network
        The network.
    x, targets
        The stand-ins ``(n, ...)``, of another number than there are examples; may be written to.

    Returns
    -------
    tuple or None
        Outputs of the shape that they have, ``(n, K)``, and what followed the run, whose calls
        cover all uses of the parameters. None without a proof.
    """
    # Code that is not torch's may throw dice that torch does not see: then its steps change.
    leaves = {name: p.detach().requires_grad_() for name, p in network.parameters.items()}
    count = 1 if _is_of_torch(network) else 2
    runs = [Follower(network, leaves, [x, targets]) for _ in range(count)]
    first = runs[0]
    try:
        outputs = [follower.run(x, targets, leaves) for follower in runs]
    except Exception:  # unknown, or wrong: then running the network as it is will tell
        return None
    if any(follower.lost or follower.details != first.details for follower in runs):
        return None
    if first.place(outputs[0]) != (0, 1) or len(outputs[0]) != first.n:
        return None
    # Derivatives that somebody wrote may be anything, and no use of a parameter must be left.
    ends = set(map(id, leaves.values()))
    for node in _graph([outputs[0], *first.cut]):
        if isinstance(node, BackwardCFunction) or id(getattr(node, "variable", None)) in ends:
            return None
    return outputs[0], first


def _is_of_torch(network: Network) -> bool:
    """Whether all code that runs is torch's own."""
    return not callable(network.output) and all(
        type(part).__module__.startswith("torch.nn.modules.")
        and not (part._forward_pre_hooks or part._forward_hooks)
        for part in network.module.modules()
    )


class Follower(Recorder):
    """Follows as well along which axis of every value the examples are.

    Calls that have a rule are recorded as ever. So are those of other functions that take a
    parameter, or what is made of parameters alone, together with examples: with a rule of their
    own, see `local_rule`.

    Parameters
    ----------
    network, leaves
        The network, and the parameters that it will be called with, which require gradients.
    examples
        What it will be called with: tensors of examples, ``(n, ...)``.
    course
        The course that it must take. By default this is the run of stand-ins that finds it out.

    Attributes
    ----------
    made
        What was made of parameters and met examples, by the names that calls have for it.
    cut
        Where the graph of the stand-ins' run was cut: what recorded calls and products took.
    places
        For each recorded call where the examples are in what it gave.
    details
        What was called, with the operands by their order of appearance and all other arguments.
    lost
        Whether a function was called, or a tensor used, of which nothing is known.
    """

    def __init__(
        self,
        network: Network,
        leaves: Mapping[str, Tensor],
        examples: Any,
        course: Course | None = None,
    ) -> None:
        # our own functions have derivatives of their own, which are no proof of anything
        super().__init__(network, leaves, faster=course is not None)
        self.leaves = leaves
        self.expected = course
        self.course: Course = []
        self.details: list[Any] = []
        self.made: dict[str, Tensor] = {}
        self.cut: list[Tensor] = []
        self.places: list[Place] = []
        self.lost = False
        self.n = n_examples(tensors(examples))
        self._known: Any = WeakTensorKeyDictionary()  # the order of appearance, and the place
        self._order = itertools.count()
        for constant in (*network.state.values(), *network.module.buffers(), *self.leaves.values()):
            self._add(constant, None)
        for example in tensors(examples):
            self._add(example, (0, 1))

    def place(self, value: Any) -> Place | None:
        """Where in a value the examples are."""
        found = self._known.get(value) if isinstance(value, Tensor) else None
        place: Place | None = None if found is None else found[1]
        return place

    def run(
        self, x: Inputs, targets: Any = None, parameters: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Evaluate the network as `Recorder.run` does, on the course that is expected.

        Raises
        ------
        ValueError
            If the network takes another.
        """
        try:
            outputs = super().run(x, targets, parameters)
        except NotImplementedError:
            if self.expected is None or not self.lost:
                raise
        if self.expected is not None and (self.lost or self.course != self.expected):
            raise ValueError(
                "argument 'module' must treat examples one by one, but the functions that it calls "
                f"for {self.n} examples are others than for a few, or treat them otherwise"
            )
        return outputs

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _MADE_OF and not self._inside_module:
            with self:
                return _MADE_OF[func](*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)

    @property
    def is_plain(self) -> bool:
        """Whether a run of other examples need not be followed.

        Each of torch's own layers takes them in its first axis, however many they are.
        """
        first = all(place == (0, 1) for place in self.places)
        return first and not self.made and not self.uncovered() and _is_of_torch(self.network)

    def made_of(self, name: str) -> dict[str, Tensor]:
        """The parameters, by name, of which something was made."""
        ends = {id(getattr(node, "variable", None)) for node in _graph([self.made[name]])}
        return {name: leaf for name, leaf in self.leaves.items() if id(leaf) in ends}

    def uncovered(self) -> list[str]:
        """Names of the parameters that functions without rule took."""
        local = [call.parameters.values() for call in self.calls if call.rule.local]
        return [name for name in self.leaves if any(name in names for names in local)]

    def _add(self, value: Tensor, place: Place | None) -> None:
        before = self._known.get(value)
        self._known[value] = next(self._order) if before is None else before[0], place

    def _named(self, value: Any) -> str | None:
        name = super()._named(value)
        if name is None and self._is_made(value):
            name = next((known for known, made in self.made.items() if made is value), None)
            if name is None:
                name = f"what is made of parameters ({len(self.made)})"
                self.made[name] = value
        return name

    def _fixed(self, name: str) -> Tensor:
        if name not in self.made:
            return super()._fixed(name)
        value = self.made[name].detach()
        self._add(value, None)
        return value

    def _is_made(self, value: Any) -> bool:
        """Whether this is a parameter, or made of parameters alone."""
        if not isinstance(value, Tensor) or not value.requires_grad:
            return False
        found = self._known.get(value)
        return found is not None and found[1] is None

    def _applies(
        self, rule: LayerRule, arguments: dict[str, Any], parameters: Mapping[str, str]
    ) -> bool:
        """The rule is of layers: what it sees are examples, and all else that it has rows for."""
        others = [v for name, v in arguments.items() if name not in (rule.input, *parameters)]
        return (
            self.place(arguments[rule.input]) is not None
            and not any(map(self._is_made, tensors(others)))
            and super()._applies(rule, arguments, parameters)
        )

    def _evaluate(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if func in TELL_SHAPE:
            return func(*args, **kwargs)
        arguments = [*args, *kwargs.values()]
        operands = tensors(arguments)
        known = [self._known.get(operand) for operand in operands]
        if func not in TRACKS or None in known:
            self._lose(func)
        taken: list[Place | None] = [place for _, place in known]
        rounds = {place[1] for place in taken if place is not None}
        meets = len(rounds) > 0
        order = iter(known)
        numbered = over_tensors(arguments, lambda _: next(order)[0])
        made = [i for i, x in enumerate(operands) if taken[i] is None and x.requires_grad]
        held = operands
        if meets and made:  # the graph is not to lead to parameters from here
            held = [x.detach() if i in made else x for i, x in enumerate(operands)]
            ahead = iter(held)
            args, kwargs = over_tensors([list(args), dict(kwargs)], lambda _: next(ahead))
            for i in made:
                self._add(held[i], None)
            if writes(func):
                held[0] = held[0].clone()
        if meets and func in WEIGHT_PRODUCTS and self.expected is None:
            result = _zeros(func, *args, **kwargs)
            self.cut.extend(filter(self.place, operands))
        else:
            result = super()._evaluate(func, args, kwargs)
        given = tensors(result)
        places: list[Place | None]
        if meets or func in NEEDS_CARE:
            examples = Examples(self.n, self.place)
            found = TRACKS[func](examples, result, *args, **kwargs)
            if isinstance(found, list):
                places = found
            elif found is not None and len(rounds) == 1:
                places = [(found, rounds.pop())] * len(given)
            else:
                self._lose(func)
            if len(places) != len(given) or None in places:
                self._lose(func)
        else:
            places = [self._spread(func, value) for value in given]
        self.course.append(Step(func, tuple(map(_axis, taken)), tuple(map(_axis, places))))
        self.details.append((func, numbered))
        for value, place in zip(given, places, strict=True):
            self._add(value, place)
        if made and any(places):
            return self._record_use(func, args, kwargs, operands, held, made, taken, result)
        return result

    def _record_use(
        self,
        func: Any,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        operands: list[Tensor],
        held: list[Tensor],
        made: list[int],
        taken: list[Place | None],
        result: Any,
    ) -> Tensor:
        """Record a call in which what is made of parameters meets examples, or becomes theirs."""
        # no place in the graph is known of several results, nor of what others see change
        changed = writes(func) and (operands[0]._is_view() or not operands[0].requires_grad)
        if not isinstance(result, Tensor) or changed:
            self._lose(func)
        place = self.place(result)
        assert place is not None
        names = {str(i): name for i in made if (name := self._named(operands[i])) is not None}
        if not any(taken):
            held, result = [value.detach() for value in held], result.detach()
            self._add(result, place)
        rule = local_rule(func, args, kwargs, made, taken, self.n, place)
        return self._record(rule, {str(i): x for i, x in enumerate(held)}, names, result)

    def _spread(self, func: Any, value: Tensor) -> Place | None:
        """Find the axis along which there is one entry for each example, the same for all."""
        if self.expected is not None:  # which of several axes counts examples, the stand-ins tell
            step = (
                self.expected[len(self.course)] if len(self.course) < len(self.expected) else None
            )
            axis = step.given[0] if step is not None and len(step.given) == 1 else None
            along = [] if axis is None or axis >= value.ndim else [axis]
        else:
            along = list(range(value.ndim))
        along = [
            axis
            for axis in along
            if value.shape[axis] == self.n and (func in FILLS or value.stride(axis) == 0)
        ]
        return (along[0], 1) if len(along) == 1 else None

    def _record(
        self,
        rule: LayerRule,
        arguments: dict[str, Any],
        parameters: dict[str, str],
        result: Tensor,
    ) -> Tensor:
        recorded = super()._record(rule, arguments, parameters, result)
        place = self.place(result)
        assert place is not None
        self._add(recorded, place)
        self.places.append(place)
        if self.expected is None:
            self.cut.extend(filter(self.place, tensors([*arguments.values()])))
        return recorded

    def _lose(self, func: Any) -> NoReturn:
        self.lost = True  # also where the network catches this
        raise NotImplementedError(f"it is not known what {func} does to examples")


def _graph(values: Sequence[Tensor]) -> Iterator[Any]:
    """The nodes of the graph that leads to tensors."""
    seen: set[Any] = {None}
    waiting: list[Any] = [get_gradient_edge(x).node for x in values if x.requires_grad]
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            yield node
            waiting.extend(before for before, _ in node.next_functions)


def _axis(place: Place | None) -> Axis:
    return None if place is None else place[0]


def _zeros(product: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Give zeros in the place of a product of ``x`` with a weight."""
    none = product(x[:0], *args, **kwargs)
    return none.new_zeros((len(x), *none.shape[1:]))


# Functions as what they do to examples.
_MADE_OF: dict[Any, Callable[..., Any]] = {
    Tensor.__iter__: lambda x: iter(x.unbind(0)),
    Tensor.expand_as: lambda x, other: x.expand(other.shape),
    Tensor.view_as: lambda x, other: x.reshape(other.shape),
}
