import json

import pytest
import torch

from jacpot.studies import data
from jacpot.studies.split import split
from jacpot.studies.steps import Steps, train_steps
from jacpot.studies.ticket_store import Store
from jacpot.studies.tickets import METHODS, SUPERMASKS, TicketSettings, build, run
from jacpot.studies.tickets_report import draw, summarise, table
from jacpot.tickets import Mask

QUICK = Steps(steps=40, check_every=20)


@pytest.fixture(scope="module")
def parts():
    pytest.importorskip("sklearn")
    return split(data.load("digits"), 300, 100)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def study(tmp_path, parts, method, **changes):
    options = {"widths": (20, 10), "rounds": 2, "recipe": QUICK, "densities": (0.5, 0.2)}
    settings = TicketSettings(method, **{**options, **changes})
    store = Store(tmp_path, settings.record(data.load("digits"), parts))
    return run(store, settings, parts, 0)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_rows_and_resumes_to_the_same(tmp_path, parts, method):
    rows = study(tmp_path, parts, method)
    assert json.loads(json.dumps(rows)) == rows
    kinds = {row["kind"] for row in rows}
    assert kinds == ({"ticket", "reinitialised", "random"} if method == "imp" else {method})
    assert all(0 <= row["accuracy"] <= 1 and row["early_stop"] <= 40 for row in rows)
    if method not in ("imp", *SUPERMASKS):
        assert [row["density"] for row in rows] == pytest.approx([0.5, 0.2], abs=1e-3)
        assert all(row["effective_density"] <= row["density"] for row in rows)
    for path in list((tmp_path / "trainings").glob("*.json"))[:1]:
        path.unlink()  # as if interrupted there
    assert study(tmp_path, parts, method) == rows


def test_table_and_figure(tmp_path, parts):
    pytest.importorskip("matplotlib")
    summary = summarise(study(tmp_path, parts, "imp"))
    assert table(summary, "title").row_count == 1 + 2 * 3
    assert draw(summary, tmp_path / "figure.png", "title").stat().st_size > 1000


def test_other_settings_are_refused_unless_fresh(tmp_path, parts):
    study(tmp_path, parts, "random")
    with pytest.raises(ValueError, match="another densities"):
        study(tmp_path, parts, "random", densities=(0.3,))
    Store(tmp_path, {"method": "other"}, fresh=True)
    assert not list((tmp_path / "trainings").iterdir())


def test_networks(parts):
    vgg = build(TicketSettings("random", net="vgg", widths=(4, 6)), parts, 0)
    assert vgg(parts.train.x[:2]).shape == (2, 10)
    deep = build(TicketSettings("random", widths=(16,) * 50, he=True), parts, 0)
    assert deep(parts.train.x[:20]).std() > 1e-2  # signals arrive
    assert len(Mask.ones(deep)) == 51
    with pytest.raises(ValueError, match="method: expected one of"):
        TicketSettings("magic")


def test_steps_train_and_say_where_to_stop(parts):
    torch.manual_seed(0)
    network = build(TicketSettings("imp", widths=(30,)), parts, 0)
    metrics = train_steps(network, parts, Steps(steps=200, check_every=50))
    assert metrics["accuracy"] > 0.8
    assert metrics["early_stop"] in (50, 100, 150, 200)
    with pytest.raises(RuntimeError, match="diverged"):
        train_steps(network, parts, Steps(steps=100, learning_rate=1e30))
    with pytest.raises(ValueError, match="steps: expected at least 1"):
        Steps(steps=0)


def test_regression(tmp_path):
    table_like = data.from_arrays(
        "line", {"X": torch.randn(80, 3).numpy(), "y": torch.randn(80).double().numpy()}, "memory"
    )
    pieces = split(table_like)
    settings = TicketSettings("snip", widths=(8,), recipe=QUICK)
    rows = run(Store(tmp_path, settings.record(table_like, pieces)), settings, pieces, 0)
    assert rows[0]["accuracy"] <= 1
