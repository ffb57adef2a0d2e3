from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

import jacpot
from jacpot.studies import compare, contenders, measures, nets
from jacpot.studies.compare_figure import draw
from jacpot.studies.compare_table import notes
from jacpot.studies.contenders import CONTENDERS
from jacpot.studies.data import from_arrays, load
from jacpot.studies.record import Record
from jacpot.studies.split import split
from jacpot.studies.training import Recipe, predict

RIDGES = (1.0, 0.1, 0.01)
QUICK = compare.Settings(
    widths=(12,),
    ridges=RIDGES,
    train_size=60,
    test_size=40,
    recipe=Recipe(learning_rate=1e-2, patience=2, decays=0, max_epochs=30),
)


@pytest.fixture(scope="module")
def digits():
    return load("digits")


@pytest.fixture(scope="module")
def parts(digits):
    return split(digits, 60, 40)


def network(seed=0):
    return nets.build("mlp", (1, 8, 8), 10, (12,), seed)


def dense_jacobian(module, x):
    """Jacobian (N*K, P) by torch.func, in float64, and the names and shapes of its columns."""
    module, x = copy.deepcopy(module).double(), x.double()
    parameters = {name: p.detach() for name, p in module.named_parameters()}

    def outputs(values):
        return torch.func.functional_call(module, values, (x,))

    blocks = torch.func.jacrev(outputs)(parameters)
    rows = torch.cat([block.flatten(2) for block in blocks.values()], 2).flatten(0, 1)
    return rows, outputs(parameters)


def test_the_tangent_fit_is_the_ridge_solution(parts):
    fitted = contenders.tangent(network(), parts, (0.1,), tol=1e-6)
    rows, start = dense_jacobian(network(), parts.train.x)
    kernel = rows @ rows.T
    ridge = 0.1 * kernel.diagonal().mean()
    assert fitted.details["ridge_absolute"] == pytest.approx(float(ridge), rel=1e-4)
    residual = (parts.train.targets - start).flatten()
    dual = torch.linalg.solve(kernel + ridge * torch.eye(len(kernel)), residual)
    test_rows, test_start = dense_jacobian(network(), parts.test.x)
    expected = test_start + (test_rows @ (rows.T @ dual)).reshape(test_start.shape)
    torch.testing.assert_close(
        predict(fitted.function, parts.test.x).double(), expected, atol=1e-4, rtol=1e-3
    )
    delta = torch.cat([part.flatten() for part in fitted.displacement.values()]).double()
    torch.testing.assert_close(delta, rows.T @ dual, atol=1e-4, rtol=1e-3)


def test_the_ridge_is_chosen_on_the_validation_set(parts):
    fitted = contenders.tangent(network(), parts, RIDGES)
    path = fitted.details["path"]
    assert [entry["ridge"] for entry in path] == sorted(RIDGES, reverse=True)[: len(path)]
    best = min(path, key=lambda entry: entry["validation_loss"])
    assert fitted.details["ridge"] == best["ridge"]
    kept = parts.loss(predict(fitted.function, parts.validation.x), parts.validation)
    assert kept == pytest.approx(best["validation_loss"], rel=1e-6)
    assert all(entry["converged"] for entry in path)


def test_the_last_layer_is_the_ridge_solution(parts):
    start = network()
    before = {name: value.clone() for name, value in start.state_dict().items()}
    fitted = contenders.last_layer(start, parts, (0.01,))
    assert all(torch.equal(value, before[name]) for name, value in start.state_dict().items())
    assert set(fitted.displacement) == {"3.weight", "3.bias"}
    rows, outputs = dense_jacobian(start, parts.train.x)
    rows = rows[:, -(12 * 10 + 10) :]
    ridge = 0.01 * (rows @ rows.T).diagonal().mean()
    normal = rows.T @ rows + ridge * torch.eye(rows.shape[1])
    expected = torch.linalg.solve(normal, rows.T @ (parts.train.targets - outputs).flatten())
    delta = torch.cat([fitted.displacement[n].flatten() for n in ("3.weight", "3.bias")])
    torch.testing.assert_close(delta.double(), expected, atol=1e-5, rtol=1e-4)


def test_without_a_ridge_the_last_layer_has_least_norm(parts):
    few = split(load("digits"), 8, 8)
    fitted = contenders.last_layer(network(), few, (0.0,))
    assert few.loss(predict(fitted.function, few.train.x), few.train) < 1e-8
    assert torch.isfinite(fitted.displacement["3.weight"]).all()


def test_one_step_moves_a_copy(parts):
    start = network()
    tangent = contenders.tangent(start, parts, (1.0,))
    moved = contenders.one_step(start, tangent)
    for name, value in moved.function.named_parameters():
        before = start.get_parameter(name)
        torch.testing.assert_close(value, before + tangent.displacement[name].reshape(value.shape))


def test_numbers_of_a_seed(parts):
    numbers, outputs = compare.run_seed(QUICK, parts, 3)
    assert set(numbers["contenders"]) == set(outputs) == set(CONTENDERS)
    for key, row in numbers["contenders"].items():
        values = torch.from_numpy(outputs[key])
        assert row["test_error"] == parts.error(values, parts.test)
        assert row["seconds"] > 0
        assert row["relative_displacement"] > 0
    between = numbers["tangent_to_network"]
    assert 0 <= between["agreement"] <= 1
    assert 0 <= between["kernel_change"] <= 1
    assert 0 < between["angle"] < 180
    tangent, trained = (torch.from_numpy(outputs[key]) for key in ("tangent", "network"))
    assert between["distance"] == measures.distance(tangent, trained)


def test_one_seed_fixes_everything(parts):
    (first, before), (second, after) = (compare.run_seed(QUICK, parts, 3) for _ in range(2))
    for key in ("network", "last_layer"):
        np.testing.assert_array_equal(before[key], after[key])
    # Which preconditioner pays is estimated from measured times: equal to the tolerance only.
    for key in ("tangent", "one_step"):
        np.testing.assert_allclose(before[key], after[key], atol=1e-2)
    for name, value in first["tangent_to_network"].items():
        assert second["tangent_to_network"][name] == pytest.approx(value, rel=1e-2, abs=0.03)


def test_the_test_set_chooses_nothing(digits, parts):
    """Other test examples leave every fitted function, so its training error, as it is."""
    other = split(digits, 60, 20)
    first, _ = compare.run_seed(QUICK, parts, 0)
    second, _ = compare.run_seed(QUICK, other, 0)
    for key in CONTENDERS:
        ours, theirs = first["contenders"][key], second["contenders"][key]
        for name in ("train_loss", "relative_displacement"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-2)


def test_summary(tmp_path, digits, parts):
    record = Record(tmp_path, "compare", compare.settings_record(QUICK, digits), {})
    compare.run(record, QUICK, parts, range(2))
    summary = record.result["summary"]
    errors = [record.runs[seed]["contenders"]["tangent"]["test_error"] for seed in (0, 1)]
    stat = summary["contenders"]["tangent"]["test_error"]
    assert stat["mean"] == pytest.approx(np.mean(errors))
    assert stat["std"] == pytest.approx(np.std(errors, ddof=1))
    first, second = (torch.from_numpy(record.arrays(seed)["network"]) for seed in (0, 1))
    assert summary["distances"]["network/network"] == pytest.approx(
        measures.distance(first, second)
    )
    assert summary["distances"]["tangent/network"] == pytest.approx(
        summary["tangent_to_network"]["distance"]["mean"]
    )


@pytest.mark.parametrize("kind", ["regression", "cnn"])
def test_other_data_and_networks(tmp_path, digits, kind):
    if kind == "cnn":
        dataset = digits
        settings = compare.Settings("cnn", (4,), (0.1,), 40, 30, recipe=QUICK.recipe)
    else:
        x = np.random.default_rng(0).normal(size=(80, 3))
        dataset = from_arrays("toy", {"X": x, "y": 5 + np.sin(x[:, 0])}, "memory")
        settings = compare.Settings("mlp", (8,), RIDGES, recipe=QUICK.recipe)
    used = split(dataset, settings.train_size, settings.test_size)
    facts = compare.describe(settings, dataset, used)
    record = Record(tmp_path, "compare", compare.settings_record(settings, dataset), facts)
    compare.run(record, settings, used, range(1))
    assert record.result["summary"]["contenders"]["tangent"]["test_error"]["std"] is None
    assert ("agreement" in record.runs[0]["tangent_to_network"]) == (kind == "cnn")
    figure = draw(record, used, tmp_path / "figure.png")
    assert figure.stat().st_size > 20_000


def test_notes_name_what_was_not_reached(tmp_path, digits, parts):
    record = Record(tmp_path, "compare", compare.settings_record(QUICK, digits), {})
    compare.run(record, QUICK, parts, range(1))
    details = record.runs[0]["contenders"]["tangent"]["details"]
    details.update(converged=False, relative_residual=0.5, status="iteration limit", ridge=0.01)
    record.runs[0]["contenders"]["network"]["details"]["converged"] = False
    text = "\n".join(notes(record))
    assert "relative residual 5.0e-01, not at 0.0001 (iteration limit)" in text
    assert "still improving" in text
    assert "0.01, is the last of its range" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ridges": ()}, "ridge: expected finite"),
        ({"ridges": (-1.0,)}, "ridge: expected finite"),
        ({"ridges": (float("nan"),)}, "ridge: expected finite"),
        ({"tol": 0.0}, "tol: expected"),
    ],
)
def test_settings_are_checked(change, message):
    with pytest.raises(ValueError, match=message):
        compare.Settings(**change)


def test_the_kernel_of_the_measure_is_that_of_the_network(parts):
    rows, _ = dense_jacobian(network(), parts.test.x[:10])
    rows = rows.reshape(10, 10, -1)
    expected = torch.einsum("nkp,mkp->nm", rows, rows)
    kernel = jacpot.ntk(network(), parts.test.x[:10], outputs="trace")
    torch.testing.assert_close(kernel.double(), expected, rtol=1e-4, atol=1e-4)
