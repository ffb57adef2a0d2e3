"""Where the examples are in what a function gives, from where they are in what it takes.

A track tells along which axis of a function's result they are (see `places`); None where it does
not know. Unless it says otherwise there are as many rounds as in what the function took.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from jacpot.tangent.network import tensors
from jacpot.tangent.places import Axis, Examples, Place, Places, moved

__all__ = [
    "FILLS",
    "NEEDS_CARE",
    "TELL_SHAPE",
    "TRACKS",
    "WEIGHT_PRODUCTS",
    "lead",
]

# Called with a function's result and all its arguments. The axis, or a place in each tensor given.
Track: TypeAlias = Callable[..., Axis | list[Place | None]]


def _shared(examples: Examples, operands: Sequence[Tensor]) -> Axis:
    """The axis, counted from the last, that operands share which broadcast against each other.

    What holds no examples must be the same for all: it has one entry there, or no such axis.
    """
    found = {a - x.ndim for x in operands if (a := examples.axis(x)) is not None}
    if len(found) != 1:
        return None
    (axis,) = found
    others = [x for x in operands if examples.axis(x) is None]
    return axis if all(x.ndim < -axis or x.shape[axis] == 1 for x in others) else None


def _from_first(axis: Axis, result: Tensor) -> Axis:
    return None if axis is None else axis + result.ndim


def _elementwise(examples: Examples, result: Tensor, *args: Any, **kwargs: Any) -> Axis:
    return _from_first(_shared(examples, tensors([*args, *kwargs.values()])), result)


def _indexed(function: Callable[..., Any], examples: Examples, x: Any, *args: Any) -> Any:
    """Of functions that pick elements by indices: by those that are the same for all examples."""
    indices = tensors(args)
    if any(examples.axis(i) is not None or i.dtype != torch.int64 for i in indices):
        return None
    return moved(lambda labels: function(labels, *args), examples, x)


def _picker(function: Callable[..., Any]) -> Track:
    return lambda examples, _, *args: _indexed(function, examples, *args)


def _matmul(examples: Examples, result: Tensor, a: Tensor, b: Tensor) -> Axis:
    """``(..., i, j) @ (..., j, k)``: rows of a, columns of b and leading axes, but never j."""
    first, second = examples.axis(a), examples.axis(b)
    if b.ndim == 1 and second is None:  # the last axis goes
        return first if first != a.ndim - 1 else None
    if min(a.ndim, b.ndim) < 2:
        return None
    if second is None and first == a.ndim - 2:
        return result.ndim - 2
    if first is None and second == b.ndim - 1:
        return result.ndim - 1
    axis = _shared(examples, [a, b])
    return None if axis is None or axis > -3 else axis + result.ndim


def _added_matmul(
    examples: Examples, result: Tensor, bias: Tensor, a: Tensor, b: Tensor, **_: Any
) -> Axis:
    axis = _matmul(examples, result, a, b)
    if axis is None:
        return None
    product = Examples(examples.n, lambda x: (axis, 1) if x is result else examples.place(x))
    return _elementwise(product, result, bias, result)


def _linear(
    examples: Examples, _: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Axis:
    return _kept(examples, x, [weight, bias], last=1)


def _kept(examples: Examples, x: Tensor, others: Sequence[Any], last: int = 0) -> Axis:
    """Only ``x`` holds examples, along none of its last axes, and there they stay."""
    axis = examples.axis(x)
    alone = all(examples.axis(other) is None for other in others)
    return axis if axis is not None and alone and axis < x.ndim - last else None


def _bilinear(
    examples: Examples, result: Tensor, x: Tensor, y: Tensor, weight: Tensor, bias: Any = None
) -> Axis:
    axis = _shared(examples, [x, y])
    alone = examples.axis(weight) is None and examples.axis(bias) is None
    return axis + result.ndim if axis is not None and axis < -1 and alone else None


def _sees(fewest: int, most: int = 99) -> Track:
    """The first argument alone holds examples, in the first of so many axes."""

    def track(examples: Examples, _: Any, x: Tensor, *args: Any, **kwargs: Any) -> Axis:
        others = tensors([*args, *kwargs.values()])
        first = _kept(examples, x, others) == 0 and fewest <= x.ndim <= most
        return 0 if first else None

    return track


def _attention(
    examples: Examples, result: Tensor, query: Tensor, key: Tensor, value: Tensor,
    attn_mask: Tensor | None = None, dropout_p: float = 0.0, *_: object, **__: object,
) -> Axis:  # fmt: skip
    axis = _shared(examples, tensors([query, key, value, attn_mask]))
    return axis + result.ndim if axis is not None and axis < -2 and dropout_p == 0 else None


def _einsum(examples: Examples, _: Tensor, equation: Any, *operands: Any) -> Axis:
    """The examples' letter is the same in all operands that hold any, and in no other."""
    if not isinstance(equation, str) or not re.fullmatch(r"[A-Za-z, ]+->[A-Za-z ]+", equation):
        return None
    left, right = equation.replace(" ", "").split("->")
    values = tensors(operands)
    letters, constant = set(), ""
    for x, names in zip(values, left.split(","), strict=True):
        axis = examples.axis(x)
        if axis is None:
            constant += names
        elif names.count(names[axis]) == 1:
            letters.add(names[axis])
        else:
            return None
    (letter,) = letters if len(letters) == 1 else (" ",)
    return right.index(letter) if right.count(letter) == 1 and letter not in constant else None


def _over(default: Any = None, position: int = 0) -> Track:
    """Axes other than the examples' meet: those that an argument ``dim`` names."""

    def track(
        examples: Examples, result: Any, x: Tensor, *args: Any, dim: Any = default, **kwargs: Any
    ) -> Axis:
        if len(args) > position:
            dim = args[position]
        axis = _kept(examples, x, tensors([*args, *kwargs.values()]))
        named = list(dim) if isinstance(dim, tuple | list) else [dim]
        dims = {d % x.ndim for d in named if type(d) is int}  # True and None say something else
        if axis is None or axis in dims or not dims or len(dims) < len(named):
            return None
        gone = 0 if tensors(result)[0].ndim == x.ndim else sum(d < axis for d in dims)
        return axis - gone

    return track


def _batch_norm(
    examples: Examples, _: Tensor, x: Tensor, mean: Tensor | None, var: Tensor | None,
    weight: Any = None, bias: Any = None, training: bool = False, *__: object, **___: object,
) -> Axis:  # fmt: skip
    axis = _kept(examples, x, [mean, var, weight, bias])
    return 0 if axis == 0 and mean is not None and not training else None


def _last_axes(
    examples: Examples, _: Tensor, x: Tensor, shape: Sequence[int], *args: Any, **kwargs: Any
) -> Axis:
    return _kept(examples, x, [*args, *kwargs.values()], last=len(shape))


def _embedding(
    examples: Examples, _: Tensor, x: Tensor, weight: Tensor, padding_idx: Any = None,
    max_norm: float | None = None, *__: object, **___: object,
) -> Axis:  # fmt: skip
    return _kept(examples, x, [weight]) if max_norm is None else None


def _one_hot(examples: Examples, _: Tensor, x: Tensor, num_classes: int = -1) -> Axis:
    return examples.axis(x) if num_classes > 0 else None


def _dropout(
    examples: Examples, _: Tensor, x: Tensor, p: float = 0.5, training: bool = True, *__: Any,
    **___: Any,
) -> Axis:  # fmt: skip
    return examples.axis(x) if p == 0 or not training else None


def _pad(examples: Examples, _: Tensor, x: Tensor, pad: Any, *__: Any, **___: Any) -> Axis:
    return _kept(examples, x, [], last=len(pad) // 2)


def _loss(examples: Examples, result: Tensor, x: Tensor, y: Tensor, **kwargs: Any) -> Axis:
    """Of scores ``(n, C)`` or ``(n, C, ...)`` and classes, or their probabilities."""
    each = kwargs.get("reduction") == "none" and x.ndim > 1
    return 0 if each and examples.axis(x) == examples.axis(y) == 0 else None


def _elementwise_loss(examples: Examples, result: Tensor, *args: Any, **kwargs: Any) -> Axis:
    each = kwargs.get("reduction") == "none"
    return _elementwise(examples, result, *args, **kwargs) if each else None


def _unknown(*_: object, **__: object) -> None:
    return None


def _of(owners: Sequence[Any], names: str) -> list[Any]:
    """Functions by their names, of all who have them."""
    return [getattr(o, name) for o in owners for name in names.split() if hasattr(o, name)]


def _getters(names: str) -> list[Any]:
    return [getter.__get__ for getter in _of([Tensor], names)]


_ANY = [F, torch, Tensor]

TELL_SHAPE: frozenset[Any] = frozenset(
    [
        *_of([Tensor], "dim ndimension size numel nelement stride __len__ is_contiguous"),
        *_of([torch, Tensor], "is_floating_point is_complex"),
        *_getters("shape ndim dtype device requires_grad is_cuda layout _version is_nested"),
    ]
)

# Functions of x, a weight and a bias whose result is not computed.
WEIGHT_PRODUCTS: frozenset[Any] = frozenset(
    _of([F], "linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d")
)

# Functions that give the same number everywhere.
FILLS: frozenset[Any] = frozenset(
    _of(_ANY, "zeros ones full new_zeros new_ones new_full zeros_like ones_like full_like")
)

# Functions that pick elements by indices.
BY_VALUE: frozenset[Any] = frozenset(_of(_ANY, "__getitem__ index_select"))

# Functions that must be known to be safe also where no examples are.
NEEDS_CARE: frozenset[Any] = frozenset(_of([F], "dropout dropout1d dropout2d dropout3d"))

_MOVES = _of(
    _ANY,
    "flatten unflatten reshape view squeeze unsqueeze transpose permute movedim moveaxis swapaxes "
    "swapdims t chunk split tensor_split unbind narrow select expand expand_as repeat tile "
    "repeat_interleave roll flip cat concat stack pixel_shuffle pixel_unshuffle diagonal",
)
_AS_MOVES = {Tensor.view: Tensor.reshape}  # labels have no strides that a view could keep


def _mover(function: Callable[..., Any]) -> Track:
    mover: Any = _AS_MOVES.get(function, function)
    return lambda examples, _, *args, **kwargs: moved(mover, examples, *args, **kwargs)


_TABLE: list[tuple[Track, list[Any]]] = [
    (
        _elementwise,
        _of(
            _ANY,
            "relu relu_ relu6 leaky_relu leaky_relu_ elu elu_ selu celu gelu silu mish softplus "
            "softsign softshrink hardshrink tanhshrink threshold hardtanh hardtanh_ hardsigmoid "
            "hardswish logsigmoid tanh tanh_ sigmoid sigmoid_ exp exp_ expm1 log log1p log2 sin "
            "cos tan atan sinh cosh erf abs sign neg square sqrt rsqrt reciprocal floor round ceil "
            "clamp clamp_ clamp_min clamp_max clip add add_ sub sub_ mul mul_ div div_ true_divide "
            "pow pow_ maximum minimum where masked_fill masked_fill_ lerp addcmul addcdiv eq ne lt "
            "le gt ge logical_and logical_or logical_not logical_xor bitwise_and bitwise_or "
            "remainder floor_divide fmod atan2 __eq__ __ne__ __lt__ __le__ __gt__ __ge__ __and__ "
            "__or__ __xor__ __invert__ __mod__ __rsub__ __pow__ __rpow__ __rdiv__ __rtruediv__ "
            "__floordiv__ "
            "zeros_like ones_like full_like",
        ),
    ),
    (_elementwise, _of([Tensor], "clone detach contiguous requires_grad_ to type type_as")),
    (_elementwise, _of([Tensor], "float double half long int bool")),
    *((_mover(function), [function]) for function in _MOVES),
    (_mover(Tensor.t), _getters("T")),
    (_mover(lambda x: x.transpose(-2, -1)), _getters("mT")),
    (_picker(Tensor.__getitem__), [Tensor.__getitem__]),
    (_picker(torch.index_select), _of(_ANY, "index_select")),
    (_matmul, _of(_ANY, "matmul __matmul__ mm bmm")),
    (_added_matmul, _of(_ANY, "addmm baddbmm")),
    (_einsum, [torch.einsum]),
    (_bilinear, [F.bilinear]),
    (_attention, [F.scaled_dot_product_attention]),
    (_linear, [F.linear]),
    (_sees(3, 3), _of([F], "conv1d conv_transpose1d max_pool1d avg_pool1d")),
    (_sees(3, 3), _of([F], "adaptive_max_pool1d adaptive_avg_pool1d")),
    (_sees(4, 4), _of([F], "conv2d conv_transpose2d max_pool2d avg_pool2d")),
    (_sees(4, 4), _of([F], "adaptive_max_pool2d adaptive_avg_pool2d")),
    (_sees(5, 5), _of([F], "conv3d conv_transpose3d max_pool3d avg_pool3d")),
    (_sees(5, 5), _of([F], "adaptive_max_pool3d adaptive_avg_pool3d")),
    (_sees(3), [F.group_norm, F.instance_norm, F.interpolate]),
    (_sees(2), _of([F, torch], "prelu")),
    (_batch_norm, [F.batch_norm]),
    (_last_axes, _of([F], "layer_norm rms_norm")),
    (_embedding, [F.embedding]),
    (_one_hot, [F.one_hot]),
    (_dropout, list(NEEDS_CARE)),
    (_pad, [F.pad]),
    (_over(), _of(_ANY, "softmax log_softmax mean sum amax amin logsumexp max min prod any all")),
    (_over(), _of(_ANY, "argmax argmin var std cumsum cumprod sort argsort")),
    (_over(-1), _of([F], "glu")),
    (_over(1, 1), [F.normalize]),
    (_over(None, 1), _of(_ANY, "norm")),
    (_over(-1, 1), _of(_ANY, "topk")),
    (_loss, _of([F], "cross_entropy nll_loss")),
    (_elementwise_loss, _of([F], "mse_loss l1_loss smooth_l1_loss huber_loss")),
    (_elementwise_loss, _of([F], "binary_cross_entropy_with_logits binary_cross_entropy")),
    # of parameters and constants
    (_unknown, _of([torch], "zeros ones full arange linspace eye kron _weight_norm")),
    (_unknown, _of(_ANY, "tril triu outer mv dot vdot slogdet new_zeros new_ones new_full")),
    (_unknown, _of([torch.linalg], "vector_norm slogdet det inv solve matrix_exp qr")),
    (_unknown, _of([torch.linalg], "householder_product")),
    (_unknown, _of([Tensor], "__bool__ __int__ __float__ __index__ item tolist")),
]
TRACKS = {function: track for track, functions in _TABLE for function in functions}

# What functions lead to, by all that this depends on; forgotten when these are too many.
_LED: dict[Any, Places] = {}
MOST_LED = 1 << 14


def lead(
    examples: Examples,
    function: Any,
    form: Any,
    operands: Sequence[Tensor],
    taken: tuple[Place | None, ...],
    result: Any,
    given: Sequence[Tensor],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Places | None:
    """Find where the examples are in what a call gave; None if it is not known.

    Parameters
    ----------
    examples
        How many there are, and where they are in the operands.
    function, form, args, kwargs
        The call, and what of its arguments are no tensors.
    operands, taken
        The tensors among the arguments, and where the examples are in them.
    result, given
        What it gave, and the tensors in that.
    """
    # indices lead to places by their values, all others by their shapes
    key = None
    if function not in BY_VALUE or len(operands) == 1:
        shapes = tuple([x.shape for x in operands]), tuple([x.shape for x in given])
        key = function, form, examples.n, taken, shapes
        try:
            if (known := _LED.get(key)) is not None:
                return known
        except TypeError:  # an argument that has no hash
            key = None
    found = TRACKS[function](examples, result, *args, **kwargs)
    if isinstance(found, int):
        rounds = {place[1] for place in taken if place is not None}
        found = [(found, rounds.pop())] * len(given) if len(rounds) == 1 else None
    if found is None or len(found) != len(given) or None in found:
        return None
    if key is not None:
        if len(_LED) >= MOST_LED:
            _LED.clear()
        _LED[key] = found
    return found
