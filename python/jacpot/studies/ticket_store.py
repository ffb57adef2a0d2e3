"""Trainings that are kept as soon as they are done, so that a study goes on where it stopped."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jacpot.studies.folder import claim
from jacpot.tickets._files import read_json, write_atomically

__all__ = ["Store"]

CURE = "choose another --out, or add --fresh to start anew"


class Store:
    """A folder of one study: its settings, and a JSON file for each training.

    Parameters
    ----------
    folder
        Made if need be.
    settings
        Everything the numbers depend on; plain JSON values.
    fresh
        Forget what the folder holds.

    Raises
    ------
    ValueError
        If the folder holds a study with other settings, or another study. Nothing is overwritten.
    OSError
        If nothing can be written there.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], fresh: bool = False) -> None:
        self.folder = folder
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))
        claim(folder, "tickets")
        path = folder / "settings.json"
        if fresh:
            shutil.rmtree(folder / "trainings", ignore_errors=True)
            path.unlink(missing_ok=True)
        self.trainings.mkdir(parents=True, exist_ok=True)
        if path.exists():
            theirs = _read(path)
            if theirs != self.settings:
                odd = [
                    k
                    for k in sorted({*theirs, *self.settings})
                    if theirs.get(k) != self.settings.get(k)
                ]
                raise ValueError(f"{folder} holds a study with another {', '.join(odd)}; {CURE}")
        else:
            write_atomically(path, json.dumps(self.settings, indent=1).encode())

    @property
    def trainings(self) -> Path:
        """Where the finished trainings are."""
        return self.folder / "trainings"

    def training(self, key: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The numbers of one training: read, or computed and kept."""
        path = self.trainings / f"{key}.json"
        if not path.exists():
            write_atomically(path, json.dumps(compute()).encode())
        return _read(path)

    def write(self, name: str, content: Mapping[str, Any]) -> Path:
        """Write a JSON file of results."""
        path = self.folder / name
        write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())
        return path


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except ValueError as error:
        raise ValueError(f"{error}; {CURE}") from error
