"""Sparse products under `torch.vmap`."""

import torch


def assert_maps(f, x, values, bias):
    """``f(x, values, bias)`` maps over either factor, and has gradients per example."""
    many = torch.randn(4, *x.shape, dtype=x.dtype).to(x.device)
    expected = torch.stack([f(one, values, bias) for one in many])
    torch.testing.assert_close(torch.vmap(f, (0, None, None))(many, values, bias), expected)
    other = torch.randn(4, *values.shape, dtype=x.dtype).to(x.device)
    expected = torch.stack([f(x, one, bias) for one in other])
    torch.testing.assert_close(torch.vmap(f, (None, 0, None))(x, other, bias), expected)
    per_example = torch.vmap(
        torch.func.grad(lambda v, one: f(one[None], v, bias).square().sum()), (None, 0)
    )(values, x)
    for i, one in enumerate(x):
        v = values.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(f(one[None], v, bias).square().sum(), v)
        torch.testing.assert_close(per_example[i], gradient)
