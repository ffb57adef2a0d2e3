"""The studies on a GPU, from the command line to the record."""

from __future__ import annotations

import json

import pytest
import torch

from jacpot.studies import compare, data
from jacpot.studies.contenders import CONTENDERS
from jacpot.studies.record import Record
from jacpot.studies.split import split
from jacpot.studies.steps import Steps
from jacpot.studies.ticket_store import Store
from jacpot.studies.tickets import TicketSettings, run
from jacpot.studies.training import Recipe


@pytest.fixture(scope="module")
def digits():
    pytest.importorskip("sklearn")
    return data.load("digits")


def settings(device):
    return compare.Settings(
        widths=(6,),
        ridges=(1.0, 0.1),
        train_size=30,
        test_size=20,
        recipe=Recipe(learning_rate=1e-2, patience=1, decays=0, max_epochs=2),
        device=device,
    )


def test_compare(digits, gpu, tmp_path):
    records = []
    for device in ("cpu", "cuda"):
        chosen = settings(device)
        parts = split(digits, 30, 20, device=device)
        facts = compare.describe(chosen, digits, parts)
        of = compare.settings_record(chosen, digits)
        record = Record(tmp_path / device, "compare", of, facts, False)
        compare.run(record, chosen, parts, range(1), lambda seed, stage: None)
        records.append(record)
    here, there = (record.runs[0]["contenders"] for record in records)
    for name in CONTENDERS:
        # The same network, the same orders: what differs is rounding.
        assert there[name]["train_loss"] == pytest.approx(here[name]["train_loss"], rel=0.02)


@pytest.mark.parametrize("method", ["imp", "snip", "ntk", "edge-popup"])
def test_tickets(digits, gpu, tmp_path, method):
    parts = split(digits, 40, 20, device="cuda")
    chosen = TicketSettings(
        method,
        widths=(8,),
        rounds=1,
        score_size=16,
        recipe=Steps(steps=4, check_every=2),
        densities=(0.5,),
    )
    store = Store(tmp_path, chosen.record(digits, parts))
    rows = run(store, chosen, parts, 0)
    assert json.loads(json.dumps(rows)) == rows
    assert all(0 <= row["accuracy"] <= 1 for row in rows)


def test_the_command_line_says_why_a_gpu_cannot_be_used():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    runner = pytest.importorskip("typer.testing").CliRunner()
    from jacpot.cli.app import app

    for command in (["compare"], ["tickets", "snip"]):
        result = runner.invoke(app, [*command, "--device", "cuda", "--data", "digits"])
        assert result.exit_code == 2
        assert "'cuda' cannot be used" in result.output
