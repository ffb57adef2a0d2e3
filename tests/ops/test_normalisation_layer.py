"""Batch normalisation by running statistics, and its way back, against torch's own."""

import pytest
import torch
import torch.nn.functional as F

from jacpot.ops.normalisation_layer import batch_norm


def statistics(dtype):
    return torch.randn(3, dtype=dtype), torch.rand(3, dtype=dtype) + 0.1


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5), (2, 3, 4, 5), (2, 3, 2, 3, 2), (0, 3, 2)])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_batch_norm_is_differentiated_as_torchs(shape, affine, dtype):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    mean, var = statistics(dtype)
    weight, bias = (
        (torch.randn(3, dtype=dtype), torch.randn(3, dtype=dtype)) if affine else 2 * [None]
    )
    results = []
    cotangents = torch.randn(4, *shape, dtype=dtype)
    for function in (batch_norm, F.batch_norm):
        y = function(x, mean, var, weight, bias, eps=1e-3)
        (one,) = torch.autograd.grad(y, x, cotangents[0], retain_graph=True)
        back = torch.func.vmap(lambda c, y=y: torch.autograd.grad(y, x, c, retain_graph=True)[0])
        results.append((y, one, back(cotangents)))
    assert type(results[0][0].grad_fn) is not type(results[1][0].grad_fn)
    for ours, torchs in zip(*results, strict=True):
        torch.testing.assert_close(
            ours, torchs, rtol=1e-5 if dtype == torch.float32 else 1e-13, atol=0
        )


def test_batch_norm_leaves_other_calls_to_torch():
    x = torch.randn(4, 3, requires_grad=True)
    mean, var = statistics(torch.float32)
    weight = torch.randn(3, requires_grad=True)
    for options in ({"training": True}, {"weight": weight}):
        ours = batch_norm(x, mean.clone(), var.clone(), **options)
        torchs = F.batch_norm(x, mean.clone(), var.clone(), **options)
        assert torch.equal(ours, torchs)
        assert type(ours.grad_fn) is type(torchs.grad_fn)
    with torch.no_grad():
        assert torch.equal(batch_norm(x, mean, var), F.batch_norm(x, mean, var))
