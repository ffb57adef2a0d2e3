"""Newton's method on MNIST: the softmax fit of the tangent space, and the network itself.

    JACPOT_DATA=folder python bench/bench_newton.py [softmax] [network] [--json FILE]

``softmax``: Newton steps until the KKT residual is 1e-5 of its start. ``network``: Gauss-Newton on
LeNet-300-100 against 20 epochs of Adam from the same weights, at several learning rates: the time
until each one's best training loss is reached, and a tenth of it.
"""

from __future__ import annotations

import copy
import math
import time
from typing import Any

import torch
from bench_fit import mnist, network
from harness import Report, parser, set_up
from torch.nn.functional import cross_entropy

import jacpot

RATES = (5e-4, 1e-3, 1.2e-3, 2e-3)  # of Adam


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


def adam(
    net: torch.nn.Module, x: torch.Tensor, labels: torch.Tensor, rate: float
) -> tuple[float, float]:
    """Give the best mean loss after each of 20 epochs, and the seconds of the training alone."""
    optimizer = torch.optim.Adam(net.parameters(), lr=rate)
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


def gauss_newton(examples: int, limit: float) -> list[dict[str, Any]]:
    x, labels, _, _ = mnist(examples)
    net = network((300, 100))
    rows = []
    for rate in RATES:
        loss, seconds = adam(copy.deepcopy(net), x, labels, rate)
        rows.append({"adam_rate": rate, "adam_loss": loss, "adam_seconds": seconds})
        print(f"Adam at {rate:g}: loss {loss:.2e} in {seconds:.1f} s", flush=True)
    trail: list[tuple[float, float]] = []
    last = min(row["adam_loss"] for row in rows) / 10
    watching = 0.0  # as with Adam, not of the training

    def watch(step: int, loss: float, elapsed: float) -> bool:
        nonlocal watching
        start, elapsed = time.perf_counter(), elapsed - watching
        with torch.no_grad():  # of all examples, not of the step's batch
            loss = float(cross_entropy(net(x), labels))
        watching += time.perf_counter() - start
        trail.append((loss, elapsed))
        print(f"step {step}: loss {loss:.2e}, {elapsed:.1f} s", flush=True)
        return loss > last and elapsed < limit

    result = jacpot.gauss_newton(
        net, x, labels, loss="cross_entropy", callback=watch, max_steps=1000
    )
    for row in rows:
        for name, share in (("seconds_until", 1), ("seconds_until_a_tenth", 0.1)):
            reached = (at for loss, at in trail if loss <= share * row["adam_loss"])
            row[name] = next(reached, math.inf)
        row |= {"case": f"Gauss-Newton, N={examples}", "steps": result.steps}
    return rows


def main() -> None:
    options = parser(__doc__)
    options.add_argument("case", nargs="*", default=["softmax", "network"])
    options.add_argument("--ridge", type=float, default=0.1, help="of the mean diagonal")
    options.add_argument("--limit", type=float, default=120.0, help="seconds of Gauss-Newton")
    arguments = options.parse_args()
    set_up(arguments)
    examples = 1000 if arguments.quick else 10_000
    report = Report("Newton's method, MNIST")
    for name in arguments.case:
        if name == "softmax":
            rows = [softmax(examples, arguments.ridge)]
        else:
            rows = gauss_newton(examples, arguments.limit)
        print(*rows, sep="\n", flush=True)
        report.rows += rows
    if arguments.json:
        report.save(arguments.json)


if __name__ == "__main__":
    main()
