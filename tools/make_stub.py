"""Write python/jacpot/_core.pyi from the built extension, or with --check compare it."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

STUB = Path(__file__).parents[1] / "python" / "jacpot" / "_core.pyi"


def generate() -> str:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, "-m", "pybind11_stubgen", "jacpot._core", "--output-dir", folder],
            check=True,
            capture_output=True,
        )
        made = Path(folder) / "jacpot" / "_core.pyi"
        subprocess.run(["ruff", "format", "--quiet", str(made)], check=True)
        return made.read_text()


def main() -> int:
    text = generate()
    if "--check" not in sys.argv:
        STUB.write_text(text)
        return 0
    if STUB.exists() and STUB.read_text() == text:
        print("stub: _core.pyi matches the extension")
        return 0
    print("python/jacpot/_core.pyi does not match the extension: run `make stub`")
    return 1


if __name__ == "__main__":
    sys.exit(main())
