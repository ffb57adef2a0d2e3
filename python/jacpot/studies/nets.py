"""The two families of networks that the studies start from."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

__all__ = ["build"]

NETS = ("mlp", "cnn")


def build(
    net: str, input_shape: Sequence[int], n_outputs: int, widths: Sequence[int], seed: int
) -> nn.Sequential:
    """Build a randomly initialised ReLU network whose last module is its output layer.

    Parameters
    ----------
    net
        ``"mlp"``: a hidden layer for each width. ``"cnn"``: a 3x3 convolution of stride 2 for each
        width (channels), then a linear layer.
    input_shape
        Shape of one example, ``(D,)`` or ``(C, H, W)``.
    n_outputs
        Outputs of the network.
    widths
        Units or channels of the hidden layers.
    seed
        Draws the parameters, by PyTorch's own initialisation. The global generator is left as it
        was.

    Returns
    -------
    torch.nn.Sequential
        float32, on the CPU.

    Raises
    ------
    ValueError
        If ``net`` is neither, a width is not positive, or a CNN is asked for without pictures.

    Examples
    --------
    >>> from jacpot.studies import nets
    >>> network = nets.build("mlp", (1, 8, 8), 10, (32,), seed=0)
    >>> sum(p.numel() for p in network.parameters())
    2410
    """
    if not widths or any(width < 1 for width in widths):
        raise ValueError(f"width: expected positive widths, got {list(widths)}")
    if net not in NETS:
        raise ValueError(f"net: expected one of {', '.join(NETS)}, got {net!r}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if net == "mlp":
            return _mlp(input_shape, n_outputs, widths)
        if len(input_shape) != 3:
            raise ValueError(
                f"net: 'cnn' needs pictures of shape (channels, height, width), "
                f"got examples of shape {tuple(input_shape)}"
            )
        return _cnn(input_shape, n_outputs, widths)


def _mlp(input_shape: Sequence[int], n_outputs: int, widths: Sequence[int]) -> nn.Sequential:
    n_inputs = torch.Size(input_shape).numel()
    layers: list[nn.Module] = [nn.Flatten()] if len(input_shape) > 1 else []
    for before, after in pairwise([n_inputs, *widths]):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], n_outputs))


def _cnn(input_shape: Sequence[int], n_outputs: int, widths: Sequence[int]) -> nn.Sequential:
    channels, height, width = input_shape
    layers: list[nn.Module] = []
    for before, after in pairwise([channels, *widths]):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.ReLU()]
        height, width = (height + 1) // 2, (width + 1) // 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(widths[-1] * height * width, n_outputs))
