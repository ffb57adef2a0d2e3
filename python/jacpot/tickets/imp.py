"""Iterative magnitude pruning: train, prune a little, rewind, again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, SupportsFloat

import torch
from rich.progress import track
from torch import Tensor, nn

from jacpot.linalg.arguments import check_count
from jacpot.nn.stand_ins import copy_of
from jacpot.tickets._files import read_json, read_tensors, write_atomically, write_tensors
from jacpot.tickets._random import seeded
from jacpot.tickets.mask import Mask, chosen_mask
from jacpot.tickets.parametrization import apply, bake
from jacpot.tickets.prune import prune
from jacpot.tickets.rounds import Round, Tickets
from jacpot.tickets.score.plain import magnitude

__all__ = ["imp"]

Train = Callable[..., Mapping[str, Any] | None]
Score = Callable[[nn.Module, Mask], Mapping[str, Tensor]]


def imp(
    module: nn.Module,
    train: Train,
    rounds: int = 10,
    prune_fraction: float = 0.2,
    rewind: int | Literal["init", "learning-rate"] = "init",
    directory: str | os.PathLike[str] | None = None,
    *,
    layer_fractions: Mapping[str, float] | None = None,
    scope: Literal["global", "layer"] = "global",
    mask: Mapping[str, Tensor] | None = None,
    score: Score = magnitude,
    seed: int = 0,
    allow_empty: bool = False,
    on_round: Callable[[Round], None] | None = None,
    progress: bool = False,
) -> Tickets:
    """Search a lottery ticket by iterative magnitude pruning.

    Round 0 trains the whole network; each later round prunes a share of what the round before
    kept, by its trained weights, rewinds the rest, and trains again. ``module`` itself is left as
    it is.

    Frankle and Carbin 2019, *The lottery ticket hypothesis* (rewinding to initialisation); Frankle
    et al. 2020, *Linear mode connectivity and the lottery ticket hypothesis* (rewinding to step
    ``k``); Renda et al. 2020, *Comparing rewinding and fine-tuning* (learning-rate rewinding).

    Parameters
    ----------
    module
        The network at its initialisation.
    train
        ``train(module)`` trains in place and returns metrics, which must be plain enough for JSON;
        numbers among them go to the table. It makes its own optimizer. PyTorch, NumPy and Python
        are seeded from ``seed`` and the round before each call.
    rounds
        How often to prune; there is one more training.
    prune_fraction
        Share of the kept weights that a round prunes.
    rewind
        ``"init"``: kept weights go back to where they began. A number ``k``: to where the dense
        network was after step ``k``; ``train`` is then called as ``train(module, 0, k)`` once and
        ``train(module, k, None)`` each round, and trains the steps from its second argument up to
        its third (None: to its end). ``"learning-rate"``: weights stay trained and only the
        training, with its learning rates, starts over.
    directory
        Where to checkpoint every round. Run again with the same arguments after an interruption,
        at whatever moment, and it goes on to bitwise the same result (if ``train`` is
        deterministic); more ``rounds`` may be asked for.
    layer_fractions
        A fraction of its own for some parameters, by name; needs ``scope="layer"``. The output
        layer of LeNet is pruned at half the rate in the original paper.
    scope
        ``"global"`` ranks all weights together, ``"layer"`` each parameter by itself.
    mask
        Where to begin; by default :meth:`jacpot.Mask.ones`.
    score
        From (trained module, mask) to scores; higher stays. ``directory`` tells scores apart by
        their names.
    seed
        Of the training rounds.
    allow_empty
        Whether a parameter may lose its last weight: see :func:`jacpot.tickets.prune`. Unless
        told, the search ends with an error there.
    on_round
        Called with each :class:`Round` when it is done or found done.
    progress
        Show a progress bar.

    Returns
    -------
    Tickets
        Every round's mask, metrics, starting and trained weights.

    Raises
    ------
    TypeError
        If an argument, or what ``train`` returns, is of another type.
    ValueError
        If an argument is out of range, a parameter would lose its last weight, or
        ``directory`` holds a search with other settings.
    BaseException
        Whatever else ends the rounds early, ``KeyboardInterrupt`` and the errors of ``train`` and
        ``score`` among it, comes as it is. Its attribute ``found`` is the :class:`Tickets` of the
        rounds that were finished.

    Examples
    --------
    >>> import torch
    >>> from jacpot import tickets
    >>> x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    >>> def train(net):
    ...     optimizer = torch.optim.Adam(net.parameters(), 0.01)
    ...     for _ in range(20):
    ...         optimizer.zero_grad()
    ...         loss = (net(x) - x[:, :1]).square().mean()
    ...         loss.backward()
    ...         optimizer.step()
    ...     return {"loss": loss.item()}
    >>> found = tickets.imp(torch.nn.Linear(4, 1), train, rounds=2, prune_fraction=0.5)
    >>> [round.mask.nnz for round in found.rounds]
    [4, 2, 1]
    """
    if not callable(train):
        raise TypeError(f"argument 'train' must be callable, got {type(train).__name__}")
    rounds = check_count("rounds", rounds)
    _check(prune_fraction, rewind, layer_fractions, scope)
    first = chosen_mask(module, mask)
    apply(copy_of(module), first)  # what cannot wear it is refused before anything is trained
    for name in layer_fractions or {}:
        if name not in first:
            raise ValueError(f"argument 'layer_fractions': {name!r} is not among {list(first)}")
    settings = {
        "prune_fraction": prune_fraction,
        "layer_fractions": dict(layer_fractions or {}),
        "rewind": rewind,
        "scope": scope,
        "seed": seed,
        "score": _name(score),
        "weights": _digest(module.state_dict()),
        "mask": _digest(first),
    }
    store = None if directory is None else Path(directory)
    if store is not None:
        _claim(store, settings)
    start = _start(module, train, rewind, seed, store)
    found = Tickets(start, [])
    with _kept_by_errors(found):
        for index in track(range(rounds + 1), "rounds", disable=not progress):
            path = None if store is None else store / f"round-{index:03d}.safetensors"
            if path is not None and path.exists():
                done = Round.load(index, path)
            else:
                done = _round(
                    index, found, train, rewind, seed, first, settings, score, allow_empty
                )
                if path is not None:
                    done.save(path)
            found.rounds.append(done)
            if on_round is not None:
                on_round(done)
    return found


@contextmanager
def _kept_by_errors(found: Tickets) -> Iterator[None]:
    """Let what ends a search carry the rounds that are finished, which took hours maybe."""
    try:
        yield
    except BaseException as error:
        error.found = found  # type: ignore[attr-defined]
        if found.rounds and hasattr(error, "add_note"):  # from Python 3.11 on
            error.add_note(
                f"finished rounds: {len(found.rounds)}, in the attribute 'found' of this"
            )
        raise


def _round(
    index: int,
    found: Tickets,
    train: Train,
    rewind: int | str,
    seed: int,
    first: Mask,
    settings: dict[str, Any],
    score: Score,
    allow_empty: bool,
) -> Round:
    network = copy_of(found.start)
    mask = first
    if index > 0:
        last = found.rounds[-1]
        network.load_state_dict(last.state)
        mask = prune(
            score(network, last.mask),
            _next_density(last.mask, settings),
            within=last.mask,
            allow_empty=allow_empty,
        )
        if rewind != "learning-rate":
            network = copy_of(found.start)
    apply(network, mask)
    with seeded(seed, index + 1):
        span = (rewind, None) if isinstance(rewind, int) else ()
        metrics = train(network, *span)
    if not isinstance(metrics, Mapping | None):
        raise TypeError(
            "argument 'train' must return a mapping of metrics or None, got "
            f"{type(metrics).__name__}"
        )
    return Round(index, mask, dict(metrics or {}), bake(network).state_dict())


def _next_density(mask: Mask, settings: dict[str, Any]) -> float | dict[str, float]:
    """Whole numbers to keep, as shares of all weights: prune() rounds them back exactly."""
    fraction, own = settings["prune_fraction"], settings["layer_fractions"]
    if settings["scope"] == "global":
        return float(round((1 - fraction) * mask.nnz) / max(mask.numel, 1))
    return {
        name: round((1 - own.get(name, fraction)) * int(kept.sum())) / max(kept.numel(), 1)
        for name, kept in mask.items()
    }


def _start(
    module: nn.Module, train: Train, rewind: int | str, seed: int, store: Path | None
) -> nn.Module:
    """The network that tickets start from: a copy, which nothing trains after this."""
    start = copy_of(module)
    path = None if store is None else store / "start.safetensors"
    if path is not None and path.exists():
        start.load_state_dict(read_tensors(path)[0])
        return start
    if isinstance(rewind, int) and rewind > 0:
        with seeded(seed, 0):
            train(start, 0, rewind)
        start.zero_grad(set_to_none=True)
    if path is not None:
        write_tensors(path, start.state_dict(), {"format": "jacpot.imp.start"})
    return start


def _claim(store: Path, settings: Mapping[str, Any]) -> None:
    """Make the folder this search's own, or refuse one that belongs to another."""
    store.mkdir(parents=True, exist_ok=True)
    path = store / "settings.json"
    text = json.dumps(settings, indent=2, sort_keys=True)
    if not path.exists():
        write_atomically(path, text.encode())
        return
    theirs = read_json(path)
    if theirs != json.loads(text):
        odd = sorted(key for key in settings if theirs.get(key) != settings[key])
        raise ValueError(
            f"argument 'directory': {store} holds a search with another {', '.join(odd)}; "
            "use another folder or remove it"
        )


def _name(score: Score) -> str:
    kind = score if hasattr(score, "__qualname__") else type(score)
    return f"{kind.__module__}.{kind.__qualname__}"


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(raw.numpy().tobytes())
    return digest.hexdigest()


def _check(
    prune_fraction: float,
    rewind: int | str,
    layer_fractions: Mapping[str, float] | None,
    scope: str,
) -> None:
    own = {f"layer_fractions[{name!r}]": value for name, value in (layer_fractions or {}).items()}
    for name, fraction in {"prune_fraction": prune_fraction, **own}.items():
        if not isinstance(fraction, SupportsFloat):
            raise TypeError(f"argument {name!r} must be a number, got {fraction!r}")
        if not 0 < fraction < 1:
            raise ValueError(f"argument {name!r} must lie in (0, 1), got {fraction}")
    if isinstance(rewind, bool):
        raise TypeError(f"argument 'rewind' must be a name or a step, got {rewind!r}")
    if rewind not in ("init", "learning-rate") and not (isinstance(rewind, int) and rewind >= 0):
        raise ValueError(
            f"argument 'rewind' must be 'init', 'learning-rate' or a step >= 0, got {rewind!r}"
        )
    if scope not in ("global", "layer"):
        raise ValueError(f"argument 'scope' must be 'global' or 'layer', got {scope!r}")
    if layer_fractions and scope != "layer":
        raise ValueError("argument 'layer_fractions' needs scope='layer'")
