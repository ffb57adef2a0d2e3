"""How commands end: full disks, trainings that diverge, damaged files, Ctrl-C."""

import json
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
from typer.testing import CliRunner

from jacpot.cli.app import app
from jacpot.studies import tickets as searching
from jacpot.studies.steps import train_steps

SIZES = ["--train-size", "60", "--test-size", "40"]
COMPARE = ["compare", *SIZES, *("--width", "8", "--ridge", "1", "--max-epochs", "2")]
TICKETS = ["tickets", "imp", *SIZES, *("--width", "8", "--steps", "10", "--rounds", "1")]
ONE_SHOT = ["tickets", "snip", *SIZES, *("--width", "8", "--steps", "10")]


def run(*arguments):
    return CliRunner().invoke(app, [*map(str, arguments)], terminal_width=120)


@contextmanager
def a_disk():
    """A function that fills it up: no file may then grow beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield lambda room=0: resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def said(shown):
    return " ".join(shown.output.split())


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_disk_that_is_full_from_the_start(tmp_path):
    pytest.importorskip("sklearn.datasets")  # which tries the disk when it is first imported
    with a_disk() as fill:
        fill()
        shown = run(*TICKETS, "--out", tmp_path / "tickets")
        assert shown.exit_code == 2
        assert "File too large" in said(shown)
        shown = run(*COMPARE, "--out", tmp_path / "compare")
        assert shown.exit_code == 1
        assert "File too large; finished seeds are kept" in said(shown)
    assert files(tmp_path) == set()


@pytest.mark.parametrize("room", [0, 4096])  # none, and none for the larger files
def test_a_disk_that_fills_up_in_a_comparison(tmp_path, room):
    assert run(*COMPARE, "--seeds", 1, "--out", tmp_path).exit_code == 0
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    with a_disk() as fill:
        fill(room)
        shown = run(*COMPARE, "--seeds", 2, "--out", tmp_path)
    assert shown.exit_code == 1
    assert "File too large; finished seeds are kept" in said(shown)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert files(tmp_path) - set(before) <= {"outputs/seed-1.npz"}
    shown = run(*COMPARE, "--seeds", 2, "--out", tmp_path)
    assert shown.exit_code == 0
    assert "holds 1 of 2 seeds" in said(shown)


@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_disk_that_fills_up_in_a_search(tmp_path, monkeypatch, after):
    whole = run(*TICKETS, "--out", tmp_path / "whole")
    calls = 0

    def filling(*arguments):
        nonlocal calls
        calls += 1
        if calls == after:
            fill()
        return train_steps(*arguments)

    with monkeypatch.context() as patch, a_disk() as fill:
        patch.setattr(searching, "train_steps", filling)
        cut = run(*TICKETS, "--out", tmp_path / "cut")
    assert cut.exit_code == 1
    assert "File too large; finished trainings are kept" in said(cut)
    assert files(tmp_path / "cut") < files(tmp_path / "whole")
    assert run(*TICKETS, "--out", tmp_path / "cut").exit_code == whole.exit_code == 0
    rows = [
        json.loads((tmp_path / name / "tickets.json").read_text())["rows"]
        for name in ("whole", "cut")
    ]
    assert rows[0] == rows[1]


def test_trainings_that_diverge(tmp_path):
    for command, things in ((COMPARE, "seeds"), (TICKETS, "trainings")):
        shown = run(*command, "--learning-rate", "inf", "--out", tmp_path / things)
        assert shown.exit_code == 1
        assert "training diverged" in said(shown)
        assert f"lower the learning rate (inf); finished {things} are kept" in said(shown)


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (COMPARE, "result.json"),
        (ONE_SHOT, "settings.json"),
        (ONE_SHOT, "trainings/seed-0-density-0.1.json"),
        (TICKETS, "settings.json"),
        (TICKETS, "trainings/seed-0-random-001.json"),
        (TICKETS, "trainings/seed-0-search/settings.json"),
        (TICKETS, "trainings/seed-0-search/start.safetensors"),
        (TICKETS, "trainings/seed-0-search/round-001.safetensors"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, command, name):
    assert run(*command, "--out", tmp_path).exit_code == 0
    path = tmp_path / name
    whole = path.read_bytes()
    for damage in (b"", whole[: len(whole) // 2], b"[1]", b"\xff\xfe\x00"):
        path.write_bytes(damage)
        shown = run(*command, "--out", tmp_path)
        assert isinstance(shown.exception, SystemExit)
        assert shown.exit_code in (1, 2)
        assert f"{path} is damaged" in said(shown)
        assert path.read_bytes() == damage
    assert run(*command, "--out", tmp_path, "--fresh").exit_code == 0


@pytest.mark.parametrize(
    ("command", "more", "kept"),
    [
        (COMPARE, ["--seeds", "1000"], "result.json"),
        (TICKETS, ["--rounds", "1000"], "trainings/seed-0-search/round-001.safetensors"),
    ],
    ids=["compare", "tickets"],
)
def test_ctrl_c_in_the_shell(tmp_path, command, more, kept):
    """A real signal, wherever it falls, leaves whole files that the same command continues."""
    command = [*command, "--out", str(tmp_path)]
    if command[0] == "tickets":
        command += ["--prune-fraction", "0.001"]
    running = subprocess.Popen(
        [sys.executable, "-m", "jacpot.cli", *command, *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A job that a shell put in the background ignores SIGINT, and so do its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / kept).exists() and time.monotonic() < deadline:
            assert running.poll() is None, running.stderr.read()
            time.sleep(0.05)
        time.sleep(0.3)
        running.send_signal(signal.SIGINT)
        shown, complaint = running.communicate(timeout=120)
    finally:
        running.kill()
        running.communicate()
    assert running.returncode == 130, complaint
    assert "are finished and kept. The same command continues." in " ".join(shown.split())
    assert "Traceback" not in complaint
    assert not [path for path in tmp_path.rglob(".*") if path.is_file()]  # written in part
    again = run(*command)
    assert again.exit_code == 0, again.output


def test_what_cannot_be_built_is_said_before_anything_is_kept(tmp_path):
    # More than addresses there are, so that no system promises it.
    huge = run(*COMPARE, "--width", 10**13, "--out", tmp_path / "huge")
    assert huge.exit_code == 2
    assert "jacpot compare: " in said(huge)
    assert "allocate" in said(huge)
    deep = run(*ONE_SHOT, "--net", "vgg", "--width", "8,8,8,8", "--out", tmp_path / "deep")
    assert deep.exit_code == 2
    assert "net: 'vgg' halves pictures 4 times, and those of shape (1, 8, 8) are" in said(deep)
    none = run(*COMPARE, "--width", "", "--out", tmp_path / "none")
    assert none.exit_code == 2
    assert "width: expected a number or several" in said(none)
    assert files(tmp_path) == set()
