"""Run a module with the package taken from another folder: run_from.py FOLDER -m MODULE [ARG ...].

The editable installation hooks the import of the package; this removes the hook first.
"""

from __future__ import annotations

import runpy
import sys


def main() -> None:
    folder, flag, module, *arguments = sys.argv[1:]
    if flag != "-m":
        raise SystemExit(__doc__)
    sys.meta_path[:] = [
        f for f in sys.meta_path if type(f).__name__ != "ScikitBuildRedirectingFinder"
    ]
    sys.path.insert(0, folder)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


main()
