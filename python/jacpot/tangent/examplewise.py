"""Proof that a network treats its examples one by one, from the functions that it calls.

Of most functions that networks call it is known what they do to the examples (see `tracks`). A run
that is followed tells along which axis they are in every value. If they are so in the outputs, and
no other function was called, then the network treated these examples one by one: none of the known
functions tells the network of a value on which it could base another course.

A run of a few stand-in examples, in which the products with weights need not be computed, tells
beforehand how much memory the examples will take. What is proof is the run of the examples
themselves: it is followed as well, and has to make the same calls. Code that is not torch's may
make others, as the number of examples or dice have it: then another run must repeat the calls.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import get_gradient_edge

from jacpot.tangent.course import Course, Deviates, Step, alike, form_of
from jacpot.tangent.local import local_rule, writes
from jacpot.tangent.network import Inputs, Network, n_examples, over_tensors, tensors
from jacpot.tangent.places import Examples, Place, Places
from jacpot.tangent.recorder import Recorder
from jacpot.tangent.rules import LayerRule
from jacpot.tangent.tracks import (
    FILLS,
    NEEDS_CARE,
    TELL_SHAPE,
    TRACKS,
    WEIGHT_PRODUCTS,
    lead,
)

__all__ = ["Follower", "follow"]


def follow(network: Network, x: Any, targets: Any) -> tuple[Tensor, Follower] | None:
    """Run stand-in examples, to learn how the network treats examples.

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
        cover all uses of the parameters. None if it does not treat them one by one.
    """
    leaves = {name: p.detach().requires_grad_() for name, p in network.parameters.items()}
    follower = Follower(network, leaves, [x, targets])
    try:
        outputs = follower.run(x, targets, leaves)
    except Exception:  # unknown, or wrong: then running the network as it is will tell
        return None
    return (outputs, follower) if follower.proves(outputs) else None


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
    expected
        The course that it should take. By default this is a run of stand-ins, to find it out.
    strict
        Whether no other call than an expected one is to be made.

    Attributes
    ----------
    course
        The calls so far.
    made
        What was made of parameters and met examples, by the names that calls have for it.
    cut
        Where the graph of the stand-ins' run was cut: what recorded calls and products took.
    places
        For each recorded call where the examples are in what it gave.
    deviates
        Whether a call was not the one expected.
    lost
        Whether a function was called, or a tensor used, of which nothing is known.
    """

    def __init__(
        self,
        network: Network,
        leaves: Mapping[str, Tensor],
        examples: Any,
        expected: Course | None = None,
        strict: bool = False,
    ) -> None:
        super().__init__(network, leaves, faster=expected is not None)
        self.leaves, self.expected, self.strict = leaves, expected, strict
        self.n = n_examples(tensors(examples))
        self.course = Course(self.n, [])
        self.made: dict[str, Tensor] = {}
        self.cut: list[Tensor] = []
        self.places: list[Place] = []
        self.deviates = self.lost = False
        # by id: a tensor, unless it is gone, its order of appearance, and where the examples are
        self._known: dict[int, tuple[Any, int, Place | None]] = {}
        self._appeared = 0
        for constant in (*network.state.values(), *network.module.buffers(), *leaves.values()):
            self._add(constant, None)
        for example in tensors(examples):
            self._add(example, (0, 1))

    def place(self, value: Any) -> Place | None:
        """Where in a value the examples are."""
        found = self._find(value)
        return None if found is None else found[2]

    def run(
        self, x: Inputs, targets: Any = None, parameters: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Evaluate the network as `Recorder.run` does.

        Raises
        ------
        ValueError
            If a course was expected, but this run is no proof.
        Deviates
            The same, if the network may make no calls but the expected ones.
        """
        outputs: Any = None
        try:
            outputs = super().run(x, targets, parameters)
        except Exception:
            if not (self.strict or (self.lost and self.expected is not None)):
                raise
        if self.expected is not None:
            self.deviates |= len(self.course.steps) < len(self.expected.steps)
            proven = outputs is not None and self.proves(outputs)
            if self.strict and (self.deviates or not proven):
                raise Deviates
            if not proven:
                raise ValueError(
                    "argument 'module' must treat examples one by one, but the functions that it "
                    f"calls for {self.n} examples are others than for a few, or treat them "
                    "otherwise"
                )
        found: Tensor = outputs
        return found

    def proves(self, outputs: Tensor) -> bool:
        """Whether the run that gave these is proof, and calls cover all uses of parameters."""
        if self.lost or self.place(outputs) != (0, 1) or len(outputs) != self.n:
            return False
        ends = set(map(id, self.leaves.values()))
        for node in _graph([outputs, *self.cut]):
            # Derivatives that somebody wrote may be anything.
            if isinstance(node, BackwardCFunction) and not _is_ours(node):
                return False
            if id(getattr(node, "variable", None)) in ends:
                return False
        return True

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _MADE_OF and not self._inside_module:
            with self:
                return _MADE_OF[func](*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)

    def made_of(self, name: str) -> dict[str, Tensor]:
        """The parameters, by name, of which something was made."""
        ends = {id(getattr(node, "variable", None)) for node in _graph([self.made[name]])}
        return {name: leaf for name, leaf in self.leaves.items() if id(leaf) in ends}

    def uncovered(self) -> list[str]:
        """Names of the parameters that functions without rule took."""
        local = [call.parameters.values() for call in self.calls if call.rule.local]
        return [name for name in self.leaves if any(name in names for names in local)]

    def _find(self, value: Any) -> tuple[Any, int, Place | None] | None:
        found = self._known.get(id(value))
        return found if found is not None and found[0]() is value else None

    def _add(self, value: Tensor, place: Place | None, like: Tensor | None = None) -> None:
        """Learn where in a value the examples are; it may count as another that is known."""
        found = self._find(value if like is None else like)
        if found is None:
            self._appeared += 1
        order = self._appeared if found is None else found[1]
        self._known[id(value)] = weakref.ref(value), order, place

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
        found = self._find(value)
        return found is not None and found[2] is None

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
        operands: list[Tensor] = []
        form = form_of(args, operands), form_of(kwargs, operands)
        known = [found for x in operands if (found := self._find(x)) is not None]
        if func not in TRACKS or len(known) < len(operands):
            self._lose(func)
        call = func, tuple([order for _, order, _ in known]), form
        expected = self._expect(call)
        taken = tuple([place for _, _, place in known])
        meets = any(taken)
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
        given = [result] if isinstance(result, Tensor) else tensors(result)
        places: Places | None
        if meets or func in NEEDS_CARE:
            examples = Examples(self.n, self.place)
            places = lead(examples, func, form, held, taken, result, given, args, kwargs)
        else:
            places = [self._spread(func, value, expected) for value in given]
        if places is None:
            self._lose(func)
        self.course.steps.append(Step(call, tuple([None if p is None else p[0] for p in places])))
        for value, place in zip(given, places, strict=True):
            self._add(value, place)
        if made and any(places):
            return self._record_use(func, args, kwargs, operands, held, made, taken, result)
        return result

    def _expect(self, call: tuple[Any, ...]) -> Step | None:
        """The step that is expected, if this is the one."""
        if self.expected is None or self.deviates:
            return None
        steps, i = self.expected.steps, len(self.course.steps)
        if i < len(steps) and alike(call, self.n, steps[i].call, self.expected.n):
            return steps[i]
        self.deviates = True
        if self.strict:
            raise Deviates
        return None

    def _record_use(
        self,
        func: Any,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        operands: list[Tensor],
        held: list[Tensor],
        made: list[int],
        taken: Sequence[Place | None],
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

    def _spread(self, func: Any, value: Tensor, expected: Step | None) -> Place | None:
        """Find the axis along which there is one entry for each example, the same for all."""
        along = list(range(value.ndim))
        if expected is not None:  # which of several axes counts examples, the stand-ins tell
            along = [axis for axis in expected.given if axis is not None and axis < value.ndim]
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
        self._add(recorded, place, like=result)
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


def _is_ours(node: BackwardCFunction) -> bool:
    kind: Any = type(node)
    return str(kind._forward_cls.__module__).startswith("jacpot.")


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
