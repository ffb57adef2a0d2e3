"""The scalar tangent kernel of all 60,000 MNIST training images, in a file.

LeNet-300-100 (784-300-100-10) at its random initialisation, trace over the ten outputs, float32:
60,000 x 60,000 numbers, 14.4 GB. Killed, it continues from the finished blocks when it is started
again with the same arguments. Images come from the folder that JACPOT_DATA names.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path

import torch
from torch import nn

import jacpot
from jacpot.studies.data import load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="the .npy file")
    parser.add_argument("--examples", type=int, default=60_000)
    parser.add_argument("--batch-size", type=int, default=4096)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
    )
    x = torch.as_tensor(load("mnist").x_train).float().flatten(1)[: arguments.examples]
    began = time.perf_counter()
    kernel = jacpot.ntk(
        net,
        x,
        outputs="trace",
        batch_size=arguments.batch_size,
        out=arguments.out,
        progress=True,
    )
    seconds = time.perf_counter() - began
    rows = torch.randint(len(x), (64,))
    exact = jacpot.ntk(net.double(), x[rows].double(), outputs="trace")
    found = torch.stack([torch.from_numpy(kernel[row][rows]) for row in rows.tolist()])
    report = {
        "shape": list(kernel.shape),
        "seconds of this run": round(seconds, 1),
        "peak memory, GB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "relative error of 64 x 64 entries": float((found - exact).abs().max() / exact.abs().max()),
        "environment": jacpot.build_info(),
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
