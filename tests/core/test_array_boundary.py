from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch

from jacpot._backend import core

NUMPY_DTYPES = [
    "bool",
    "uint8",
    "uint16",
    "int16",
    "int32",
    "int64",
    "float16",
    "float32",
    "float64",
]
TORCH_DTYPES = [*(d for d in NUMPY_DTYPES), "bfloat16"]


@pytest.mark.parametrize("dtype", NUMPY_DTYPES)
def test_numpy_arrays_are_seen_in_place(dtype):
    array = np.zeros((3, 4, 5), dtype=dtype)[:, ::2, 1:]
    seen = core.describe_array(array)
    assert seen["dtype"] == dtype
    assert seen["shape"] == array.shape
    assert seen["stride"] == tuple(s // array.itemsize for s in array.strides)
    assert seen["pointer"] == array.ctypes.data
    assert not seen["contiguous"]


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_torch_tensors_are_seen_in_place(dtype):
    tensor = torch.zeros(3, 4, 5, dtype=getattr(torch, dtype)).transpose(0, 2)[1:]
    seen = core.describe_array(tensor)
    assert seen["dtype"] == dtype
    assert seen["shape"] == tuple(tensor.shape)
    assert seen["stride"] == tensor.stride()
    assert seen["pointer"] == tensor.data_ptr()
    assert seen["device"] == "cpu"


@pytest.mark.parametrize("shape", [(), (0,), (1,), (0, 3), (1, 1), (4, 0, 2)])
def test_empty_and_single_element_arrays_count_as_contiguous(shape):
    for array in (np.zeros(shape), torch.zeros(shape)):
        seen = core.describe_array(array)
        assert seen["shape"] == shape
        assert seen["contiguous"]


def test_what_is_no_array_is_refused_by_name():
    with pytest.raises(TypeError, match="'array' must be a NumPy, PyTorch or CuPy array, got list"):
        core.describe_array([1.0, 2.0])


def test_unsupported_dtypes_are_refused():
    with pytest.raises(TypeError, match="'array' has a dtype that is not supported"):
        core.describe_array(np.zeros(2, dtype=np.complex64))
    with pytest.raises(TypeError, match="'array' has a dtype that is not supported"):
        core.describe_array(torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(TypeError, match="'array' has a dtype that is not supported"):
        core.describe_array(np.zeros(2, dtype=">f4"))


def test_read_only_memory_can_be_read_but_not_written():
    array = np.zeros(3)
    array.flags.writeable = False
    assert core.describe_array(array)["shape"] == (3,)
    with pytest.raises(ValueError, match=r"'array' cannot be written .* read-only"):
        core.describe_array(array, write=True)


def test_strides_that_split_elements_are_refused():
    records = np.zeros(4, dtype=[("tag", "u1"), ("value", "f4")])
    with pytest.raises(ValueError, match="no multiple of its 4-byte elements"):
        core.describe_array(records["value"])


def test_negative_strides_are_seen_as_they_are():
    assert core.describe_array(np.arange(4.0)[::-1])["stride"] == (-1,)


def test_the_boundary_keeps_no_reference():
    tensor = torch.zeros(1000)
    storage = tensor.untyped_storage()
    before = storage._use_count() if hasattr(storage, "_use_count") else None
    for _ in range(10):
        core.describe_array(tensor)
    if before is not None:
        assert storage._use_count() == before


def test_misaligned_float_data_is_still_described():
    raw = np.zeros(17, dtype=np.uint8)
    assert core.describe_array(raw[1:].view(np.float32))["shape"] == (4,)


class DLPackOnly:
    """An array family that the library has never heard of."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __dlpack__(self, stream: None = None) -> object:
        return self.tensor.__dlpack__()


def test_any_dlpack_object_is_taken():
    tensor = torch.arange(6.0).reshape(2, 3).t()
    seen = core.describe_array(DLPackOnly(tensor))
    assert seen == core.describe_array(tensor)
    assert seen["stride"] == (1, 3)


class Parameter(DLPackOnly):
    """A tensor of a PyTorch that has no exchange interface."""

    @property
    def requires_grad(self) -> bool:
        return self.tensor.requires_grad

    def detach(self) -> DLPackOnly:
        return DLPackOnly(self.tensor.detach())


@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_tensor_is_read_whether_or_not_it_requires_a_gradient(requires_grad):
    tensor = torch.ones(3, requires_grad=requires_grad)
    assert core.describe_array(Parameter(tensor))["pointer"] == tensor.data_ptr()
    assert core.describe_array(tensor)["pointer"] == tensor.data_ptr()


class _DLPack:
    """The start of DLPack's managed tensor, for a tensor that is on no device we have."""

    def __init__(self, device: tuple[int, int]) -> None:
        class Tensor(ctypes.Structure):
            _fields_ = [
                ("data", ctypes.c_void_p),
                ("device", ctypes.c_int32 * 2),
                ("ndim", ctypes.c_int32),
                ("dtype", ctypes.c_uint8 * 4),
                ("shape", ctypes.POINTER(ctypes.c_int64)),
                ("strides", ctypes.c_void_p),
                ("offset", ctypes.c_uint64),
            ]

        class Managed(ctypes.Structure):
            _fields_ = [
                ("tensor", Tensor),
                ("context", ctypes.c_void_p),
                ("deleter", ctypes.c_void_p),
            ]

        self.device = device
        self.shape = (ctypes.c_int64 * 2)(2, 2)
        float32 = (ctypes.c_uint8 * 4)(2, 32, 1, 0)
        tensor = Tensor(16, (ctypes.c_int32 * 2)(*device), 2, float32, self.shape, None, 0)
        self.managed = Managed(tensor, None, None)
        self.stream = "not asked"

    def __dlpack_device__(self):
        return self.device

    def __dlpack__(self, stream=None):
        self.stream = stream
        new = ctypes.pythonapi.PyCapsule_New
        new.restype = ctypes.py_object
        new.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        return new(ctypes.addressof(self.managed), b"dltensor", None)


def test_arrays_on_a_gpu_are_seen_without_waiting_and_refused_by_kernels_of_the_cpu():
    array = _DLPack((2, 1))
    seen = core.describe_array(array)
    assert (seen["device"], seen["shape"]) == ("cuda", (2, 2))
    assert array.stream == -1, "no stream has to wait for another"
    with pytest.raises(ValueError, match="'out' must be on the CPU, got cuda:1"):
        core.jacobian_mirror(_DLPack((2, 1)), 1)


def test_arrays_on_another_gpu_than_the_queue_are_refused(emulated_cuda):
    with pytest.raises(ValueError, match="'out' must be on cpu, got cuda:1"):
        emulated_cuda.jacobian_mirror(_DLPack((2, 1)), 0, 0)
