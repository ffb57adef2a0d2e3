"""What a study has found so far, on disk: written whole or not at all, taken up again later."""

from __future__ import annotations

import io
import json
import os
import platform
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jacpot._backend import build_info
from jacpot.studies.folder import claim
from jacpot.tickets._files import read_json, write_atomically

__all__ = ["Record", "environment"]

FORMAT = 1


class Record:
    """The folder of one study: ``result.json``, and arrays for each seed beside it.

    Parameters
    ----------
    folder
        Made if need be.
    study
        Name of the study.
    settings
        Everything the numbers depend on but the seed; plain JSON values.
    facts
        What else ``result.json`` should say; plain JSON values.
    fresh
        Forget what the folder holds.

    Attributes
    ----------
    runs
        ``{seed: numbers}`` of the finished seeds.
    result
        What ``result.json`` holds.

    Raises
    ------
    ValueError
        If the folder holds another study, the same one with other settings, or a damaged
        ``result.json``. The message says which, and nothing is overwritten.
    OSError
        If nothing can be written there.
    """

    def __init__(
        self,
        folder: Path,
        study: str,
        settings: Mapping[str, Any],
        facts: Mapping[str, Any],
        fresh: bool = False,
    ) -> None:
        self.folder = folder
        self.settings = json.loads(json.dumps(settings))  # tuples become lists, as in the file
        self.result = {"format": FORMAT, "study": study, "settings": self.settings, **facts}
        self.runs: dict[int, dict[str, Any]] = {}
        claim(folder, study)
        if self.path.exists() and not fresh:
            self._take_up(read_result(self.path))

    @property
    def path(self) -> Path:
        """Path of ``result.json``."""
        return self.folder / "result.json"

    def _take_up(self, result: dict[str, Any]) -> None:
        cure = "choose another --out, or add --fresh to start anew"
        theirs = result["settings"]
        changed = [
            f"{key} was {theirs.get(key)!r} and is now {self.settings.get(key)!r}"
            for key in sorted({*theirs, *self.settings})
            if theirs.get(key) != self.settings.get(key)
        ]
        if changed:
            raise ValueError(
                f"{self.path} was made with other settings ({'; '.join(changed)}); {cure}"
            )
        for seed in map(int, result["runs"]):
            try:
                self.arrays(seed)
            except (OSError, EOFError, ValueError, zipfile.BadZipFile):
                continue  # the seed is computed again
            self.runs[seed] = result["runs"][str(seed)]

    def add(self, seed: int, run: dict[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
        """Keep one finished seed: its arrays first, so that whoever is listed is whole."""
        path = self._arrays_path(seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = io.BytesIO()
        np.savez_compressed(content, allow_pickle=False, **arrays)
        write_atomically(path, content.getvalue())
        self._write({}, {**self.runs, seed: run})

    def arrays(self, seed: int) -> dict[str, NDArray[Any]]:
        """Read the arrays that were kept for a finished seed."""
        # np.load leaves a file open that it opened and could not read.
        with self._arrays_path(seed).open("rb") as file, np.load(file) as archive:
            return {name: archive[name] for name in archive.files}

    def write(self, derived: Mapping[str, Any]) -> None:
        """Write ``result.json``, with what is derived from the runs."""
        self._write(derived, self.runs)

    def _write(self, derived: Mapping[str, Any], runs: dict[int, dict[str, Any]]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        result = {
            **self.result,
            "environment": environment(),
            **derived,
            "runs": {str(seed): runs[seed] for seed in sorted(runs)},
        }
        write_atomically(self.path, (json.dumps(result, indent=1) + "\n").encode())
        self.result, self.runs = result, runs  # only what is on disk is kept

    def _arrays_path(self, seed: int) -> Path:
        return self.folder / "outputs" / f"seed-{seed}.npz"


def read_result(path: Path) -> dict[str, Any]:
    """Read a ``result.json``.

    Parameters
    ----------
    path
        The file.

    Returns
    -------
    dict

    Raises
    ------
    ValueError
        If it is not what `Record` writes.
    """
    cure = "move it away, choose another --out, or add --fresh to start anew"
    try:
        result = read_json(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{error}; {cure}") from error
    kinds = {"format": int, "study": str, "settings": dict, "runs": dict}
    for key, kind in kinds.items():
        if not isinstance(result.get(key), kind):
            raise ValueError(
                f"{path} is not a result of jacpot: {key!r} is missing or wrong; {cure}"
            )
    if result["format"] != FORMAT:
        raise ValueError(
            f"{path} has format {result['format']}, this version reads {FORMAT}; {cure}"
        )
    if not all(key.isdecimal() and isinstance(run, dict) for key, run in result["runs"].items()):
        raise ValueError(f"{path} is not a result of jacpot: 'runs' is wrong; {cure}")
    return result


def environment() -> dict[str, Any]:
    """Say what the numbers were computed with."""
    return {
        **build_info(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or "unknown")
