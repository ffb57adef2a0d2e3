from __future__ import annotations

import dataclasses

import pytest
import torch

from jacpot.studies import nets
from jacpot.studies.data import load
from jacpot.studies.split import split
from jacpot.studies.training import Recipe, predict, train


@pytest.fixture(scope="module")
def parts():
    return split(load("digits"), 100, 50)


def network(seed=0, widths=(16,), net="mlp"):
    return nets.build(net, (1, 8, 8), 10, widths, seed)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_the_best_weights_are_kept(parts, optimizer):
    model = network()
    recipe = Recipe(optimizer, 1e-2, batch_size=20, patience=3, max_epochs=60)
    seen = []
    result = train(model, parts, recipe, 0, seen.append)
    assert seen == list(range(1, len(result.train_loss) + 1))
    assert result.best_epoch == result.validation_loss.index(min(result.validation_loss))
    kept = parts.loss(predict(model, parts.validation.x), parts.validation)
    assert kept == pytest.approx(min(result.validation_loss), rel=1e-6)
    assert result.train_loss[-1] < result.train_loss[0]


def test_one_seed_fixes_the_training(parts):
    recipe = Recipe(max_epochs=3)
    results = []
    for seed in (0, 0, 1):
        model = network()
        results.append(train(model, parts, recipe, seed).train_loss)
    assert results[0] == results[1]
    assert results[0] != results[2]


def test_the_limit_of_epochs_is_not_convergence(parts):
    assert not train(network(), parts, Recipe(max_epochs=2), 0).converged
    # A step size that is far too small improves nothing after rounding.
    stuck = Recipe(learning_rate=1e-30, patience=1, decays=1, max_epochs=9)
    result = train(network(), parts, stuck, 0)
    assert result.converged
    assert result.best_epoch == 0
    assert len(result.train_loss) == 2


def test_divergence_is_an_error(parts):
    with pytest.raises(RuntimeError, match=r"diverged in epoch 1.*lower the learning rate"):
        train(network(), parts, Recipe("sgd", 1e10), 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer": "lion"}, "optimizer: expected one of adam, sgd"),
        ({"learning_rate": 0.0}, "learning_rate: expected a positive"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"batch_size": 0}, "batch_size: expected at least 1"),
        ({"max_epochs": 0}, "max_epochs"),
    ],
)
def test_recipes_are_checked(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(Recipe(), **change)


def test_networks():
    state = torch.random.get_rng_state()
    first, same, other = network(1), network(1), network(2)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first[1].weight, same[1].weight)
    assert not torch.equal(first[1].weight, other[1].weight)
    assert network(0, (4, 6), "cnn")(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    assert nets.build("cnn", (3, 7, 5), 2, (4,), 0)(torch.zeros(1, 3, 7, 5)).shape == (1, 2)
    assert nets.build("mlp", (5,), 1, (4,), 0)(torch.zeros(3, 5)).shape == (3, 1)
    with pytest.raises(ValueError, match="net: 'cnn' needs pictures"):
        nets.build("cnn", (5,), 1, (4,), 0)
    with pytest.raises(ValueError, match="net: expected one of mlp, cnn"):
        nets.build("rnn", (5,), 1, (4,), 0)
    for widths in ((), (0,), (4, -1)):
        with pytest.raises(ValueError, match="width: expected positive"):
            nets.build("mlp", (5,), 1, widths, 0)
