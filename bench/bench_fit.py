"""Tangent-space fits on MNIST, against what others solve them with.

    JACPOT_DATA=folder python bench/bench_fit.py CASE... [--json FILE]

Each contender stops at a true relative residual of the dual system, recomputed in float64; setup
counts. The peers:

- conjugate gradients through ``torch.func``, which also stop after ``--patience`` times our
  seconds, and say how far they came;
- the inverse of curvlinops, conjugate gradients on its Jacobian times its transpose;
- neural-tangents, which makes the kernel and solves it by Cholesky, compiled and warm: where
  ``JACPOT_BENCH_JAX`` names a Python that has it.

The last two, of small cases only, know no limit of time. ``error`` is that of a peer's predictions
for test inputs against ours, relative to the largest.
"""

from __future__ import annotations

import itertools
import resource
import time
from dataclasses import dataclass
from typing import Any

import torch
from harness import Report, max_error, parser, set_up
from jax_peer import JAX, JaxPeer
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp

import jacpot
from jacpot.studies.data import load
from jacpot.tangent.operators import JacobianOperator, KernelOperator


@dataclass(frozen=True)
class Case:
    """A network, how much of MNIST, and how well it is to be solved."""

    examples: int
    widths: tuple[int, ...]
    ridge: float  # of the kernel's mean diagonal
    tol: float
    peers: tuple[str, ...] = ("torch_func_cg",)


CASES = {
    "ridge-0.1": Case(10_000, (300, 100), 0.1, 1e-4),
    "ridge-0.001": Case(10_000, (300, 100), 0.001, 1e-4),
    "wide": Case(4_000, (1000, 1000), 0.01, 1e-5),
    "all": Case(60_000, (300, 100), 0.1, 1e-3, peers=()),
    "small": Case(2_000, (300, 100), 0.1, 1e-4, peers=("torch_func_cg", "curvlinops")),
    "few": Case(
        1_000, (300, 100), 0.1, 1e-4, peers=("torch_func_cg", "curvlinops", "neural_tangents")
    ),
}


def network(widths: tuple[int, ...]) -> nn.Sequential:
    torch.manual_seed(0)
    sizes = (784, *widths, 10)
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def mnist(n: int) -> tuple[Tensor, ...]:
    data = load("mnist")
    pairs = ((data.x_train[:n], data.y_train[:n]), (data.x_test, data.y_test))
    out: list[Tensor] = []
    for x, labels in pairs:
        pixels = torch.as_tensor(x).float().flatten(1)
        if float(pixels.max()) > 2:
            pixels = (pixels / 255 - 0.1307) / 0.3081
        device = torch.get_default_device()
        out += [pixels.to(device), torch.as_tensor(labels).long().to(device)]
    return tuple(out)


def torch_func_cg(
    net: nn.Module, x: Tensor, r: Tensor, ridge: float, tol: float, cap: float
) -> tuple[Tensor, int]:
    """Plain CG on ``J Jᵀ + ridge·I`` through jvp and one saved vjp, float32; and iterations."""
    start = time.perf_counter()
    parameters = {name: p.detach() for name, p in net.named_parameters()}

    def outputs(p: dict[str, Tensor]) -> Tensor:
        return functional_call(net, p, (x,))

    _, pull = vjp(outputs, parameters)

    def product(u: Tensor) -> Tensor:
        return jvp(outputs, (parameters,), pull(u))[1] + ridge * u

    a, s = torch.zeros_like(r), r.clone()
    p, rr, first = s.clone(), float(s.square().sum()), float(r.square().sum())
    iterations = 0
    while time.perf_counter() - start < cap:
        q = product(p)
        step = rr / float((p * q).sum())
        a += step * p
        s -= step * q
        after = float(s.square().sum())
        p = s + after / rr * p
        rr = after
        iterations += 1
        if rr <= tol * tol * first:
            break
    return a, iterations


def curvlinops_cg(net: nn.Module, x: Tensor, r: Tensor, ridge: float, tol: float) -> Tensor:
    """The same by curvlinops, whose products go through the network again, float32."""
    from curvlinops import (
        CGInverseLinearOperator,
        JacobianLinearOperator,
        TransposedJacobianLinearOperator,
    )
    from curvlinops.examples import IdentityLinearOperator

    of = (net, list(net.parameters()), [(x, r)])
    forward = JacobianLinearOperator(*of, check_deterministic=False)
    backward = TransposedJacobianLinearOperator(*of, check_deterministic=False)
    identity = IdentityLinearOperator([tuple(r.shape)], r.device, r.dtype)
    kernel = forward @ backward + ridge * identity
    inverse = CGInverseLinearOperator(kernel, tolerance=tol, max_iter=10_000, eps=1e-30)
    solution: Tensor = (inverse @ r.flatten()).reshape(r.shape)
    return solution


def neural_tangents(
    net: nn.Module, arrays: dict[str, Tensor], threads: int
) -> tuple[Tensor, float]:
    """Predictions for ``x_test``, and the seconds they take when all is compiled."""
    peer = JaxPeer("predict.py", net, arrays, threads=threads)
    try:
        predicted = peer()
        assert predicted is not None
        start = time.perf_counter()
        peer()
        return predicted, time.perf_counter() - start
    finally:
        peer.close()


def announce(iteration: int, residual: float, seconds: float) -> None:
    if iteration % 10 == 0:
        print(f"iteration {iteration}: residual {residual:.2e}, {seconds:.1f} s", flush=True)


def run(case: Case, preconditioner: Any, patience: float, progress: bool) -> dict[str, Any]:
    x, labels, x_test, labels_test = mnist(case.examples)
    net = network(case.widths)
    y = torch.nn.functional.one_hot(labels, 10).float() - 0.1
    j = jacpot.jacobian(net, x)
    ridge = case.ridge * float(j.row_norms().double().square().mean())
    kernel = KernelOperator(JacobianOperator(j.blocks, j.n_examples, j.n_outputs)).double()
    r = (y - j.outputs).double()

    def true_residual(a: Tensor) -> float:
        flat = a.double().reshape(-1)
        return float((r.reshape(-1) - kernel @ flat - ridge * flat).norm() / r.norm())

    lin = jacpot.linearize(net)
    start = time.perf_counter()
    fit = lin.fit(
        x, y, ridge=ridge, method="dual", tol=case.tol, preconditioner=preconditioner,
        callback=announce if progress else None,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    with torch.no_grad():
        accuracy = float((lin(x_test).argmax(1) == labels_test).double().mean())
    row: dict[str, Any] = {
        "seconds": seconds,
        "setup_seconds": fit.setup_seconds,
        "iterations": fit.iterations,
        "products": fit.details["products"],
        "status": fit.status.value,
        "residual": true_residual(fit.details["dual"]),
        "preconditioner": fit.preconditioner,
        "test_accuracy": accuracy,
        "peak_gigabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }
    few = x_test[:200]
    ours = lin(few).detach()
    for peer in case.peers if patience > 0 else ():
        start = time.perf_counter()
        found: dict[str, Any] = {}
        if peer == "neural_tangents":
            if not JAX:
                print(f"{peer} is left out; JACPOT_BENCH_JAX names no Python that has it")
                continue
            arrays = {"x": x, "y": y, "x_test": few, "ridge": torch.tensor(ridge)}
            predicted, found["seconds"] = neural_tangents(net, arrays, torch.get_num_threads())
        else:
            if peer == "curvlinops":
                dual = curvlinops_cg(net, x, r.float(), ridge, case.tol)
            else:
                cap = patience * seconds
                dual, found["iterations"] = torch_func_cg(net, x, r.float(), ridge, case.tol, cap)
            found["seconds"] = time.perf_counter() - start
            found["residual"] = true_residual(dual)
            lin.set_delta(j.unflatten(j.T @ dual))
            predicted = lin(few).detach()
        row[peer] = {
            **found,
            "error": max_error(predicted, ours),
            "ratio": found["seconds"] / seconds,
        }
    return row


def main() -> None:
    options = parser(__doc__)
    options.add_argument("case", nargs="*", help=f"of {', '.join(CASES)}; by default small")
    options.add_argument("--preconditioner", default="auto")
    options.add_argument("--patience", type=float, default=12.0)
    options.add_argument("--progress", action="store_true", help="print every tenth iteration")
    arguments = options.parse_args()
    set_up(arguments)
    report = Report("Tangent-space fits, MNIST")
    for name in arguments.case or ["small"]:
        row = {
            "case": name,
            **run(CASES[name], arguments.preconditioner, arguments.patience, arguments.progress),
        }
        report.rows.append(row)
        print(row, flush=True)
    if arguments.json:
        report.save(arguments.json)


if __name__ == "__main__":
    main()
