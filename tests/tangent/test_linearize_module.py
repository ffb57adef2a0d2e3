"""The linearized network as any other module: trained, copied, saved, moved, compiled."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import jacpot

MASK = {"0.weight": torch.rand(16, 5, generator=torch.Generator().manual_seed(0)) < 0.7}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 3)).double()


def examples(n=12):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 5, generator=generator, dtype=torch.float64)
    return x, torch.randn(n, 3, generator=generator, dtype=torch.float64)


@pytest.fixture
def fitted():
    lin = jacpot.linearize(network(), MASK)
    lin.fit(*examples(), ridge=0.1)
    return lin


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, 0.1),
    "lbfgs": torch.optim.LBFGS,
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("compiled", [False, True])
def test_optimizers_train_what_is_kept_and_nothing_else(optimizer, compiled):
    x, y = examples()
    lin = jacpot.linearize(network(), MASK)
    model = torch.compile(lin, backend="eager") if compiled else lin
    stepper = optimizer(lin.parameters())

    def closure():
        stepper.zero_grad()
        loss = 0.5 * (model(x) - y).square().sum()
        loss.backward()
        return loss

    first = closure().item()
    for _ in range(60):
        stepper.step(closure)
    assert closure().item() < 0.3 * first
    assert not lin.delta["0.weight"][~MASK["0.weight"]].any()
    for name, p in lin.base.named_parameters():
        kept = MASK.get(name, torch.ones_like(p, dtype=torch.bool))
        assert torch.equal(p, network().get_parameter(name) * kept)


@pytest.mark.parametrize(
    "again",
    [copy.deepcopy, lambda lin: pickle.loads(pickle.dumps(lin))],
    ids=["deepcopy", "pickle"],
)
def test_copies_are_the_same_function_and_independent(fitted, again):
    x, y = examples()
    expected, other = fitted(x).detach(), again(fitted)
    assert torch.equal(other(x), expected)
    other.fit(x, -y, ridge=0.1)
    with torch.no_grad():
        other.base[0].weight.zero_()
    assert torch.equal(fitted(x), expected)


def test_moves_to_another_precision_with_its_expansion_point_and_mask(fitted):
    x, y = examples()
    expected = fitted(x).detach()
    fitted.to(torch.float32)
    assert fitted(x.float()).dtype == torch.float32
    torch.testing.assert_close(fitted(x.float()).double(), expected, rtol=1e-4, atol=1e-5)
    assert fitted.mask["0.weight"].dtype == torch.bool
    assert fitted.fit(x.float(), y.float(), ridge=0.1).converged
    with pytest.raises(TypeError, match="float32 or all be float64"):
        fitted.half().fit(x.half(), y.half(), ridge=0.1)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles(fitted, backend):
    x, _ = examples()
    compiled = torch.compile(fitted, backend=backend)
    torch.testing.assert_close(compiled(x), fitted(x))
    before = fitted(x).detach()
    fitted.set_delta({})
    torch.testing.assert_close(compiled(x), fitted(x))
    assert not torch.equal(fitted(x), before)


@pytest.mark.parametrize("recording", [True, False])
def test_attention_whose_fast_kernel_has_no_forward_mode(recording):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 16, dropout=0.0, batch_first=True).eval()
    x = torch.randn(3, 7, 16)
    lin = jacpot.linearize(layer)
    with torch.set_grad_enabled(recording):
        torch.testing.assert_close(lin(x), layer(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("bad", "error"), [({"2.bias": [1.0]}, TypeError), ({"2.bias": torch.ones(2)}, ValueError)]
)
def test_a_refused_displacement_changes_nothing(fitted, bad, error):
    x, _ = examples()
    expected = fitted(x).detach()
    with pytest.raises(error, match="delta"):
        fitted.set_delta({"0.bias": torch.ones(16), **bad})
    with pytest.raises(KeyError, match="delta"):
        fitted.set_delta({"0.bias": torch.ones(16), "bias": torch.ones(16)})
    assert torch.equal(fitted(x), expected)


def test_a_refused_state_changes_nothing(fitted):
    x, _ = examples()
    expected = fitted(x).detach()
    state = jacpot.linearize(nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 4))).double()
    with pytest.raises((RuntimeError, ValueError)):
        fitted.load_state_dict(state.state_dict())
    assert torch.equal(fitted(x), expected)


def test_a_fit_that_fails_changes_nothing(fitted):
    x, y = examples()
    expected = fitted(x).detach()

    def callback(*_):
        raise RuntimeError("enough")

    for loss in ("mse", "huber"):
        with pytest.raises(RuntimeError, match="enough"):
            fitted.fit(x, 3 * y, loss, ridge=0.1, callback=callback, preconditioner=None)
        with pytest.raises(ValueError, match="'y'"):
            fitted.fit(x, y[1:], loss, ridge=0.1)
    assert torch.equal(fitted(x), expected)


@pytest.mark.parametrize("loss", ["mse", "huber"])
def test_a_fit_in_batches_holds_no_factors_of_all_examples(loss):
    x, y = examples()
    weights = torch.arange(12.0)
    whole, parts = jacpot.linearize(network()), jacpot.linearize(network())
    options = {"ridge": 0.1, "weights": weights, "tol": 1e-10, "method": "dual"}
    expected = whole.fit(x, y, loss, **options)
    found = parts.fit(x, y, loss, batch_size=5, **options)
    assert found.problem.columns.n_examples == 1
    torch.testing.assert_close(found.x, expected.x, rtol=1e-6, atol=1e-8)
    if loss == "mse":
        torch.testing.assert_close(found.leave_one_out(), expected.leave_one_out())
