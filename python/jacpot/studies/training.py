"""Gradient training to convergence, judged by the validation loss."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from jacpot.studies.split import Split

__all__ = ["OPTIMIZERS", "Recipe", "Training", "predict", "train"]

OPTIMIZERS = ("adam", "sgd")


@dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    Attributes
    ----------
    optimizer
        ``"adam"``, or ``"sgd"`` (momentum 0.9).
    learning_rate
        Step size at the start.
    batch_size
        Examples in a step.
    patience
        Epochs without a better validation loss after which training returns to its best weights
        and goes on with a fifth of the step size, or ends.
    decays
        How many times it does go on.
    max_epochs
        It ends there in any case, and says that it was not at convergence.
    """

    optimizer: str = "adam"
    learning_rate: float = 1e-3
    batch_size: int = 64
    patience: int = 10
    decays: int = 2
    max_epochs: int = 300

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(
                f"optimizer: expected one of {', '.join(OPTIMIZERS)}, got {self.optimizer!r}"
            )
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate: expected a positive number, got {self.learning_rate}")
        for name in ("batch_size", "patience", "max_epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Training:
    """What `train` did.

    Attributes
    ----------
    converged
        Whether the validation loss stopped improving before the limit of epochs.
    best_epoch
        Epoch whose weights the network has now; 0 is the initialisation.
    train_loss, validation_loss
        One value an epoch; the first of ``validation_loss`` is that of the initialisation.
        ``train_loss`` is the mean over an epoch's batches, each before its step.
    seconds
        Wall time.
    """

    converged: bool
    best_epoch: int
    train_loss: list[float]
    validation_loss: list[float]
    seconds: float


def train(
    network: nn.Module,
    parts: Split,
    recipe: Recipe,
    seed: int,
    on_epoch: Callable[[int], None] = lambda epoch: None,
) -> Training:
    """Minimise the squared loss by gradient steps; keep the weights of the best validation loss.

    Parameters
    ----------
    network
        Trained in place.
    parts
        Training and validation sets; the test set is not looked at.
    recipe
        Optimizer, step size, when to stop.
    seed
        Draws the order of the examples.
    on_epoch
        Called with the number of each finished epoch.

    Returns
    -------
    Training

    Raises
    ------
    RuntimeError
        If the training loss is not finite.
    """
    start = time.perf_counter()
    x, targets = parts.train.x, parts.train.targets
    order = torch.Generator().manual_seed(seed)
    optimizer = _optimizer(network, recipe, recipe.learning_rate)
    best_loss = parts.loss(predict(network, parts.validation.x), parts.validation)
    best, best_epoch, decays, stale = _snapshot(network), 0, 0, 0
    train_loss: list[float] = []
    validation_loss = [best_loss]
    for epoch in range(1, recipe.max_epochs + 1):
        total = torch.zeros((), device=x.device)
        permutation = torch.randperm(len(x), generator=order, device="cpu").to(x.device)
        for rows in torch.split(permutation, recipe.batch_size):
            loss = (network(x[rows]) - targets[rows]).square().sum() / 2
            optimizer.zero_grad()
            (loss / len(rows)).backward()
            optimizer.step()
            total += loss.detach()
        train_loss.append(float(total) / len(x))
        if not train_loss[-1] < float("inf"):
            raise RuntimeError(
                f"training diverged in epoch {epoch}: the loss is {train_loss[-1]}; "
                f"lower the learning rate ({recipe.learning_rate:g})"
            )
        validation_loss.append(parts.loss(predict(network, parts.validation.x), parts.validation))
        on_epoch(epoch)
        stale += 1
        if validation_loss[-1] < best_loss:
            best_loss, best, best_epoch, stale = validation_loss[-1], _snapshot(network), epoch, 0
        if stale >= recipe.patience:
            network.load_state_dict(best)
            if decays == recipe.decays:
                break
            decays, stale = decays + 1, 0
            optimizer = _optimizer(network, recipe, recipe.learning_rate / 5**decays)
    converged = stale >= recipe.patience
    network.load_state_dict(best)
    return Training(converged, best_epoch, train_loss, validation_loss, time.perf_counter() - start)


@torch.no_grad()
def predict(function: Callable[[Tensor], Tensor], x: Tensor, batch_size: int = 2048) -> Tensor:
    """Evaluate a network, or anything that maps inputs to outputs ``(N, K)``, by batches."""
    return torch.cat([function(part).detach() for part in torch.split(x, batch_size)])


def _optimizer(network: nn.Module, recipe: Recipe, rate: float) -> torch.optim.Optimizer:
    if recipe.optimizer == "adam":
        return torch.optim.Adam(network.parameters(), lr=rate, fused=True)
    return torch.optim.SGD(network.parameters(), lr=rate, momentum=0.9)


def _snapshot(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}
