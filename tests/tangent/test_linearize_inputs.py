"""Linearized modules of several inputs or outputs, of other modes, and what they refuse."""

from concurrent.futures import ThreadPoolExecutor

import numpy
import pytest
import torch
from torch import nn

import jacpot


def examples(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


class Pair(nn.Module):
    """Takes two inputs by name, gives a dict of tensors with several axes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right = nn.Linear(4, 6).double(), nn.Linear(3, 6).double()

    def forward(self, a, b):
        sums = torch.tanh(self.left(a)) + self.right(b)
        return {"sums": sums.view(-1, 2, 3), "other": a}


A, B, Y = examples(7, 4), examples(7, 3, seed=1), examples(7, 2, 3, seed=2)


@pytest.mark.parametrize("x", [{"a": A, "b": B}, (A, B)], ids=["dict", "tuple"])
@pytest.mark.parametrize("options", [{}, {"weights": torch.arange(1.0, 8)}, {"batch_size": 3}])
def test_several_inputs_and_a_part_of_the_outputs(x, options):
    net = Pair()
    lin = jacpot.linearize(net, output="sums")
    torch.testing.assert_close(lin(x), net(A, B)["sums"])
    fit = lin.fit(x, Y, ridge=0.1, **options)
    flat = jacpot.linearize(net, output=lambda result: result["sums"].flatten(1))
    expected = flat.fit(x, Y.flatten(1), ridge=0.1, **options)
    torch.testing.assert_close(fit.x, expected.x, rtol=1e-4, atol=1e-6)
    assert lin(x).shape == Y.shape
    if not options:
        assert fit.influence(x).shape == (7, 6, 7)
        assert fit.posterior() is not None
        lin.fit(x, Y, ridge="validation", validation=(x, Y))


def test_gauss_newton_with_several_inputs_and_a_part_of_the_outputs():
    for batch_size in (None, 5):
        net = Pair()
        x = {"a": A, "b": B}
        result = jacpot.gauss_newton(net, x, Y, output="sums", max_steps=3, batch_size=batch_size)
        assert result.losses[-1] < result.losses[0]


def test_targets_of_another_shape_are_refused():
    lin = jacpot.linearize(Pair(), output="sums")
    with pytest.raises(ValueError, match=r"'y' must have shape \(7, 2, 3\) .* got \(7, 3, 2\)"):
        lin.fit((A, B), Y.mT)


def test_a_dict_of_outputs_names_the_cure():
    lin = jacpot.linearize(Pair())
    with pytest.raises(TypeError, match="output="):
        lin((A, B))
    with pytest.raises(TypeError, match="output="):
        lin.fit((A, B), Y)


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(4), nn.Dropout(0.5)])
def test_training_mode_is_refused_with_a_cure_that_works(layer):
    net = nn.Sequential(layer, nn.Linear(4, 2)).train()
    with pytest.raises(ValueError, match=r"call module\.eval\(\) first"):
        jacpot.linearize(net)
    x = torch.randn(5, 4)
    lin = jacpot.linearize(net.eval())
    lin.train()
    assert torch.equal(lin(x), lin(x))
    assert lin.fit(x, torch.randn(5, 2), ridge=0.1).converged


def test_in_inference_mode():
    x, y = examples(6, 4), examples(6, 2)
    with torch.inference_mode():
        net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
        J = jacpot.jacobian(net, x)
        lin = jacpot.linearize(net)
        assert lin.fit(x, y, ridge=0.1).converged
        inside = lin(x)
    torch.testing.assert_close(lin(x), inside)
    torch.testing.assert_close(jacpot.jacobian(net, x).dense(), J.dense())


def test_data_parallel_names_the_cure():
    net = nn.DataParallel(nn.Linear(4, 2))
    for call in (jacpot.linearize, lambda m: jacpot.jacobian(m, torch.randn(3, 4))):
        with pytest.raises(ValueError, match=r"no DataParallel.*\.module"):
            call(net)


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        ([1], "mapping from parameter names to bool tensors, got list"),
        ({"weight": None}, "NoneType.* for 'weight'"),
        ({"weight": numpy.ones((2, 4), bool)}, r"ndarray.* for 'weight'"),
        ({"weight": torch.ones(2, 4)}, r"torch\.float32 for 'weight'"),
    ],
)
def test_masks_of_another_type_are_refused(mask, words):
    for call in (jacpot.linearize, lambda m, mask: jacpot.jacobian(m, torch.ones(1, 4), mask)):
        with pytest.raises(TypeError, match=words):
            call(nn.Linear(4, 2), mask=mask)


def test_a_displacement_of_another_shape_is_refused():
    lin = jacpot.linearize(nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"'delta' must have shape \(2, 4\) for 'weight'"):
        lin.set_delta({"weight": torch.ones(4)})


def test_numpy_vectors_are_refused():
    J = jacpot.jacobian(nn.Linear(4, 2), torch.randn(3, 4))
    with pytest.raises(TypeError, match=r"'v' must be a torch\.Tensor, got numpy\.ndarray"):
        J @ numpy.ones(10)
    with pytest.raises(TypeError, match=r"'u' must be a torch\.Tensor, got numpy\.ndarray"):
        J.T @ numpy.ones(6)


def test_threads_evaluate_in_turns():
    lin = jacpot.linearize(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).double())
    parts = examples(32, 9, 4).unbind()
    expected = [lin(x) for x in parts]
    with ThreadPoolExecutor(4) as pool:
        for one, other in zip(pool.map(lin, parts), expected, strict=True):
            assert torch.equal(one, other)
