"""Every example in the docstrings runs and prints what it says."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest
import torch

import jacpot

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


def test_public_functions_have_examples():
    """What `import jacpot` offers is documented with an example that the test above runs."""
    without = [
        name
        for name in jacpot.__all__
        if callable(getattr(jacpot, name)) and ">>>" not in (getattr(jacpot, name).__doc__ or "")
    ]
    assert without == []
