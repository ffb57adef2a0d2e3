import json

import pytest
from typer.testing import CliRunner

from jacpot.cli.app import app

QUICK = [
    *("--width", "8", "--train-size", "60", "--test-size", "40"),
    *("--steps", "10", "--rounds", "1", "--density", "0.5"),
]


def run(*arguments):
    return CliRunner().invoke(app, ["tickets", *map(str, arguments)], terminal_width=120)


@pytest.mark.parametrize("method", ["imp", "synflow", "edge-popup"])
def test_a_table_a_figure_and_numbers(tmp_path, method):
    shown = run(method, *QUICK, "--out", tmp_path)
    assert shown.exit_code == 0, shown.output
    assert "density" in shown.output
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((tmp_path / "tickets.json").read_text())
    assert result["settings"]["method"] == method
    assert result["environment"]["torch"]
    kinds = {row["kind"] for row in result["rows"]}
    assert kinds == ({"ticket", "reinitialised", "random"} if method == "imp" else {method})
    again = run(method, *QUICK, "--out", tmp_path)
    assert again.exit_code == 0
    assert json.loads((tmp_path / "tickets.json").read_text())["rows"] == result["rows"]


def test_errors_name_the_argument(tmp_path):
    assert "unknown-method" in run("unknown-method").output
    shown = run("snip", *QUICK, "--out", tmp_path, "--density", "2")
    assert shown.exit_code == 2
    assert "density: expected a share in (0, 1], got 2.0" in shown.output
    assert run("snip", *QUICK, "--out", tmp_path).exit_code == 0
    shown = run("snip", *QUICK, "--out", tmp_path, "--steps", "11")
    assert shown.exit_code == 2
    assert "another recipe" in shown.output
