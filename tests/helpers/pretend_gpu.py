"""A GPU that is pretended: tensors that say they are on one, and keep their numbers on the CPU.

Inside ``with PretendGpu():`` the device ``cuda:0`` exists. What PyTorch refuses on a real one is
refused: operations that mix tensors of both devices, and NumPy arrays of the GPU's memory. So
code that forgets a device somewhere fails here too. Arithmetic is the CPU's; jacpot's own kernels
are whatever `PretendKernels` is given, which see the CPU memory behind the tensors.

Nothing is said of the hardware: neither its arithmetic, nor streams, nor speed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pretend_streams
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from jacpot.ops import masked_matmul_cuda

GPU = torch.device("cuda", 0)

# Copies go between devices; indices may lie on the CPU.
MAY_MIX = {
    "aten::copy_",
    "aten::_to_copy",
    "aten::to",
    "aten::index",
    "aten::index_put_",
    "aten::_index_put_impl_",
}

OPERATORS = {
    "jacpot::masked_matmul": masked_matmul_cuda._forward,
    "jacpot::masked_matmul_backward": masked_matmul_cuda._backward,
    "jacpot::compress": masked_matmul_cuda._compress,
    "jacpot::expand": masked_matmul_cuda._expand,
}


class GpuTensor(torch.Tensor):
    """A tensor on the pretended GPU. PyTorch's core takes it for one without memory."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> GpuTensor:
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device="meta",
        )

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)
    is_meta = property(lambda self: False)
    is_cpu = property(lambda self: False)

    def __repr__(self) -> str:
        return f"GpuTensor({self.inner!r})"

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    __array__ = numpy

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def new_tensor(self, data: Any, **options: Any) -> torch.Tensor:
        return torch.tensor(data, **{"dtype": self.dtype, **options}).to(GPU)

    def __deepcopy__(self, memo: Any) -> GpuTensor:
        copied = self.detach().clone()
        if isinstance(self, torch.nn.Parameter):
            copied = torch.nn.Parameter(copied, self.requires_grad)
        memo[id(self)] = copied.requires_grad_(self.requires_grad)
        return copied

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def record_stream(self, stream: Any) -> None:
        pass

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _walk(value: Any, change: Callable[[Any], Any]) -> Any:
    """Change what plain containers hold; PyTorch's own walk takes most of the time here."""
    kind = type(value)
    if kind is tuple or kind is list:
        return kind([_walk(item, change) for item in value])
    if kind is dict:
        return {name: _walk(item, change) for name, item in value.items()}
    return change(value)


def unwrap(value: Any) -> Any:
    """Give what lies behind a tensor of the pretended GPU."""
    return value.inner if isinstance(value, GpuTensor) else value


def _on_cpu(value: Any) -> Any:
    return torch.device("cpu") if isinstance(value, torch.device) else unwrap(value)


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func._schema.name
    if name in OPERATORS:
        with PretendGpu():
            return OPERATORS[name](*args, **kwargs)
    tensors: list[torch.Tensor] = []
    _walk((args, kwargs), lambda t: tensors.append(t) if isinstance(t, torch.Tensor) else None)
    there = [t for t in tensors if isinstance(t, GpuTensor)]
    target = next((a for a in (*args, *kwargs.values()) if isinstance(a, torch.device)), None)
    on_gpu = bool(there) if target is None else target.type in ("meta", "cuda")
    if there and name not in MAY_MIX:
        for t in tensors:
            if not isinstance(t, GpuTensor) and t.dim() > 0:
                raise RuntimeError(
                    f"Expected all tensors to be on the same device, but {name} got cuda:0 and cpu"
                )
    if name == "aten::copy_" and pretend_streams.NOW:
        pretend_streams.NOW[-1].copy(unwrap(args[0]), unwrap(args[1]))
        return args[0]
    if name == "aten::_efficientzerotensor":  # which are expanded above the level that this is at
        func = torch.ops.aten.zeros.default
    inner_args, inner_kwargs = _walk((args, kwargs), _on_cpu)
    result = func(*inner_args, **inner_kwargs)
    if name == "aten::copy_":
        return args[0]
    if not on_gpu and there and target is not None and any(result is t.inner for t in there):
        result = result.clone()  # a copy between devices never shares memory
    written = {id(t.inner): t for t in there}
    return _walk(result, lambda t: _wrap(t, written, on_gpu))


def _wrap(value: Any, written: dict[int, GpuTensor], on_gpu: bool) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    if id(value) in written:  # an operation in place gives the tensor it was given
        return written[id(value)]
    return GpuTensor(value) if on_gpu else value


class _Devices(TorchFunctionMode):
    """Names of the GPU, as PyTorch without CUDA can take them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.device:
            return func(*args, **(kwargs or {}))
        renamed = _walk(kwargs or {}, self._rename)
        renamed.pop("pin_memory", None)
        return func(*_walk(args, self._rename), **renamed)

    @staticmethod
    def _rename(value: Any) -> Any:
        if isinstance(value, torch.device) and value.type == "cuda":
            return torch.device("meta")
        if isinstance(value, str) and value in ("cuda", "cuda:0"):
            return "meta"
        return value


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class PretendGpu:
    """The scope in which the device ``cuda:0`` exists."""

    def __enter__(self) -> PretendGpu:
        self.modes = [_Dispatch(), _Devices()]
        for mode in self.modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self.modes):
            mode.__exit__(*error)


class PretendKernels:
    """Kernels that take tensors of the pretended GPU, by ones that take those of the CPU."""

    def __init__(self, of_cpu: Any) -> None:
        self.of_cpu = of_cpu

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = getattr(self.of_cpu, name)
        return lambda *args, **kwargs: function(*_walk(args, unwrap), **_walk(kwargs, unwrap))
