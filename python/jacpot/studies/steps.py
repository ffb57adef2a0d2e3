"""Gradient training by a fixed number of steps, and the step at which it should have stopped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from jacpot.studies.split import Part, Split

__all__ = ["Steps", "accuracy", "train_steps"]

# Validation examples looked at along the way; enough for the minimum of a curve.
WATCHED = 5000


@dataclass(frozen=True)
class Steps:
    """How a network is trained.

    Attributes
    ----------
    steps
        Gradient steps.
    learning_rate
        Of Adam, constant.
    batch_size
        Examples in a step.
    check_every
        Steps between looks at the validation loss.
    """

    steps: int = 5000
    learning_rate: float = 1.2e-3
    batch_size: int = 60
    check_every: int = 100

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "check_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate: expected a positive number, got {self.learning_rate}")


def _loss(outputs: Tensor, part: Part, rows: Tensor | slice) -> Tensor:
    if part.labels is not None:
        return cross_entropy(outputs, part.labels[rows])
    return mse_loss(outputs, part.targets[rows])


@torch.no_grad()
def _outputs(module: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([module(piece) for piece in torch.split(x, 2500)])


def accuracy(module: nn.Module, parts: Split, part: Part) -> float:
    """Share of right classes; for regression, the explained share of the variance."""
    module.eval()
    outputs = _outputs(module, part.x)
    if part.labels is not None:
        return 1 - parts.error(outputs, part)
    residual = (outputs - part.targets).double().square().mean()
    return float(1 - residual / part.targets.double().var(correction=0))


def train_steps(
    module: nn.Module, parts: Split, recipe: Steps, start: int = 0, stop: int | None = None
) -> dict[str, Any]:
    """Train in place with Adam, from step ``start`` to ``stop``, and say how it went.

    Data stay one tensor and batches are taken by index. The order of examples comes from PyTorch's
    global generator.

    Returns
    -------
    dict
        ``accuracy`` on the test set after the last step; ``early_stop``, the step of the lowest
        validation loss, and ``early_stop_accuracy``, on the test set there; ``train_loss``, the
        mean over the last hundred steps.

    Raises
    ------
    RuntimeError
        If the loss is not finite.
    """
    last = recipe.steps if stop is None else stop
    trainable = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trainable, lr=recipe.learning_rate, fused=True)
    x, count = parts.train.x, len(parts.train)
    size = min(recipe.batch_size, count)
    order = torch.empty(0, dtype=torch.int64, device="cpu")
    best = (float("inf"), start, 0.0)
    tail = torch.zeros((), device=x.device)
    for step in range(start + 1, last + 1):
        module.train()
        if len(order) < size:
            order = torch.randperm(count, device="cpu")
        rows, order = order[:size].to(x.device), order[size:]
        loss = _loss(module(x[rows]), parts.train, rows)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if step > last - 100:
            tail += loss.detach()
        if step % recipe.check_every == 0 or step == last:
            module.eval()
            watched = slice(0, WATCHED)
            value = float(
                _loss(_outputs(module, parts.validation.x[watched]), parts.validation, watched)
            )
            if not value < float("inf"):
                raise RuntimeError(
                    f"training diverged before step {step}: the validation loss is {value}; "
                    f"lower the learning rate ({recipe.learning_rate:g})"
                )
            if value < best[0]:
                best = (value, step, accuracy(module, parts, parts.test))
    return {
        "accuracy": accuracy(module, parts, parts.test),
        "early_stop": best[1],
        "early_stop_accuracy": best[2],
        "train_loss": float(tail) / max(min(100, last - start), 1),
    }
