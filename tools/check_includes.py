"""Hold the direction of dependency of the C++ sources: common <- operation <- bindings.

An operation includes only `common/` and itself, never another operation, pybind11, Python or torch.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1] / "csrc"
FOREIGN = re.compile(r"^(pybind11|torch|ATen|c10|Python\.h)")


def importers_of_core() -> list[str]:
    """Only the backend touches the compiled extension."""
    python = ROOT.parent / "python" / "jacpot"
    pattern = re.compile(r"^\s*(from|import)\b.*\b_core\b", re.MULTILINE)
    return [
        f"{path.relative_to(ROOT.parent)}: only _backend.py may import _core"
        for path in sorted(python.rglob("*.py"))
        if path.name != "_backend.py" and pattern.search(path.read_text())
    ]


def main() -> int:
    folders = {p.name for p in ROOT.iterdir() if p.is_dir()}
    errors = importers_of_core()
    for path in sorted(p for p in ROOT.rglob("*") if p.suffix in {".cpp", ".hpp", ".cu", ".cuh"}):
        own = path.relative_to(ROOT).parts[0]
        allowed = folders if own == "bindings" else {own, "common"}
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            found = re.match(r'\s*#\s*include\s*[<"]([^>"]+)[>"]', line)
            if not found:
                continue
            target = found.group(1)
            foreign = FOREIGN.match(target) and own != "bindings"
            if foreign or (target.split("/")[0] in folders - allowed):
                place = f"{path.relative_to(ROOT.parent)}:{number}"
                errors.append(f"{place}: {own} must not include {target}")
    print("\n".join(errors) or "includes: every direction of dependency holds")
    return bool(errors)


if __name__ == "__main__":
    sys.exit(main())
