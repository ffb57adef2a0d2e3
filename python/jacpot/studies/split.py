"""From arrays to what a model fits: training, validation and test sets, standardised."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from jacpot.studies.data import Dataset

__all__ = ["Part", "Split", "split"]

VALIDATION_SHARE = 0.15


@dataclass(frozen=True)
class Part:
    """Examples of one purpose.

    Attributes
    ----------
    x
        Standardised inputs, ``(N, D)`` or ``(N, C, H, W)``.
    targets
        ``(N, K)``: one-hot minus ``1/K`` for classes (so that predicting nothing is predicting
        the uniform distribution), standardised targets for regression.
    labels
        ``(N,)`` class indices; None for regression.
    """

    x: Tensor
    targets: Tensor
    labels: Tensor | None

    def __len__(self) -> int:
        return len(self.x)


@dataclass(frozen=True)
class Split:
    """Training, validation and test sets on one device, and what undoes the scaling of targets.

    Attributes
    ----------
    train, validation, test
        The three parts. Choices (ridge, when to stop) look at ``validation``; ``test`` is for
        the report alone.
    classes
        Number of classes; None for regression.
    target_scale
        ``(K,)``: standard deviation of each regression target, ones for classes.
    """

    train: Part
    validation: Part
    test: Part
    classes: int | None
    target_scale: Tensor

    @property
    def n_outputs(self) -> int:
        """Outputs a network for these data has."""
        return self.train.targets.shape[1]

    def loss(self, outputs: Tensor, part: Part) -> float:
        """Mean over examples of half the squared distance to the targets."""
        return float((outputs - part.targets).double().square().sum(1).mean() / 2)

    def error(self, outputs: Tensor, part: Part) -> float:
        """Share of wrong classes, or the root-mean-square error in the data's own units."""
        if part.labels is not None:
            return float((outputs.argmax(1) != part.labels).double().mean())
        residual = (outputs - part.targets).double() * self.target_scale.double()
        return float(residual.square().mean().sqrt())


def split(
    dataset: Dataset,
    train_size: int | None = None,
    test_size: int | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> Split:
    """Split off a validation set and standardise, with statistics of the training examples only.

    Parameters
    ----------
    dataset
        What `load` returns.
    train_size
        Training examples to use; by default all but the 15% kept for validation. The validation
        set is drawn from the remaining ones, 15% as many as there are for both.
    test_size
        Test examples to use, the first ones; all by default.
    seed
        Draws training and validation examples.
    device
        Where the tensors go.

    Returns
    -------
    Split
        float32 tensors. Pictures are standardised by one mean and deviation a channel, tables and
        regression targets by one a column.

    Raises
    ------
    ValueError
        If a size is not positive or more than there is.

    Examples
    --------
    >>> from jacpot.studies import data
    >>> from jacpot.studies.split import split
    >>> parts = split(data.load("digits"), train_size=500)
    >>> len(parts.train), len(parts.validation), parts.train.targets.shape
    (500, 89, torch.Size([500, 10]))
    """
    pool = len(dataset.x_train)
    largest = pool - math.ceil(VALIDATION_SHARE * pool)
    n_train = largest if train_size is None else train_size
    if not 1 <= n_train <= largest:
        raise ValueError(
            f"train_size: expected 1 to {largest} ({dataset.name} has {pool} training examples, "
            f"of which 15% are for validation), got {n_train}"
        )
    n_validation = pool - n_train
    if train_size is not None:
        share = math.ceil(n_train * VALIDATION_SHARE / (1 - VALIDATION_SHARE))
        n_validation = min(n_validation, share)
    n_test = len(dataset.x_test) if test_size is None else test_size
    if not 1 <= n_test <= len(dataset.x_test):
        raise ValueError(
            f"test_size: expected 1 to {len(dataset.x_test)}, the test examples of "
            f"{dataset.name}, got {n_test}"
        )
    order = np.random.default_rng(seed).permutation(pool)
    train, validation = np.split(order[: n_train + n_validation], [n_train])

    def inputs(rows: NDArray[Any]) -> Tensor:
        # Pictures are bytes: float32 holds them, and half the memory counts. A column of a table
        # may vary in its last digits only.
        return torch.from_numpy(rows.astype(np.float32 if dataset.is_image else np.float64))

    def targets(rows: NDArray[Any]) -> Tensor:
        if dataset.classes is None:
            return torch.from_numpy(rows)
        one_hot = torch.nn.functional.one_hot(torch.from_numpy(rows), dataset.classes)
        return one_hot.double() - 1 / dataset.classes

    def part(x: NDArray[Any], y: NDArray[Any]) -> Part:
        return Part(
            ((inputs(x) - x_mean) / x_scale).float().to(device),
            ((targets(y) - y_mean) / y_scale).float().to(device),
            None if dataset.classes is None else torch.from_numpy(y).to(device),
        )

    x_mean, x_scale = _moments(
        inputs(dataset.x_train[train]), (0, 2, 3) if dataset.is_image else (0,)
    )
    y_mean, y_scale = torch.zeros(()), torch.ones(1, dataset.classes or 1)
    if dataset.classes is None:
        y_mean, y_scale = _moments(targets(dataset.y_train[train]), (0,))
    return Split(
        train=part(dataset.x_train[train], dataset.y_train[train]),
        validation=part(dataset.x_train[validation], dataset.y_train[validation]),
        test=part(dataset.x_test[:n_test], dataset.y_test[:n_test]),
        classes=dataset.classes,
        target_scale=y_scale[0].float().to(device),
    )


def _moments(x: Tensor, axes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Mean and deviation over ``axes``, kept as axes of length 1; constants get deviation 1."""
    scale, mean = torch.std_mean(x, dim=axes, correction=0, keepdim=True)
    # Rounding leaves a constant column with a deviation of a few ulps of its mean.
    constant = scale <= 8 * torch.finfo(x.dtype).eps * mean.abs()
    return mean, torch.where(constant, torch.ones_like(scale), scale)
