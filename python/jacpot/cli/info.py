"""``jacpot info``: how the library was built and what it runs on."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from jacpot import build_info

__all__ = ["info"]

LABELS = {
    "version": "jacpot",
    "compiler": "compiler",
    "isas_built": "instruction sets built",
    "isas_supported": "usable on this machine",
    "isa": "in use",
    "cuda_built": "CUDA toolkit",
    "cuda_architectures": "CUDA architectures",
    "cuda_available": "CUDA device at hand",
    "threads": "threads",
    "thread_runtime": "thread runtime",
    "blas": "BLAS",
    "python": "Python",
    "torch": "PyTorch",
    "numpy": "NumPy",
}


def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Say how jacpot was built and what it runs on."""
    facts = build_info()
    if as_json:
        typer.echo(json.dumps(facts, indent=1))
        return
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for key, value in facts.items():
        table.add_row(LABELS.get(key, key), _say(value))
    Console().print(table)


def _say(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return str(value)
