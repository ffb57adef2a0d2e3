"""A peer that needs JAX, in a process of its own which computes once for every line it is sent."""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

import numpy
import torch
from torch import Tensor, nn

__all__ = ["JAX", "JaxPeer"]

# A Python that has neural-tangents: 0.6.5 needs jax==0.4.20 jaxlib==0.4.20 "numpy<2" "scipy<1.12".
JAX = os.environ.get("JACPOT_BENCH_JAX", "")


class JaxPeer:
    """Run a script of ``peers/`` on the parameters of a module and on other arrays.

    Parameters
    ----------
    script
        Its name.
    module
        Its parameters go to the script by name, in PyTorch's layout.
    arrays
        Other inputs, by name.
    options
        Words for the command line.
    threads
        Cores that the process may use.
    """

    def __init__(
        self, script: str, module: nn.Module, arrays: dict[str, Tensor], *options: str, threads: int
    ):
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name)
        inputs = {**dict(module.named_parameters()), **arrays}
        numpy.savez(self.path / "problem.npz", **{k: v.detach().numpy() for k, v in inputs.items()})
        peer = Path(__file__).parent / "peers" / script
        affinity = ",".join(str(c) for c in sorted(os.sched_getaffinity(0))[:threads])
        self.process = subprocess.Popen(
            ["taskset", "-c", affinity, JAX, peer, self.path, *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self) -> Tensor | None:
        """Compute once; the result comes back the first time only."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("again\n")
        self.process.stdin.flush()
        if self.process.stdout.readline().strip() != "done":
            raise RuntimeError("neural-tangents stopped; see its message above")
        path = self.path / "result.npy"
        if not path.exists():
            return None
        result = torch.from_numpy(numpy.load(path))
        path.unlink()
        return result

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()
        self.folder.cleanup()
