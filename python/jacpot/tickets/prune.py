"""From scores to masks: which weights stay, how many in each layer, and exactly how many."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal, SupportsFloat

import torch
from torch import Tensor, nn

from jacpot.tickets.mask import Mask, check_same_layout
from jacpot.tickets.report import inspect

__all__ = ["Scope", "prune", "prune_iteratively", "schedule"]

Scope = Literal["global", "layer", "erk", "balanced"]
Scores = Mapping[str, Tensor]


def prune(
    scores: Scores,
    density: float | Mapping[str, float],
    scope: Scope = "global",
    within: Mapping[str, Tensor] | None = None,
    allow_empty: bool = False,
    network: tuple[nn.Module, Tensor] | None = None,
) -> Mask:
    """Keep the weights of highest score.

    The number kept is exact: ``round(density * n)`` of the ``n`` weights scored. Among equal
    scores the earlier weight (in the order of ``scores``, then row by row) stays.

    Parameters
    ----------
    scores
        One tensor a parameter; higher stays. See :mod:`jacpot.tickets.score`.
    density
        The share of all weights to keep, 0 to 1, or the share of each parameter by name.
    scope
        How the kept weights are spread over the parameters. ``"global"``: the best wherever they
        are. ``"layer"``: the same density in each. ``"erk"``: densities proportional to
        ``sum(shape) / prod(shape)`` (Erdős-Rényi-Kernel; Evci et al. 2020, *Rigging the Lottery*).
        ``"balanced"``: the same number in each. The last two fill small layers up and pass the
        rest on. Ignored when ``density`` is by name.
    within
        A mask; only what it keeps can be kept, so that the result nests in it. ``density`` still
        counts all weights.
    allow_empty
        Whether input and output may be cut apart. Unless told, a mask that leaves a parameter
        without any weight is refused, since that cuts a plain network in two.
    network
        The module and a batch of inputs: then what is refused is a mask that leaves no path from
        input to output (see :func:`jacpot.tickets.inspect`), and a layer beside a skip may empty.

    Returns
    -------
    Mask
        With the names and shapes of ``scores``.

    Raises
    ------
    TypeError
        If a score is no tensor, complex or bool, ``density`` no number, or ``within`` not bool.
    ValueError
        If a score is not finite, ``density`` is out of range, ``within`` keeps too few weights, or
        input and output would be cut apart.

    Examples
    --------
    >>> import torch
    >>> from jacpot import tickets
    >>> scores = {"a": torch.tensor([3.0, 1.0, 2.0, 0.0]), "b": torch.tensor([5.0, 4.0])}
    >>> mask = tickets.prune(scores, density=0.5)
    >>> mask["a"].tolist(), mask["b"].tolist()
    ([True, False, False, False], [True, True])
    >>> tickets.prune(scores, density=0.5, scope="layer")["a"].tolist()
    [True, False, True, False]
    """
    if not isinstance(scores, Mapping):
        raise TypeError(f"argument 'scores' must map names to tensors, got {type(scores).__name__}")
    flat = {name: _checked_scores(name, score) for name, score in scores.items()}
    allowed = {name: torch.ones_like(s, dtype=torch.bool) for name, s in flat.items()}
    if within is not None:
        within = Mask(within)
        check_same_layout("within", within, scores)
        allowed = {name: within[name].to(s.device).flatten() for name, s in flat.items()}
    room = {name: int(mask.sum()) for name, mask in allowed.items()}
    if scope == "global" and not isinstance(density, Mapping):
        total = _checked_count("density", density, sum(s.numel() for s in flat.values()))
        _check_room("density", total, sum(room.values()))
        kept = _split(_best(_joined(flat), _joined(allowed), total), flat)
    else:
        counts = _layer_counts(scores, density, scope, room)
        kept = {name: _best(s, allowed[name], counts[name]) for name, s in flat.items()}
    mask = Mask({name: kept[name].view(scores[name].shape) for name in flat})
    if not allow_empty:
        _refuse_cut(mask, density, network)
    return mask


def _refuse_cut(
    mask: Mask,
    density: float | Mapping[str, float],
    network: tuple[nn.Module, Tensor] | None,
) -> None:
    if network is not None:
        if not inspect(network[0], mask, network[1]).connected:
            raise ValueError(
                f"argument 'density': {density} leaves no path from input to output; choose "
                "another scope, or pass allow_empty=True"
            )
        return
    emptied = [name for name, m in mask.items() if m.numel() and not m.any()]
    if emptied:
        raise ValueError(
            f"argument 'density': {density} leaves {', '.join(emptied)} without a weight, which "
            "cuts a plain network in two; choose another scope, pass the network to have its paths "
            "looked at, or allow_empty=True"
        )


def schedule(density: float, steps: int, start: float = 1.0) -> list[float]:
    """Densities that fall by the same factor each step, from below ``start`` to ``density``.

    Parameters
    ----------
    density
        The last one.
    steps
        How many.
    start
        The density before the first step.

    Returns
    -------
    list of float

    Raises
    ------
    ValueError
        If ``steps`` or ``density`` is out of range.

    Examples
    --------
    >>> from jacpot import tickets
    >>> [round(d, 3) for d in tickets.schedule(0.001, 3)]
    [0.1, 0.01, 0.001]
    """
    if steps < 1:
        raise ValueError(f"argument 'steps' must be at least 1, got {steps}")
    if not 0 < density <= start <= 1:
        raise ValueError(
            f"argument 'density' must be in (0, start = {start}] for a geometric schedule, "
            f"got {density}"
        )
    ratio = density / start
    return [*(start * ratio ** (step / steps) for step in range(1, steps)), density]


def prune_iteratively(
    score: Callable[[Mask | None], Scores],
    density: float,
    steps: int = 100,
    scope: Scope = "global",
    allow_empty: bool = False,
) -> Mask:
    """Score and prune a little, again and again; each mask nests in the one before.

    This is what keeps SynFlow from emptying layers (Tanaka et al. 2020, algorithm 1).

    Parameters
    ----------
    score
        From the mask so far (None at first) to scores.
    density, scope, allow_empty
        As for :func:`prune`; densities fall as in :func:`schedule`.
    steps
        Rounds of scoring.

    Examples
    --------
    >>> import torch
    >>> from jacpot import tickets
    >>> net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
    >>> x = torch.ones(1, 8)
    >>> mask = tickets.prune_iteratively(lambda m: tickets.score.synflow(net, x, m), 0.1, 10)
    >>> mask.nnz
    8
    """
    mask: Mask | None = None
    for target in schedule(density, steps):
        mask = prune(score(mask), target, scope, within=mask, allow_empty=allow_empty)
    assert mask is not None
    return mask


def _checked_scores(name: str, score: Tensor) -> Tensor:
    if not isinstance(score, Tensor):
        raise TypeError(f"argument 'scores': {name!r} must be a tensor, got {type(score).__name__}")
    if score.is_complex() or score.dtype == torch.bool:
        raise TypeError(f"argument 'scores': {name!r} must be real numbers, got {score.dtype}")
    if not bool(torch.isfinite(score).all()):
        raise ValueError(f"argument 'scores': {name!r} holds values that are not finite")
    return score.detach().flatten()


def _checked_count(argument: str, density: float, numel: int) -> int:
    if not isinstance(density, SupportsFloat):
        raise TypeError(f"argument {argument!r} must be a number, got {density!r}")
    if not 0 <= density <= 1:
        raise ValueError(f"argument {argument!r} must lie in [0, 1], got {density}")
    return math.floor(density * numel + 0.5)


def _check_room(argument: str, count: int, room: int) -> None:
    if count > room:
        raise ValueError(
            f"argument {argument!r} asks for {count} weights, but 'within' keeps only {room}"
        )


def _best(score: Tensor, allowed: Tensor, count: int) -> Tensor:
    """The ``count`` allowed entries of highest score; earlier ones win ties. All are flat."""
    candidates = allowed.nonzero().squeeze(1)
    order = torch.sort(score[candidates], descending=True, stable=True).indices
    kept = torch.zeros_like(allowed)
    kept[candidates[order[:count]]] = True
    return kept


def _joined(flat: Scores) -> Tensor:
    return (
        torch.cat(list(flat.values())) if flat else torch.empty(0, dtype=torch.bool, device="cpu")
    )


def _split(kept: Tensor, flat: Scores) -> dict[str, Tensor]:
    pieces, start = {}, 0
    for name, score in flat.items():
        pieces[name] = kept[start : start + score.numel()]
        start += score.numel()
    return pieces


def _layer_counts(
    scores: Scores, density: float | Mapping[str, float], scope: str, room: Mapping[str, int]
) -> dict[str, int]:
    if isinstance(density, Mapping):
        if density.keys() != scores.keys():
            raise ValueError(
                f"argument 'density' must name {sorted(scores)}, got {sorted(density)}"
            )
        counts = {n: _checked_count("density", density[n], s.numel()) for n, s in scores.items()}
        for name, count in counts.items():
            _check_room(f"density[{name!r}]", count, room[name])
        return counts
    total = _checked_count("density", density, sum(s.numel() for s in scores.values()))
    if scope == "layer":
        share = {name: float(s.numel()) for name, s in scores.items()}
    elif scope == "erk":
        share = {name: float(sum(s.shape)) for name, s in scores.items()}
    elif scope == "balanced":
        share = {name: float(s.numel() > 0) for name, s in scores.items()}
    else:
        raise ValueError(
            f"argument 'scope' must be 'global', 'layer', 'erk' or 'balanced', got {scope!r}"
        )
    _check_room("density", total, sum(room.values()))
    return allocate(total, share, room)


def allocate(total: int, share: Mapping[str, float], room: Mapping[str, int]) -> dict[str, int]:
    """Whole numbers in proportion to ``share``, none above its ``room``, that sum to ``total``.

    Full ones pass their excess on to the others in proportion; the last units go to the largest
    remainders, the first of equals.
    """
    free = {name: s for name, s in share.items() if room[name] > 0}
    exact = dict.fromkeys(share, 0.0)
    left = float(total)
    while free:
        scale = left / sum(free.values()) if sum(free.values()) > 0 else math.inf
        full = [name for name, s in free.items() if scale * s >= room[name]]
        if not full:
            exact.update({name: scale * s for name, s in free.items()})
            break
        for name in full:
            exact[name] = float(room[name])
            left -= room[name]
            del free[name]
    counts = {name: math.floor(value) for name, value in exact.items()}
    remainders = sorted(exact, key=lambda name: counts[name] - exact[name])
    while (missing := total - sum(counts.values())) > 0:
        open_to_more = [name for name in remainders if counts[name] < room[name]]
        for name in open_to_more[:missing]:
            counts[name] += 1
    return counts
