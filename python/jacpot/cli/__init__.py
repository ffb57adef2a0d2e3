"""The command line. What it needs beyond the library is imported only when it runs."""

from __future__ import annotations

import sys

__all__ = ["main"]

# Packages of the `cli` extra, by the name they are imported under.
EXTRA = ("typer", "matplotlib", "pooch", "sklearn")


def main() -> None:
    """Run ``jacpot``; without the packages of the ``cli`` extra, say how to get them."""
    try:
        from jacpot.cli.app import app

        app()
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if missing not in EXTRA:
            raise
        sys.exit(f'jacpot: this needs {missing}, which is not installed: pip install "jacpot[cli]"')
