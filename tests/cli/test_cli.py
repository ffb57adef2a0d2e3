from __future__ import annotations

import errno
import json
import subprocess
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

import jacpot
from jacpot.cli.app import app
from jacpot.studies import compare as study

QUICK = [
    *("--width", 8, "--depth", 1, "--ridge", "1,0.1", "--seeds", 2),
    *("--train-size", 40, "--test-size", 30, "--max-epochs", 5),
]


def run(*arguments):
    return CliRunner().invoke(app, ["compare", *map(str, arguments)], terminal_width=100)


def test_compare_writes_table_figure_and_numbers(tmp_path):
    shown = run(*QUICK, "--out", tmp_path)
    assert shown.exit_code == 0, shown.output
    for text in (
        "digits: 40 training",
        "Tangent space",
        "Trained network",
        "same class on the test set",
    ):
        assert text in shown.output
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((tmp_path / "result.json").read_text())
    assert sorted(result["runs"]) == ["0", "1"]
    assert result["environment"]["version"] == jacpot.build_info()["version"]
    assert result["settings"]["widths"] == [8]
    assert result["data"]["train"] == 40
    assert result["summary"]["contenders"]["tangent"]["test_error"]["std"] is not None


def test_compare_continues(tmp_path, monkeypatch):
    assert run(*QUICK, "--out", tmp_path).exit_code == 0
    first = json.loads((tmp_path / "result.json").read_text())["runs"]
    computed = []
    monkeypatch.setattr(study, "run_seed", _counting(computed))
    shown = run(*QUICK, "--out", tmp_path, "--seeds", 3)
    assert shown.exit_code == 0, shown.output
    assert computed == [2]
    assert "holds 2 of 3 seeds" in shown.output
    runs = json.loads((tmp_path / "result.json").read_text())["runs"]
    assert {seed: runs[seed] for seed in first} == first
    assert run(*QUICK, "--out", tmp_path, "--fresh").exit_code == 0
    assert computed == [2, 0, 1]


def test_an_interrupt_keeps_what_is_finished(tmp_path, monkeypatch):
    computed = []
    monkeypatch.setattr(study, "run_seed", _counting(computed, stop=1))
    shown = run(*QUICK, "--out", tmp_path)
    assert shown.exit_code == 130
    assert "1 of 2 seeds are finished" in shown.output
    assert "Tangent space" in shown.output
    assert list(json.loads((tmp_path / "result.json").read_text())["runs"]) == ["0"]
    monkeypatch.setattr(study, "run_seed", _counting(computed))
    assert run(*QUICK, "--out", tmp_path).exit_code == 0
    assert computed == [0, 1]


def test_an_interrupt_before_the_first_seed_is_finished(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "run_seed", _counting([], stop=0))
    shown = run(*QUICK, "--out", tmp_path)
    assert shown.exit_code == 130
    assert "0 of 2 seeds" in shown.output
    assert run(*QUICK, "--out", tmp_path, "--seeds", 1).exit_code == 130


def _counting(computed, stop=None, original=study.run_seed):
    def run_seed(settings, parts, seed, progress):
        if seed == stop:
            raise KeyboardInterrupt
        computed.append(seed)
        return original(settings, parts, seed, progress)

    return run_seed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "letters"], "expected one of digits"),
        (["--data", "absent.npz"], "there is no file"),
        (["--width", "a,b"], "width: expected a number or several"),
        (["--width", "-3"], "width: expected positive widths"),
        (["--width", "3,4", "--depth", "3"], "depth: 3 contradicts the 2 widths"),
        (["--ridge", "-1"], "ridge: expected finite"),
        (["--tol", "2"], "tol: expected"),
        (["--learning-rate", "-1"], "learning_rate: expected a positive"),
        (["--learning-rate", "0"], "learning_rate: expected a positive"),
        (["--device", "abacus"], "device: 'abacus' cannot be used"),
        (["--device", "meta"], "device: 'meta' cannot be used"),
        (["--train-size", "5000"], "train_size: expected 1 to 1144"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(tmp_path, arguments, message):
    shown = run("--out", tmp_path / "out", *arguments)
    assert shown.exit_code == 2
    assert message in shown.output
    assert "Traceback" not in shown.output
    assert not (tmp_path / "out").exists()


def test_a_table_has_no_pictures(tmp_path):
    x = np.random.default_rng(0).normal(size=(40, 3))
    np.savez(tmp_path / "table.npz", X=x, y=x[:, 0])
    shown = run("--data", tmp_path / "table.npz", "--net", "cnn", "--out", tmp_path / "out")
    assert shown.exit_code == 2
    assert "net: 'cnn' needs pictures" in shown.output


def test_a_damaged_npz(tmp_path):
    (tmp_path / "bad.npz").write_bytes(b"junk")
    shown = run("--data", tmp_path / "bad.npz", "--out", tmp_path / "out")
    assert shown.exit_code == 2
    assert "bad.npz" in shown.output


def test_a_damaged_result(tmp_path):
    (tmp_path / "result.json").write_text('{"format":')
    shown = run(*QUICK, "--out", tmp_path)
    assert shown.exit_code == 2
    assert "result.json is damaged" in shown.output
    assert (tmp_path / "result.json").read_text() == '{"format":'


def test_other_settings_in_the_same_folder(tmp_path):
    assert run(*QUICK, "--out", tmp_path, "--seeds", 1).exit_code == 0
    shown = run(*QUICK, "--out", tmp_path, "--ridge", "0.5")
    assert shown.exit_code == 2
    assert "ridges was [1.0, 0.1] and is now [0.5]" in shown.output


def test_a_folder_that_cannot_be_written(tmp_path):
    shown = run(*QUICK, "--out", "/proc/results")
    assert shown.exit_code == 2
    assert "/proc/results" in shown.output


def test_the_folder_of_another_study_is_refused(tmp_path):
    (tmp_path / "settings.json").write_text("{}")
    shown = run(*QUICK, "--out", tmp_path, "--fresh")
    assert shown.exit_code == 2
    assert "holds the results of `jacpot tickets`" in " ".join(shown.output.split())


def test_a_full_disk_keeps_what_is_finished(tmp_path, monkeypatch):
    def full(settings, parts, seed, progress):
        raise OSError(errno.ENOSPC, "No space left on device")

    assert run(*QUICK, "--out", tmp_path, "--seeds", 1).exit_code == 0
    monkeypatch.setattr(study, "run_seed", full)
    shown = run(*QUICK, "--out", tmp_path)
    assert shown.exit_code == 1
    assert "No space left on device; finished seeds are kept" in shown.output
    assert list(json.loads((tmp_path / "result.json").read_text())["runs"]) == ["0"]


def test_a_single_test_example_says_nothing_of_the_kernel(tmp_path):
    shown = run(*QUICK, "--seeds", 1, "--test-size", 1, "--out", tmp_path)
    assert shown.exit_code == 0, shown.output
    assert "kernel moved" not in shown.output


def test_version():
    shown = CliRunner().invoke(app, ["--version"])
    assert shown.exit_code == 0
    assert shown.output == f"jacpot {jacpot.build_info()['version']}\n"


def test_info():
    shown = CliRunner().invoke(app, ["info"])
    assert shown.exit_code == 0
    assert "instruction sets built" in shown.output
    facts = json.loads(CliRunner().invoke(app, ["info", "--json"]).output)
    assert facts == jacpot.build_info()


def test_without_the_extra_it_says_what_to_install():
    program = "import sys; sys.modules['typer'] = None\nimport jacpot.cli; jacpot.cli.main()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    assert 'this needs typer, which is not installed: pip install "jacpot[cli]"' in done.stderr


def test_the_library_does_not_import_the_extra():
    program = (
        "import sys, jacpot, jacpot.cli\n"
        "print(*sorted({'typer', 'matplotlib', 'pooch', 'sklearn'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == ""
