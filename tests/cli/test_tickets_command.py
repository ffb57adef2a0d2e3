import json

import pytest
from typer.testing import CliRunner

from jacpot.cli.app import app
from jacpot.studies import tickets as study
from jacpot.studies.steps import train_steps
from jacpot.studies.tickets_report import draw

SMALL = [*("--width", "8", "--train-size", "60", "--test-size", "40"), "--steps", "10"]
QUICK = [*SMALL, "--density", "0.5"]


def run(*arguments):
    return CliRunner().invoke(app, ["tickets", *map(str, arguments)], terminal_width=120)


@pytest.mark.parametrize("method", ["imp", "synflow", "edge-popup"])
def test_a_table_a_figure_and_numbers(tmp_path, method):
    options = [*SMALL, "--rounds", "1"] if method == "imp" else QUICK
    shown = run(method, *options, "--out", tmp_path)
    assert shown.exit_code == 0, shown.output
    assert "density" in shown.output
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((tmp_path / "tickets.json").read_text())
    assert result["settings"]["method"] == method
    assert result["environment"]["torch"]
    kinds = {row["kind"] for row in result["rows"]}
    assert kinds == ({"ticket", "reinitialised", "random"} if method == "imp" else {method})
    again = run(method, *options, "--out", tmp_path)
    assert again.exit_code == 0
    assert json.loads((tmp_path / "tickets.json").read_text())["rows"] == result["rows"]


def test_more_rounds_go_on_where_fewer_ended(tmp_path):
    rows = []
    for rounds in (1, 2):
        shown = run("imp", *SMALL, "--rounds", rounds, "--out", tmp_path)
        assert shown.exit_code == 0, shown.output
        result = json.loads((tmp_path / "tickets.json").read_text())
        assert result["settings"]["rounds"] == rounds
        rows.append([row for row in result["rows"] if row["kind"] == "ticket"])
    assert rows[1][: len(rows[0])] == rows[0]
    assert len(rows[1]) == len(rows[0]) + 1


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "Interrupted: 3 of 8 trainings are finished and kept."),
        (RuntimeError("training diverged"), 1, "training diverged; finished trainings are kept"),
    ],
)
def test_what_ends_a_study_early_leaves_a_table_and_goes_on(
    tmp_path, monkeypatch, error, code, message
):
    command = ["imp", *SMALL, "--rounds", "1", "--seeds", "2", "--out"]
    whole = run(*command, tmp_path / "whole")
    calls = 0

    def fragile(*arguments):
        nonlocal calls
        calls += 1
        if calls == 4:
            raise error
        return train_steps(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(study, "train_steps", fragile)
        cut = run(*command, tmp_path / "cut")
    assert cut.exit_code == code
    assert message in " ".join(cut.output.split())
    assert "reinitialised" in cut.output
    assert len(json.loads((tmp_path / "cut" / "tickets.json").read_text())["rows"]) == 3
    assert run(*command, tmp_path / "cut").exit_code == whole.exit_code == 0
    rows = [
        json.loads((tmp_path / name / "tickets.json").read_text())["rows"]
        for name in ("whole", "cut")
    ]
    assert rows[0] == rows[1]


def test_errors_name_the_argument(tmp_path):
    assert "unknown-method" in run("unknown-method").output
    shown = run("snip", *QUICK, "--out", tmp_path, "--density", "2")
    assert shown.exit_code == 2
    assert "density: expected a share in (0, 1], got 2.0" in shown.output
    assert run("snip", *QUICK, "--out", tmp_path).exit_code == 0
    shown = run("snip", *QUICK, "--out", tmp_path, "--steps", "11")
    assert shown.exit_code == 2
    assert "another recipe" in shown.output


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        ("snip", ["--density", "half"], "density: expected a number or several"),
        ("snip", ["--width", "300;100"], "width: expected a number or several"),
        ("edge-popup", ["--width", "0"], "width: expected positive widths"),
        ("imp", ["--density", "0.5"], "density: has no meaning for imp"),
        ("zhou", ["--scope", "erk"], "scope: has no meaning for zhou"),
        ("snip", ["--rounds", "2"], "rounds: has no meaning for snip"),
        ("imp", ["--prune-fraction", "2"], "prune_fraction: expected a share in (0, 1), got 2.0"),
        ("imp", ["--rewind", "never"], "a step below those of a training, 10, got never"),
        ("imp", ["--rewind", "10"], "a step below those of a training, 10, got 10"),
        ("zhou", ["--density", "1"], "density: expected a probability below 1 for zhou"),
        ("snip", ["--device", "meta"], "device: 'meta' cannot be used"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(tmp_path, method, arguments, message):
    shown = run(method, *SMALL, *arguments, "--out", tmp_path / "out")
    assert shown.exit_code == 2
    assert message in shown.output
    assert not (tmp_path / "out").exists()


def test_the_folder_of_another_study_is_refused(tmp_path):
    (tmp_path / "result.json").write_text("{}")
    for fresh in ([], ["--fresh"]):
        shown = run("snip", *QUICK, "--out", tmp_path, *fresh)
        assert shown.exit_code == 2
        assert "holds the results of `jacpot compare`" in " ".join(shown.output.split())
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_an_empty_ticket_is_drawn_without_a_warning(tmp_path):
    row = {"kind": "snip", "accuracy": 0.5, "early_stop": 3, "seeds": 1}
    draw([{**row, "density": 0.1}, {**row, "density": 0.0}], tmp_path / "figure.png", "title")
    draw([{**row, "density": 0.0}], tmp_path / "figure.png", "title")
