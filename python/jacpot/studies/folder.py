"""The folder that holds the results of a study."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jacpot.tickets._files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["claim", "write_png"]

# The file by which each study knows its folder again.
MARKS = {"compare": "result.json", "tickets": "settings.json"}


def claim(folder: Path, study: str) -> None:
    """Refuse a folder that another study owns or that cannot be written.

    Parameters
    ----------
    folder
        Need not exist, and is then not made.
    study
        ``"compare"`` or ``"tickets"``.

    Raises
    ------
    ValueError
        If it is a file, or holds the results of another study.
    OSError
        If nothing can be written there.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     claim(Path(folder) / "new", "compare")
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out: {folder} is a file, not a folder")
    for other, mark in MARKS.items():
        if other != study and (folder / mark).exists():
            raise ValueError(
                f"out: {folder} holds the results of `jacpot {other}`; choose another --out"
            )
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    finally:
        for path in missing:
            if path.exists():
                path.rmdir()


def write_png(path: Path, figure: Figure, **options: Any) -> None:
    """Write a picture, whole or not at all; ``options`` are those of `savefig`."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150, **options)
    write_atomically(path, content.getvalue())
