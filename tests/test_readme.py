"""Every example of the pages runs; their commands can be given, their links lead somewhere."""

from __future__ import annotations

import doctest
import re
import shlex
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_ten_lines_of_the_readme(capsys):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 1
    torch.manual_seed(0)
    names: dict[str, object] = {}
    exec(compile(blocks[0], "README.md", "exec"), names)
    assert "converged" in capsys.readouterr().out
    assert names["solution"].converged
    assert names["predictions"].shape == names["y"].shape


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_of_the_pages(page, tmp_path, monkeypatch):
    if "sklearn" in page.read_text():
        pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    failures, _ = doctest.testfile(
        str(page), module_relative=False, encoding="utf-8", optionflags=doctest.ELLIPSIS
    )
    assert failures == 0


def commands(page: Path) -> list[list[str]]:
    """The words of what a page says can be typed, in blocks of shell and in code spans."""
    text = page.read_text()
    blocks = "".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL))
    lines = blocks.splitlines() + re.findall(r"^    (\S.*)$", text, re.MULTILINE)
    lines += re.findall(r"`([^`\n]+)`", text)
    found = [re.match(r"(?:[A-Z_]+=\S+ )*((?:jacpot|make|python) \S.*)", line) for line in lines]
    return [shlex.split(match[1], comments=True) for match in found if match]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_can_be_given(page):
    typer = pytest.importorskip("typer")
    from jacpot.cli.app import app

    programs = typer.main.get_command(app).commands
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for program, first, *rest in commands(page):
        if program == "make":
            assert first in targets, first
        elif program == "jacpot" and "--help" not in rest:
            rest = ["imp" if word == "METHOD" else word for word in rest]
            programs[first].make_context(first, rest)  # which refuses what it does not know
        elif program == "python":
            code = (ROOT / first).read_text() + (ROOT / "bench" / "harness.py").read_text()
            assert all(f'"{word}"' in code for word in rest if word.startswith("--")), rest


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).is_file(), target
