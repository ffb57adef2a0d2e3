"""Newton's method on MNIST: the softmax fit of the tangent space, and the network itself.

    JACPOT_DATA=folder python bench/bench_newton.py [softmax] [network] [--json FILE]

``softmax``: Newton steps until the KKT residual is 1e-5 of its start. ``network``: Gauss-Newton on
LeNet-300-100 against 20 epochs of Adam from the same weights: the time until Adam's best training
loss is reached, and a tenth of it.
"""

from __future__ import annotations

import copy
import math
import time
from typing import Any

import torch
from bench_fit import mnist, network
from harness import Report, parser
from torch.nn.functional import cross_entropy

import jacpot


def softmax(examples: int, share: float) -> dict[str, Any]:
    x, labels, x_test, labels_test = mnist(examples)
    net = network((300, 100))
    ridge = share * float(jacpot.jacobian(net, x).row_norms().double().square().mean())
    lin = jacpot.linearize(net)

    def announce(step: int, residual: float, seconds: float) -> None:
        print(f"step {step}: KKT residual {residual:.2e}, {seconds:.1f} s", flush=True)

    fit = lin.fit(x, labels, loss="cross_entropy", ridge=ridge, tol=1e-5, callback=announce)
    with torch.no_grad():
        accuracy = float((lin(x_test).argmax(1) == labels_test).double().mean())
    return {
        "case": f"softmax, N={examples}, ridge {share:g} of the mean diagonal",
        "steps": fit.iterations,
        "kkt": fit.relative_residual,
        "inner_iterations": fit.details["inner_iterations"],
        "seconds": fit.seconds,
        "status": fit.status.value,
        "test_accuracy": accuracy,
    }


def adam(net: torch.nn.Module, x: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
    """Give the best mean loss after each of 20 epochs, and the seconds of the training alone."""
    optimizer = torch.optim.Adam(net.parameters(), lr=1.2e-3)
    best, seconds = math.inf, 0.0
    for _ in range(20):
        start = time.perf_counter()
        for batch in torch.randperm(len(x)).split(60):
            optimizer.zero_grad()
            cross_entropy(net(x[batch]), labels[batch]).backward()
            optimizer.step()
        seconds += time.perf_counter() - start
        with torch.no_grad():
            best = min(best, float(cross_entropy(net(x), labels)))
    return best, seconds


def gauss_newton(examples: int, limit: float) -> dict[str, Any]:
    x, labels, _, _ = mnist(examples)
    net = network((300, 100))
    target, seconds = adam(copy.deepcopy(net), x, labels)
    print(f"Adam: loss {target:.2e} in {seconds:.1f} s", flush=True)
    reached: dict[str, float] = {}

    def watch(step: int, loss: float, elapsed: float) -> bool:
        print(f"step {step}: loss {loss:.2e}, {elapsed:.1f} s", flush=True)
        if loss <= target:  # of the step's batch, maybe: all examples decide, on our time
            with torch.no_grad():
                loss = float(cross_entropy(net(x), labels))
        for name, value in (("adam's best", target), ("a tenth of it", target / 10)):
            if loss <= value:
                reached.setdefault(name, elapsed)
        return len(reached) < 2 and elapsed < limit

    result = jacpot.gauss_newton(
        net, x, labels, loss="cross_entropy", callback=watch, max_steps=1000
    )
    return {
        "case": f"Gauss-Newton, N={examples}",
        "adam_loss": target,
        "adam_seconds": seconds,
        "seconds_until": reached,
        "steps": result.steps,
        "inner_iterations": result.inner_iterations,
        "loss": result.losses[-1],
    }


def main() -> None:
    options = parser(__doc__)
    options.add_argument("case", nargs="*", default=["softmax", "network"])
    options.add_argument("--ridge", type=float, default=0.1, help="of the mean diagonal")
    options.add_argument("--limit", type=float, default=120.0, help="seconds of Gauss-Newton")
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    examples = 1000 if arguments.quick else 10_000
    report = Report("Newton's method, MNIST")
    for name in arguments.case:
        if name == "softmax":
            report.rows.append(softmax(examples, arguments.ridge))
        else:
            report.rows.append(gauss_newton(examples, arguments.limit))
        print(report.rows[-1], flush=True)
    if arguments.json:
        report.save(arguments.json)


if __name__ == "__main__":
    main()
