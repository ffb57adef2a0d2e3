"""Refuse weak symbols in objects compiled for one instruction set.

The linker keeps one copy of a weak symbol. If that copy came from the AVX-512 objects, baseline
code would call it and crash on an older machine. Symbols in the instruction set's own namespace
cannot collide.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ISAS = ("baseline", "avx2", "avx512")


def weak_symbols(path: Path) -> list[str]:
    listing = subprocess.run(
        ["nm", "--demangle", "--defined-only", str(path)],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return [
        line.split(maxsplit=2)[2] for line in listing.splitlines() if " W " in line or " V " in line
    ]


def main() -> int:
    build = Path(__file__).parents[1] / "build"
    checked, errors = 0, []
    for path in sorted(build.rglob("*.o")):
        target = next((part for part in path.parts if part.endswith(".dir")), "")
        isa = re.fullmatch(rf"jacpot_.*_({'|'.join(ISAS)})\.dir", target)
        if not isa or "asan" in str(path) or "debug" in str(path):
            continue
        checked += 1
        own = f"jacpot::{isa.group(1)}::"
        errors += [f"{path.name} ({isa.group(1)}): {s}" for s in weak_symbols(path) if own not in s]
    if not checked:
        print("no objects found under build/: build the extension first")
        return 1
    print(
        "\n".join(errors)
        or f"symbols: {checked} objects define no weak symbol of their own ISA's code"
    )
    return bool(errors)


if __name__ == "__main__":
    sys.exit(main())
