#include "bindings/array.hpp"

#include "bindings/dlpack.hpp"

namespace jacpot {
namespace {

std::string type_name(py::handle object) {
  return py::str(py::type::of(object).attr("__name__")).cast<std::string>();
}

DType from_dlpack(dlpack::DataType type, const std::string& name) {
  if (type.lanes == 1) {
    switch (type.code) {
      case dlpack::boolean:
        if (type.bits == 8) return DType::boolean;
        break;
      case dlpack::floating:
        if (type.bits == 16) return DType::float16;
        if (type.bits == 32) return DType::float32;
        if (type.bits == 64) return DType::float64;
        break;
      case dlpack::bfloat:
        if (type.bits == 16) return DType::bfloat16;
        break;
      case dlpack::integer:
        if (type.bits == 16) return DType::int16;
        if (type.bits == 32) return DType::int32;
        if (type.bits == 64) return DType::int64;
        break;
      case dlpack::unsigned_integer:
        if (type.bits == 8) return DType::uint8;
        if (type.bits == 16) return DType::uint16;
        break;
      default:
        break;
    }
  }
  throw py::type_error("argument '" + name + "' has a dtype that is not supported (DLPack code " +
                       std::to_string(type.code) + ", " + std::to_string(type.bits) + " bits)");
}

DType from_buffer_format(const std::string& format, std::int64_t itemsize,
                         const std::string& name) {
  const std::string native =
      !format.empty() && (format[0] == '@' || format[0] == '=' || format[0] == '<')
          ? format.substr(1)
          : format;
  if (native == "?") return DType::boolean;
  if (native == "f") return DType::float32;
  if (native == "d") return DType::float64;
  if (native == "e") return DType::float16;
  if (native == "B") return DType::uint8;
  if (native == "H") return DType::uint16;
  if (native == "h") return DType::int16;
  if (native == "i" || native == "l" || native == "q") {
    if (itemsize == 4) return DType::int32;
    if (itemsize == 8) return DType::int64;
  }
  throw py::type_error("argument '" + name +
                       "' has a dtype that is not supported (buffer format '" + format + "')");
}

std::string join(const std::vector<std::string>& words, const char* separator) {
  std::string text;
  for (const auto& word : words) text += (text.empty() ? "" : separator) + word;
  return text;
}

std::string device_text(Device device) {
  return device.kind == DeviceKind::cpu ? "cpu" : "cuda:" + std::to_string(device.index);
}

}  // namespace

const char* dtype_name(DType dtype) {
  switch (dtype) {
    case DType::boolean:
      return "bool";
    case DType::uint8:
      return "uint8";
    case DType::uint16:
      return "uint16";
    case DType::int16:
      return "int16";
    case DType::int32:
      return "int32";
    case DType::int64:
      return "int64";
    case DType::float16:
      return "float16";
    case DType::bfloat16:
      return "bfloat16";
    case DType::float32:
      return "float32";
    case DType::float64:
      return "float64";
  }
  return "unknown";
}

Array::Array(py::handle object, const char* name, Access access) : name_(name) {
  if (PyObject_CheckBuffer(object.ptr()))
    read_buffer(object, access);
  else if (read_exchange(object))
    return;
  else if (py::hasattr(object, "__dlpack__"))
    read_dlpack(object);
  else
    throw py::type_error("argument '" + name_ + "' must be a NumPy, PyTorch or CuPy array, got " +
                         type_name(object));
}

void Array::read_buffer(py::handle object, Access access) {
  auto buffer = std::shared_ptr<Py_buffer>(new Py_buffer{}, [](Py_buffer* b) {
    PyBuffer_Release(b);
    delete b;
  });
  const int flags = PyBUF_STRIDES | PyBUF_FORMAT | (access == Access::write ? PyBUF_WRITABLE : 0);
  if (PyObject_GetBuffer(object.ptr(), buffer.get(), flags) != 0) {
    PyErr_Clear();
    throw py::value_error("argument '" + name_ + "' cannot be " +
                          (access == Access::write ? "written" : "read") +
                          " through the buffer protocol (is it read-only?)");
  }
  dtype_ = from_buffer_format(buffer->format ? buffer->format : "B", buffer->itemsize, name_);
  data_ = buffer->buf;
  for (int d = 0; d < buffer->ndim; ++d) {
    shape_.push_back(buffer->shape[d]);
    if (buffer->strides[d] % buffer->itemsize != 0)
      throw py::value_error("argument '" + name_ + "' has a stride of " +
                            std::to_string(buffer->strides[d]) +
                            " bytes, which is no multiple of its " +
                            std::to_string(buffer->itemsize) + "-byte elements");
    stride_.push_back(buffer->strides[d] / buffer->itemsize);
  }
  owner_ = buffer;
}

// PyTorch 2.10 and later: the tensor is borrowed, so the object is kept alive instead.
bool Array::read_exchange(py::handle object) {
  static PyObject* const attribute = PyUnicode_InternFromString("__dlpack_c_exchange_api__");
  PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(object.ptr()));
  const auto capsule = py::reinterpret_steal<py::object>(PyObject_GetAttr(type, attribute));
  if (!capsule || !PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) {
    PyErr_Clear();
    return false;
  }
  const auto* api =
      static_cast<dlpack::Exchange*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (api->header.major != 1 || !api->tensor_from_object) return false;
  dlpack::Tensor tensor;
  if (api->tensor_from_object(object.ptr(), &tensor) != 0) {
    PyErr_Clear();  // __dlpack__ says better what is wrong
    return false;
  }
  owner_ = std::shared_ptr<void>(object.inc_ref().ptr(),
                                 [](void* kept) { Py_DECREF(static_cast<PyObject*>(kept)); });
  take(tensor);
  return true;
}

void Array::read_dlpack(py::handle given) {
  // Kernels know nothing of gradients, and PyTorch exports a tensor that requires one only through
  // its exchange interface.
  const bool of_gradients =
      py::getattr(given, "requires_grad", py::bool_(false)).equal(py::bool_(true));
  const auto object =
      of_gradients ? given.attr("detach")() : py::reinterpret_borrow<py::object>(given);
  // The kernel goes to the stream that the array is used on already: nobody has to wait (-1).
  bool on_cuda = false;
  if (py::hasattr(object, "__dlpack_device__")) {
    const auto device = object.attr("__dlpack_device__")().cast<std::pair<int, int>>();
    on_cuda = device.first == dlpack::cuda || device.first == dlpack::cuda_managed;
  }
  const py::object capsule =
      on_cuda ? object.attr("__dlpack__")(py::arg("stream") = -1) : object.attr("__dlpack__")();
  auto* managed = static_cast<dlpack::Managed*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"));
  if (!managed) throw py::error_already_set();
  PyCapsule_SetName(capsule.ptr(), "used_dltensor");  // the tensor is ours to delete now
  owner_ = std::shared_ptr<void>(managed, [](void* p) {
    auto* m = static_cast<dlpack::Managed*>(p);
    if (m->deleter) m->deleter(m);
  });
  take(managed->tensor);
}

void Array::take(const dlpack::Tensor& tensor) {
  dtype_ = from_dlpack(tensor.dtype, name_);
  switch (tensor.device.type) {
    case dlpack::cpu:
    case dlpack::cuda_host:
      device_ = {DeviceKind::cpu, 0};
      break;
    case dlpack::cuda:
    case dlpack::cuda_managed:
      device_ = {DeviceKind::cuda, tensor.device.index};
      break;
    default:
      throw py::value_error("argument '" + name_ +
                            "' lies on a device that is not supported (DLPack type " +
                            std::to_string(tensor.device.type) + "); expected CPU or CUDA memory");
  }
  data_ = static_cast<char*>(tensor.data) + tensor.byte_offset;
  shape_.assign(tensor.shape, tensor.shape + tensor.ndim);
  if (tensor.strides) {
    stride_.assign(tensor.strides, tensor.strides + tensor.ndim);
  } else {
    stride_.resize(shape_.size());
    std::int64_t step = 1;
    for (std::size_t d = shape_.size(); d-- > 0; step *= shape_[d]) stride_[d] = step;
  }
}

std::int64_t Array::size() const {
  std::int64_t n = 1;
  for (auto s : shape_) n *= s;
  return n;
}

bool Array::contiguous() const {
  if (size() == 0) return true;
  std::int64_t step = 1;
  for (std::size_t d = shape_.size(); d-- > 0; step *= shape_[d])
    if (shape_[d] != 1 && stride_[d] != step) return false;
  return true;
}

std::string Array::shape_text() const {
  std::vector<std::string> words;
  for (auto s : shape_) words.push_back(std::to_string(s));
  return "(" + join(words, ", ") + (words.size() == 1 ? ",)" : ")");
}

const Array& Array::expect_dtype(std::initializer_list<DType> allowed) const {
  std::vector<std::string> names;
  for (DType dtype : allowed) {
    if (dtype == dtype_) return *this;
    names.emplace_back(dtype_name(dtype));
  }
  throw py::type_error("argument '" + name_ + "' must be " + join(names, " or ") + ", got " +
                       dtype_name(dtype_));
}

const Array& Array::expect_shape(std::initializer_list<std::int64_t> expected) const {
  bool same = expected.size() == shape_.size();
  std::vector<std::string> words;
  std::size_t d = 0;
  for (auto s : expected) {
    words.push_back(s == any ? "any" : std::to_string(s));
    if (same && s != any && s != shape_[d]) same = false;
    ++d;
  }
  if (!same)
    throw py::value_error("argument '" + name_ + "' must have shape (" + join(words, ", ") +
                          (words.size() == 1 ? ",)" : ")") + ", got " + shape_text());
  return *this;
}

const Array& Array::expect_contiguous() const {
  if (!contiguous())
    throw py::value_error("argument '" + name_ + "' must be contiguous in C order, got shape " +
                          shape_text() + " with other strides");
  return *this;
}

const Array& Array::expect_cpu() const {
  if (device_.kind != DeviceKind::cpu)
    throw py::value_error("argument '" + name_ + "' must be on the CPU, got " +
                          device_text(device_));
  return *this;
}

const Array& Array::expect_device(Device device) const {
  if (!(device_ == device))
    throw py::value_error("argument '" + name_ + "' must be on " + device_text(device) + ", got " +
                          device_text(device_));
  return *this;
}

const Array& Array::expect_like(const Array& other) const {
  if (dtype_ != other.dtype_)
    throw py::type_error("argument '" + name_ + "' must be " + dtype_name(other.dtype_) +
                         " like '" + other.name_ + "', got " + dtype_name(dtype_));
  if (!(device_ == other.device_))
    throw py::value_error("argument '" + name_ + "' must be on " + device_text(other.device_) +
                          " like '" + other.name_ + "', got " + device_text(device_));
  return *this;
}

void Array::fail_rank(int rank) const {
  throw py::value_error("argument '" + name_ + "' must have " + std::to_string(rank) +
                        " dimensions, got shape " + shape_text());
}

void raise_if_failed(Status status, const char* operation) {
  if (status.ok()) return;
  const std::string text = std::string(operation) + ": " + status.message;
  switch (status.code) {
    case Code::invalid_argument:
      throw py::value_error(text);
    case Code::overflow:
      PyErr_SetString(PyExc_OverflowError, text.c_str());
      throw py::error_already_set();
    case Code::out_of_memory:
      PyErr_SetString(PyExc_MemoryError, text.c_str());
      throw py::error_already_set();
    case Code::unsupported:
      PyErr_SetString(PyExc_NotImplementedError, text.c_str());
      throw py::error_already_set();
    case Code::interrupted:
      // The signal handler's own exception, KeyboardInterrupt as a rule, says more.
      if (PyErr_CheckSignals() != 0) throw py::error_already_set();
      PyErr_SetNone(PyExc_KeyboardInterrupt);
      throw py::error_already_set();
    default:
      throw std::runtime_error(text);
  }
}

int checked_threads(int threads) {
  if (threads < 1)
    throw py::value_error("argument 'threads' must be at least 1, got " + std::to_string(threads));
  return threads;
}

}  // namespace jacpot
