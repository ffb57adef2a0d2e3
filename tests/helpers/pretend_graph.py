"""CUDA graphs of emulated kernels: recorded without being run, replayed on the same memory.

Inside a recording nothing is computed: what operations give is NaN until the graph is replayed, and
what they would change stays. Replaying runs them on the very tensors of the recording. So a step
that makes a tensor outside, or uses one that was replaced since, fails here as it would on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode

HOST_ONLY = (
    "eigen_limit",
    "masked_matmul_splits",
    "masked_matmul_tile",
    "masked_matmul_vector_tile",
)


class PretendGraph:
    """What stands in for ``torch.cuda.CUDAGraph``."""

    recording: PretendGraph | None = None
    made: ClassVar[list[PretendGraph]] = []

    def __init__(self) -> None:
        self.work: list[Callable[[], Any]] = []
        self.replays = 0
        PretendGraph.made.append(self)

    def capture_begin(self, capture_error_mode: str) -> None:
        assert capture_error_mode == "thread_local"
        PretendGraph.recording = self
        self._mode = _Record(self)
        self._mode.__enter__()

    def capture_end(self) -> None:
        self._mode.__exit__(None, None, None)
        PretendGraph.recording = None

    def replay(self) -> None:
        self.replays += 1
        for call in self.work:
            call()


class _Record(TorchDispatchMode):
    def __init__(self, graph: PretendGraph) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _asks_the_device(func._schema.name, args):
            raise RuntimeError("operation not permitted when stream is capturing")
        if func._schema.is_mutable:
            self.graph.work.append(lambda: func(*args, **kwargs))
            written = [a.name for a in func._schema.arguments if a.alias_info is not None]
            return kwargs[written[0]] if written[0] in kwargs else args[0]
        out = func(*args, **kwargs)
        if func.is_view:
            return out
        for part in _parts(out):
            if part.is_floating_point():  # indices may only depend on what never changes
                part.fill_(torch.nan)

        def again() -> None:
            for part, value in zip(_parts(out), _parts(func(*args, **kwargs)), strict=True):
                part.copy_(value)

        self.graph.work.append(again)
        return out


def _asks_the_device(name: str, args: Any) -> bool:
    """Whether an operation's result, or its size, has to be known on the host."""
    if name in ("aten::index", "aten::index_put", "aten::index_put_"):
        return any(i is not None and i.dtype == torch.bool for i in args[1])
    asking = ("nonzero", "_unique2", "masked_select", "_local_scalar_dense", "equal")
    return name.removeprefix("aten::") in asking


def _parts(result: Any) -> list[torch.Tensor]:
    return list(result) if isinstance(result, (tuple, list)) else [result]


class RecordedKernels:
    """Kernels that are recorded, not run, inside a recording."""

    def __init__(self, kernels: Any) -> None:
        self.kernels = kernels

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = getattr(self.kernels, name)

        def call(*args: Any) -> Any:
            if PretendGraph.recording is None or name in HOST_ONLY:
                return function(*args)
            PretendGraph.recording.work.append(lambda: function(*args))
            return None

        return call
