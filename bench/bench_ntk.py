"""Time tangent kernels of whole modules, capture of the factors included.

The peers:

- ``torch.func``: Jacobians by ``vmap(jacrev)``, contracted;
- the factored formula in plain PyTorch, from the same factors;
- the symmetric products that it contains, by the BLAS, nothing else;
- neural-tangents' structured derivatives, when ``JACPOT_BENCH_JAX`` names a Python that has it: it
  runs in a process of its own that takes turns with ours.

    python bench/bench_ntk.py --case mlp-1000
"""

from __future__ import annotations

import functools
import multiprocessing
import time
from collections.abc import Callable
from itertools import pairwise

import torch
from harness import Report, max_error, on_gpu, parser, peak_above, set_up
from jax_peer import JAX, JaxPeer
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

import jacpot
from jacpot.ops.jacobian_kernels import kernels


def mlp(*sizes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i, o in pairwise(sizes):
        layers += [nn.Linear(i, o), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def cnn() -> nn.Sequential:
    convs = [m for c in (3, 32, 32) for m in (nn.Conv2d(c, 32, 3, padding=1), nn.ReLU())]
    return nn.Sequential(*convs, nn.Flatten(), nn.Linear(32 * 32 * 32, 10))


class Block(nn.Module):
    """The basic block of ResNet-18."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.skip: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.skip = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (y + self.skip(x)).relu()


def resnet18() -> nn.Sequential:
    widths = [64, 64, 64, 128, 128, 256, 256, 512, 512]
    blocks = [Block(i, o, 2 if i != o else 1) for i, o in pairwise(widths)]
    stem = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10)]
    return nn.Sequential(*stem, *blocks, *head).eval()


def by_torch_func(module: nn.Module, x: Tensor, outputs: str) -> Tensor:
    params = {k: v.detach() for k, v in module.named_parameters()}
    buffers = dict(module.named_buffers())

    def one(p: dict[str, Tensor], xi: Tensor) -> Tensor:
        return functional_call(module, (p, buffers), (xi[None],))[0]

    jacobians = vmap(jacrev(one), (None, 0))(params, x)
    kernel: Tensor | float = 0.0
    for j in jacobians.values():
        flat = j.flatten(2)
        if outputs == "full":
            rows = flat.flatten(0, 1)
            kernel = kernel + (rows @ rows.T).view(*flat.shape[:2], *flat.shape[:2])
        else:
            kernel = kernel + flat.flatten(1) @ flat.flatten(1).T
    return kernel


def by_plain_torch(module: nn.Module, x: Tensor) -> Tensor:
    """The full kernel of a perceptron, layer by layer, from the same factors."""
    kernel: Tensor | float = 0.0
    for block in jacpot.jacobian(module, x).blocks:
        n, k = block.n_examples, block.n_outputs
        a, s = block.activations[:, 0, 0], block.signals[:, :, 0, 0].flatten(0, 1)
        product = (s @ s.T).view(n, k, n, k)
        kernel = kernel + (a @ a.T + block.bias)[:, None, :, None] * product
    return kernel


def symmetric_products(module: nn.Module, x: Tensor) -> Callable[[], None]:
    """The products over one triangle that the full kernel contains, and nothing else."""
    blocks = jacpot.jacobian(module, x).blocks
    activations = [b.activations[:, 0, 0].contiguous() for b in blocks]
    signals = [b.signals[:, :, 0, 0].flatten(0, 1).contiguous() for b in blocks[:-1]]
    small, large = (torch.zeros(len(f[0]), len(f[0])) for f in (activations, signals))

    def run() -> None:
        for a in activations:
            kernels(small).jacobian_add_row_products(a, None, small, torch.get_num_threads())
        for s in signals:
            kernels(large).jacobian_add_row_products(s, None, large, torch.get_num_threads())

    return run


def masked_module(module: nn.Module, density: float) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    masks = {}
    for name, p in module.named_parameters():
        if p.ndim > 1:
            masks[name] = (
                torch.rand(p.shape, generator=generator, device="cpu").to(p.device) < density
            )
            p.data *= masks[name]
    return masks


def by_masked_rows(module: nn.Module, x: Tensor, masks: dict[str, Tensor]) -> Tensor:
    """The dense Jacobian times its mask, times its transpose, a few examples at a time."""
    j = jacpot.jacobian(module, x)
    dense = j.dense().flatten(0, 1)
    flat = {k: masks.get(k, torch.ones_like(p)).float() for k, p in module.named_parameters()}
    dense *= j.flatten(flat)
    n, k = j.n_examples, j.n_outputs
    return (dense @ dense.T).view(n, k, n, k)


def peak_memory(case: str) -> float:
    """The peak while the kernel under a mask is computed for the first time, over its size."""
    make, shape, outputs = CASES[case]
    module, x = make(), torch.randn(*shape)
    masks = masked_module(module, 0.1)
    jacpot.ntk(module, x[:20], mask=masks, outputs=outputs)  # code and threads
    kernel = []
    peak = peak_above(lambda: kernel.append(jacpot.ntk(module, x, mask=masks, outputs=outputs)))
    return peak * 2**20 / kernel[0].nbytes


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "mlp-200": (lambda: mlp(784, 300, 100, 10), (200, 784), "full"),
    "mlp-1000": (lambda: mlp(784, 300, 100, 10), (1000, 784), "full"),
    "wide-500": (lambda: mlp(784, 512, 512, 512, 10), (500, 784), "full"),
    "2048-16": (lambda: mlp(3072, 2048, 2048, 2048, 8), (16, 3072), "full"),
    "cnn-100": (cnn, (100, 3, 32, 32), "trace"),
    "resnet18-64": (resnet18, (64, 3, 32, 32), "trace"),
    "masked-500": (lambda: mlp(784, 300, 100, 10), (500, 784), "full"),
}
ROWS_FIT = {"mlp-200": 200, "2048-16": 4, "cnn-100": 20, "resnet18-64": 4}


def run(report: Report, case: str, options: object) -> None:
    make, shape, outputs = CASES[case]
    torch.manual_seed(0)
    module, x = make(), torch.randn(*shape)
    if case == "masked-500":
        masks = masked_module(module, 0.1)
        few = x[:100]
        report.compare(
            "masked-100 (90% zeros)",
            {
                "jacpot": lambda: jacpot.ntk(module, few, mask=masks),
                "masked dense J": lambda: by_masked_rows(module, few, masks),
            },
            max_rounds=options.rounds,
        )
        context = multiprocessing.get_context("spawn")
        with context.Pool(1) as fresh:
            print(f"{case}: peak memory is {fresh.apply(peak_memory, (case,)):.3f} of the kernel's")
        ours = functools.partial(jacpot.ntk, module, x, mask=masks)
        if options.slow:
            peer = functools.partial(by_masked_rows, module, x, masks)
            once(report, case, ours, "masked dense J", peer, options.budget)
        else:
            report.compare(case, {"jacpot": ours}, budget=options.budget)
        return
    contenders: dict[str, Callable[[], object]] = {
        "jacpot": lambda: jacpot.ntk(module, x, outputs=outputs)
    }
    if outputs == "full":
        contenders["plain torch"] = lambda: by_plain_torch(module, x)
    structured = None
    if JAX and case != "resnet18-64" and not on_gpu():
        structured = JaxPeer(
            "structured_derivatives.py", module, {"x": x}, outputs, threads=options.threads
        )
        contenders["neural-tangents"] = structured
    elif case != "resnet18-64" and not on_gpu():
        print(f"{case}: neural-tangents is left out; JACPOT_BENCH_JAX names no Python that has it")
    try:
        report.compare(
            case, contenders, budget=options.budget, min_rounds=3, max_rounds=options.rounds
        )
    finally:
        if structured is not None:
            structured.close()
    if outputs == "full":
        left = jacpot.jacobian(module, x)
        bound = symmetric_products(module, x)
        report.compare(
            f"{case}, from factors",
            {"jacpot": lambda: left.gram(outputs=outputs), "products only": bound},
            agree=None,
            budget=options.budget,
            max_rounds=options.rounds,
        )
    if case in ROWS_FIT:
        few = x[: ROWS_FIT[case]]
        ours = functools.partial(jacpot.ntk, module, few, outputs=outputs)
        by_func = functools.partial(by_torch_func, module, few, outputs)
        once(report, f"{case}, N={len(few)}", ours, "torch.func", by_func, options.budget)


def once(
    report: Report,
    case: str,
    ours: Callable[[], Tensor],
    name: str,
    peer: Callable[[], Tensor],
    budget: float,
) -> None:
    """Compare with a peer that takes so long that one call has to do."""
    start = time.perf_counter()
    expected = peer()
    seconds = time.perf_counter() - start
    report.compare(f"{case} (one call)", {"jacpot": ours}, budget=budget / 4)
    row = report.rows[-1]
    row["error"][name] = max_error(ours(), expected)
    row["median_seconds"][name] = seconds
    row["ratio"][name] = seconds / row["median_seconds"]["jacpot"]
    assert row["error"][name] < 1e-3
    report.keep()


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--case", action="append", choices=list(CASES), help="default: all")
    options.add_argument("--budget", type=float, default=10.0, help="seconds of a comparison")
    options.add_argument("--slow", action="store_true", help="peers that take minutes as well")
    chosen = options.parse_args()
    chosen.rounds = 3 if chosen.quick else 50
    set_up(chosen)
    report = Report("Tangent kernels, float32, capture included", path=chosen.json)
    for case in chosen.case or CASES:
        run(report, case, chosen)
    report.show()


if __name__ == "__main__":
    main()
