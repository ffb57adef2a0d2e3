"""The tangent kernel of a network, streamed block by block."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

from jacpot._backend import core
from jacpot.linalg.arguments import check_count
from jacpot.nn.worn import check_module
from jacpot.ops.jacobian import Outputs, Precision
from jacpot.ops.jacobian_gram import check_precision
from jacpot.tangent.jacobian import Jacobian, JacobianSource, Wrt
from jacpot.tangent.journal import Journal, fingerprint
from jacpot.tangent.network import Inputs, Output, n_examples, tensors
from jacpot.tangent.offload import IN_FLIGHT
from jacpot.tangent.target import Place, Target, leaves_gpu

__all__ = ["ntk"]

LARGE_BYTES = 64 << 20  # of a kernel, whose factors' memory is then returned to the system


def ntk(
    module: nn.Module,
    x1: Inputs,
    x2: Inputs | None = None,
    mask: Mapping[str, Tensor] | None = None,
    wrt: Wrt = "kept",
    outputs: Outputs = "full",
    batch_size: int | None = None,
    out: Any = None,
    progress: bool = False,
    output: Output | None = None,
    memory_budget: int | None = None,
    precision: Precision = "exact",
) -> Any:
    """Compute the tangent kernel ``J(x1) J(x2)ᵀ`` of a network.

    Parameters
    ----------
    module, mask, wrt, output
        As in :func:`jacpot.jacobian`.
    x1, x2
        Examples ``(N, ...)`` and ``(M, ...)``; without ``x2`` the kernel of x1 with itself.
    outputs
        ``"full"``: ``(N, K, M, K)``. ``"trace"``: the sum over equal outputs, ``(N, M)``.
        ``"diagonal"``: equal outputs only, ``(N, M, K)``.
    batch_size
        Examples in a block, on either side. None: as many as the memory budget allows. The result
        does not depend on it beyond rounding.
    out
        Where the kernel goes: a tensor or array, a ``numpy.memmap``, a zarr array, or the path of a
        ``.npy`` file. What a GPU computes is copied to the host, and stored there, while the next
        block is computed. An interrupted computation into a file continues, when the same call is
        repeated, from the blocks that it finished: a journal beside the file names them, with their
        checksums, so that those of a file that was made anew, or damaged, are computed again.
    progress
        Show a progress bar.
    memory_budget
        Bytes for the factors and one block, about; ``out`` is not counted. None: 2 GiB, or half of
        a GPU's memory. Factors that fit are computed once. Else as many examples as fit are held at
        a time, in five eighths of it, while those of all others pass by.
    precision
        ``"3xtf32"`` and ``"tf32"`` allow the tensor cores of a GPU, see
        `jacpot.ops.jacobian.gram`.

    Returns
    -------
    Tensor or array
        The kernel: ``out``, the file's memmap, or a new tensor on the module's device. Without
        ``x2`` it is symmetric to the last bit.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As :func:`jacpot.jacobian`, and if ``out`` has another shape or dtype, cannot be written to,
        or holds part of another computation.
    OSError
        If there is no room for a file. Where ``out`` is a path, that is found out before anything
        is computed, and no file is left.

    Notes
    -----
    Jacot, Gabriel & Hongler 2018, "Neural tangent kernel".

    Examples
    --------
    >>> import torch, jacpot
    >>> net = torch.nn.Linear(3, 2)
    >>> x = torch.tensor([[1.0, 2.0, 3.0], [0.0, 1.0, 0.0]])
    >>> jacpot.ntk(net, x, outputs="trace")  # K (⟨x, x'⟩ + 1)
    tensor([[30.,  6.],
            [ 6.,  4.]])
    >>> on_disk = jacpot.ntk(net, x, outputs="trace", batch_size=1, out="kernel.npy")
    >>> float(on_disk[0, 1])
    6.0
    """
    if outputs not in ("full", "trace", "diagonal"):
        raise ValueError(
            f"argument 'outputs' must be 'full', 'trace' or 'diagonal', got {outputs!r}"
        )
    if batch_size is not None:
        batch_size = check_count("batch_size", batch_size, 1)
    check_precision(precision)
    check_module(module)
    if memory_budget is None:
        memory_budget = _memory_budget(next(module.parameters(), None))
    memory_budget = check_count("memory_budget", memory_budget, 1)
    source = JacobianSource(module, x1, mask, wrt, output, memory_budget=max(1, memory_budget // 4))
    n, k = n_examples(x1), source.n_outputs
    m = n if x2 is None else n_examples(x2, "x2")
    per_pair = {"full": k * k, "trace": 1, "diagonal": k}[outputs]
    blocks = 1 + IN_FLIGHT if leaves_gpu(source.network.device, out) else 1
    sides = 1 if x2 is None else 2
    step, width = _plan(source, x1, max(n, m), per_pair * blocks, memory_budget, sides, batch_size)
    if out is None and step >= max(n, m):
        left, right = source(x1), None if x2 is None else source(x2)
        finish = left.prepared_gram(right, outputs, precision)
        to_write = n * m * per_pair * source.dtype.itemsize
        worth_it = LARGE_BYTES < to_write < 16 * left.nbytes
        del source, left, right  # nothing of them is needed while the kernel is written
        if worth_it:
            core.return_free_memory()
        return finish()

    source.renew(x1)  # of a kernel that is written block by block the shape has to be right
    k = source.n_outputs
    shape = {"full": (n, k, m, k), "trace": (n, m), "diagonal": (n, m, k)}[outputs]
    target = Target(out, shape, source.dtype, source.network.device)
    header: dict[str, object] = {"batch_size": step}
    if target.journal is not None:
        header |= _identity(source, x1, x2, [outputs, wrt, precision, shape])
    symmetric = x2 is None
    rows, columns, right_x = _cut(n, step), _cut(m, step), x1 if x2 is None else x2
    with ExitStack() as stack:
        journal = stack.enter_context(Journal(target.journal, header, target.flush))
        advance = stack.enter_context(_bar(n * m, progress))
        for first in range(0, len(rows), width):
            band = range(first, min(first + width, len(rows)))
            held: dict[int, Jacobian] = {}
            for j in range(first if symmetric else 0, len(columns)):
                met = [i for i in band if i <= j or not symmetric]
                places = {
                    i: _places(outputs, rows[i], columns[j], symmetric and i != j) for i in met
                }
                missing = [
                    i
                    for i in met
                    if (found := journal.finished.get((i, j))) is None
                    or not target.holds(places[i], found)
                ]
                passing = None  # its memory is free for the next one
                if missing:
                    passing = source(right_x, columns[j])
                    if symmetric and j in band:
                        held[j] = passing
                for i in missing:
                    if i not in held:
                        held[i] = source(x1, rows[i])
                    block = held[i].gram(
                        None if symmetric and i == j else passing, outputs, precision
                    )
                    target.write(block, places[i], partial(journal.done, (i, j)))
                    del block
                pairs = sum(rows[i].stop - rows[i].start for i in met)
                mirrored = sum(rows[i].stop - rows[i].start for i in met if symmetric and i != j)
                advance((pairs + mirrored) * (columns[j].stop - columns[j].start))
        target.finish()
    return target.array


def _identity(
    source: JacobianSource, x1: Inputs, x2: Inputs | None, words: list[object]
) -> dict[str, object]:
    """Say what tells this computation from another: all its numbers, and what code makes of them.

    Code has no fingerprint. What it gives for the first example stands for it.
    """
    network = source.network
    kept = network.module.state_dict()
    parts = [network.state, network.mask, {k: v for k, v in kept.items() if isinstance(v, Tensor)}]
    names = [list(network.parameters), *map(list, parts)]
    numbers = [*[x for part in parts for x in part.values()], *tensors(x1), *tensors(x2)]
    digest = fingerprint([*words, *names], numbers)
    first = source(x1, slice(1)).gram(outputs="trace").sum()
    return {"fingerprint": digest, "first": float(first)}


def _cut(n: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


def _memory_budget(parameter: Tensor | None) -> int:
    if parameter is None or not parameter.is_cuda:
        return 1 << 31
    # Of all memory, not of what is free: blocks of a kernel on disk must be the same next time.
    return int(torch.cuda.get_device_properties(parameter.device).total_memory) // 2


def _plan(
    source: JacobianSource,
    x: Inputs,
    n: int,
    per_pair: int,
    budget: int,
    sides: int,
    batch_size: int | None,
) -> tuple[int, int]:
    """Say how many examples a block has, and how many blocks are held while others pass by.

    What is held takes five eighths of the budget, what passes by one eighth; a quarter is for
    computing it.
    """
    pairs = math.isqrt(budget // max(1, 4 * per_pair * source.dtype.itemsize))
    few = budget // (8 * max(1, source.n_outputs * source.probe.bytes_per_example))
    each = 0
    if n > few:  # too many for a guess: measure
        each = max(1, source(x, slice(1)).nbytes)
        one_block = n <= pairs and sides * n * each <= budget // 2
        few = n if one_block else budget // (8 * each)
    step = batch_size or max(1, min(n, pairs, few))
    return step, max(1, budget * 5 // 8 // (each * step)) if each else max(1, n)


def _places(outputs: Outputs, here: slice, there: slice, mirrored: bool) -> list[Place]:
    """Where a block ``(n, [K,] m, [K])`` goes: a symmetric kernel has it twice."""
    every = slice(None)
    if outputs == "full":
        straight = (here, every, there, every), (0, 1, 2, 3)
        return [straight, ((there, every, here, every), (2, 3, 0, 1))] if mirrored else [straight]
    rest = (2,) if outputs == "diagonal" else ()
    first: Place = (here, there), (0, 1, *rest)
    return [first, ((there, here), (1, 0, *rest))] if mirrored else [first]


@contextmanager
def _bar(total: int, shown: bool) -> Iterator[Any]:
    """Give what advances a progress bar."""
    if not shown:
        yield lambda _: None
        return
    columns = (
        TextColumn("kernel"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%  {task.completed:,}/{task.total:,} pairs"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as bar:
        task = bar.add_task("kernel", total=total)
        yield lambda pairs: bar.advance(task, pairs)
