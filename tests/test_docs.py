"""Every example in the docstrings runs and prints what it says."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest
import torch

import jacpot

ROOT = Path(__file__).parents[1]
MODULES = ["jacpot"] + [
    found.name
    for found in pkgutil.walk_packages(jacpot.__path__, "jacpot.")
    if not found.name.endswith(("._core", ".__main__"))
]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name: str, tmp_path, monkeypatch):
    module = importlib.import_module(name)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    failures, _ = doctest.testmod(
        module, optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    )
    assert failures == 0


# The command line says of itself what it does.
PACKAGES = ["jacpot"] + [
    found.name
    for found in pkgutil.walk_packages(jacpot.__path__, "jacpot.")
    if found.ispkg and found.name != "jacpot.cli"
]


@pytest.mark.parametrize("name", PACKAGES)
def test_public_names_have_examples(name: str):
    """What a package offers, results included, has an example that the test above runs."""
    package = importlib.import_module(name)
    offered = {key: getattr(package, key) for key in getattr(package, "__all__", ())}
    without = [
        key
        for key, value in offered.items()
        if (inspect.isclass(value) or inspect.isroutine(value))
        and ">>>" not in (value.__doc__ or "")
    ]
    assert without == []


def test_the_citation_names_this_version():
    found = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert found is not None
    assert found[1] == jacpot.build_info()["version"]
