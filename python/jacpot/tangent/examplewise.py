"""Proof that a network treats its examples one by one, from the functions that it calls.

Of most functions that networks call it is known what they do to the leading axis. A run on stand-in
examples follows which values hold one example in each entry of theirs. If the outputs do, and no
other function was called, then so they do for any examples: none of the known functions tells the
network of a value on which it could base another course. For that reason the products with weights,
which are what takes time, need not be computed in this run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from jacpot.tangent.network import Network, over_tensors, tensors
from jacpot.tangent.recorder import Call, Recorder
from jacpot.tangent.rules import LayerRule

__all__ = ["follow"]


def follow(network: Network, x: Any, targets: Any) -> tuple[Tensor, list[Call]] | None:
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
        Outputs of the shape that they have, ``(n, K)``, and the recorded calls, which cover all
        uses of the parameters and have the examples in their leading axes. None without a proof.
    """
    # Code that is not torch's may throw dice that torch does not see: then its steps change.
    runs = [Follower(network, [x, targets]) for _ in range(1 if _is_of_torch(network) else 2)]
    first = runs[0]
    try:
        outputs = [follower.run(x, targets, follower.leaves) for follower in runs]
    except Exception:  # unknown, or wrong: then running the network as it is will tell
        return None
    if any(follower.lost or follower.steps != first.steps for follower in runs):
        return None
    if not all(map(first.is_apart, [outputs[0], *(call.input for call in first.calls)])):
        return None
    return outputs[0], first.calls


def _is_of_torch(network: Network) -> bool:
    """Whether all code that runs is torch's own."""
    return not callable(network.output) and all(
        type(part).__module__.startswith("torch.nn.modules.")
        and not (part._forward_pre_hooks or part._forward_hooks)
        for part in network.module.modules()
    )


class Follower(Recorder):
    """Follows as well which values hold one example in each entry of their leading axis.

    Parameters
    ----------
    network
        The network that will be called.
    examples
        What it will be called with: tensors of examples, ``(n, ...)``.

    Attributes
    ----------
    leaves
        The parameters that it must be called with. Where a rule holds, the network's own take
        their place; any other use of one is that of an unknown tensor.
    steps
        What was called, with the operands by their order of appearance.
    lost
        Whether a function was called, or a tensor used, of which nothing is known.
    """

    def __init__(self, network: Network, examples: Any) -> None:
        self.leaves = {name: value.detach() for name, value in network.parameters.items()}
        super().__init__(network, self.leaves)
        self.steps: list[Any] = []
        self.lost = False
        self._seen: list[Tensor] = []  # kept, so that no other tensor gets an id of theirs
        self._places: dict[int, int] = {}
        self._apart: set[int] = set()
        for constant in (*network.state.values(), *network.module.buffers()):
            self._add(constant, False)
        for example in tensors(examples):
            self._add(example, True)

    def is_apart(self, value: Tensor) -> bool:
        """Whether this is known to hold one example in each entry of its leading axis."""
        return id(value) in self._apart

    def _add(self, value: Tensor, is_apart: bool) -> None:
        self._places.setdefault(id(value), len(self._seen))
        self._seen.append(value)
        if is_apart:
            self._apart.add(id(value))

    def _evaluate(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if func in TELL_SHAPE:
            return func(*args, **kwargs)
        arguments = [*args, *kwargs.values()]
        operands = tensors(arguments)
        condition = CONDITIONS.get(func)
        if condition is None or not all(id(operand) in self._places for operand in operands):
            self._lose(func)
        self.steps.append((func, over_tensors(arguments, lambda x: self._places[id(x)])))
        result = _zeros(func, *args, **kwargs) if func in PRODUCTS else func(*args, **kwargs)
        apart = [operand for operand in operands if id(operand) in self._apart]
        if apart and not (
            len(result) == len(apart[0]) and condition(result, apart, *args, **kwargs)
        ):
            self._lose(func)
        self._add(result, bool(apart))
        return result

    def _record(
        self,
        rule: LayerRule,
        arguments: dict[str, Any],
        parameters: dict[str, str],
        result: Tensor,
    ) -> Tensor:
        recorded = super()._record(rule, arguments, parameters, result)
        self._add(recorded, self.is_apart(result))
        return recorded

    def _lose(self, func: Any) -> NoReturn:
        self.lost = True  # also where the network catches this
        raise NotImplementedError(f"it is not known what {func} does to examples")


def _zeros(product: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Give zeros in the place of a product of ``x`` with a weight."""
    none = product(x[:0], *args, **kwargs)
    return none.new_zeros((len(x), *none.shape[1:]))


# Conditions tell from a function's result, those of its operands that hold examples, and all its
# arguments whether the result holds the examples' own results. It has as many entries in its
# leading axis as they have; the number of stand-ins is chosen so that nothing else of that size
# gets along with the examples.
Condition = Callable[..., bool]


def _elementwise(result: Tensor, apart: Sequence[Tensor], *_: object, **__: object) -> bool:
    return all(operand.ndim == result.ndim for operand in apart)


def _in_order(*_: object, **__: object) -> bool:
    """Elements stay in the order that they have in memory."""
    return True


def _sees(fewest: int, most: int = 99) -> Condition:
    """The first argument alone holds examples, and has so many axes."""

    def condition(_: Tensor, apart: Sequence[Tensor], x: Tensor, *__: Any, **___: Any) -> bool:
        return len(apart) == 1 and apart[0] is x and fewest <= x.ndim <= most

    return condition


def _dropout(
    _: Tensor, __: object, x: Tensor, p: float = 0.5, training: bool = True, *___: Any, **____: Any
) -> bool:
    return p == 0 or not training


def _batch_norm(
    _: Tensor, apart: Sequence[Tensor], x: Tensor, mean: Tensor | None, var: Tensor | None,
    weight: object = None, bias: object = None, training: bool = False, *__: object, **___: object,
) -> bool:  # fmt: skip
    return len(apart) == 1 and mean is not None and not training


def _layer_norm(
    _: Tensor, apart: Sequence[Tensor], x: Tensor, shape: Sequence[int], *__: Any, **___: Any
) -> bool:
    return len(apart) == 1 and len(shape) < x.ndim


def _embedding(
    _: Tensor, apart: Sequence[Tensor], x: Tensor, weight: Tensor, padding_idx: int | None = None,
    max_norm: float | None = None, *__: object, **___: object,
) -> bool:  # fmt: skip
    return len(apart) == 1 and apart[0] is x and max_norm is None


def _pad(_: Tensor, __: object, x: Tensor, pad: Sequence[int], *___: Any, **____: Any) -> bool:
    return len(pad) < 2 * x.ndim


def _along(
    _: Tensor, __: object, x: Tensor, dim: int | Sequence[int] | None = None, *___: Any,
    **____: Any,
) -> bool:  # fmt: skip
    """Only axes other than the leading one meet."""
    axes = [dim] if isinstance(dim, int) else dim or [0]
    return all(axis % x.ndim for axis in axes)


def _loss(*_: object, reduction: str = "mean", **__: object) -> bool:
    return reduction == "none"


def _every_example(_: Tensor, __: object, x: Tensor, index: object) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return parts[0] == slice(None) and not any(isinstance(p, Tensor | list) for p in parts[1:])


def _of(owners: Sequence[Any], names: str) -> list[Any]:
    """Functions by their names, of all who have them."""
    return [getattr(o, name) for o in owners for name in names.split() if hasattr(o, name)]


TELL_SHAPE: frozenset[Any] = frozenset(
    [
        *_of([Tensor], "dim size numel __len__ is_floating_point"),
        *(getter.__get__ for getter in _of([Tensor], "shape ndim dtype device requires_grad")),
        *(getter.__get__ for getter in _of([Tensor], "_version is_nested")),
    ]
)

# Functions of x, a weight and a bias whose result is not computed.
PRODUCTS: frozenset[Any] = frozenset(
    _of([F], "linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d")
)

_TABLE: list[tuple[Condition, list[Any]]] = [
    (
        _elementwise,
        _of(
            [F, torch, Tensor],
            "relu relu_ relu6 leaky_relu elu selu celu gelu silu mish softplus softsign "
            "hardtanh hardsigmoid hardswish logsigmoid tanh tanh_ sigmoid sigmoid_ exp log "
            "sin cos abs neg square sqrt clamp add add_ sub sub_ mul mul_ div div_ pow "
            "__rsub__ __pow__ clone detach contiguous requires_grad_",
        ),
    ),
    (_in_order, _of([torch, Tensor], "flatten unflatten reshape view squeeze unsqueeze")),
    (_every_example, [Tensor.__getitem__]),
    (_sees(2), [F.linear]),
    (_sees(3, 3), _of([F], "conv1d conv_transpose1d max_pool1d avg_pool1d")),
    (_sees(3, 3), _of([F], "adaptive_max_pool1d adaptive_avg_pool1d")),
    (_sees(4, 4), _of([F], "conv2d conv_transpose2d max_pool2d avg_pool2d")),
    (_sees(4, 4), _of([F], "adaptive_max_pool2d adaptive_avg_pool2d")),
    (_sees(5, 5), _of([F], "conv3d conv_transpose3d max_pool3d avg_pool3d")),
    (_sees(5, 5), _of([F], "adaptive_max_pool3d adaptive_avg_pool3d")),
    (_sees(3), [F.group_norm, F.instance_norm]),
    (_batch_norm, [F.batch_norm]),
    (_layer_norm, _of([F], "layer_norm rms_norm")),
    (_embedding, [F.embedding]),
    (_dropout, _of([F], "dropout dropout1d dropout2d dropout3d")),
    (_pad, [F.pad]),
    (_along, _of([F, torch, Tensor], "softmax log_softmax mean sum amax")),
    (_loss, _of([F], "cross_entropy nll_loss mse_loss")),
]
CONDITIONS = {function: condition for condition, functions in _TABLE for function in functions}
