// The checked boundary: a NumPy, PyTorch or CuPy array argument becomes a raw view, or is refused
// with the argument's name, what was expected and what came. Nothing is converted or copied.
#pragma once

#include <pybind11/pybind11.h>

#include <initializer_list>
#include <memory>
#include <string>
#include <vector>

#include "common/status.hpp"
#include "common/view.hpp"

namespace jacpot {

namespace py = pybind11;

namespace dlpack {
struct Tensor;
}

enum class Access { read, write };

const char* dtype_name(DType dtype);

template <class T>
struct dtype_of;
template <>
struct dtype_of<bool> {
  static constexpr DType value = DType::boolean;
};
template <>
struct dtype_of<std::uint8_t> {
  static constexpr DType value = DType::uint8;
};
template <>
struct dtype_of<std::uint16_t> {
  static constexpr DType value = DType::uint16;
};
template <>
struct dtype_of<std::int16_t> {
  static constexpr DType value = DType::int16;
};
template <>
struct dtype_of<std::int32_t> {
  static constexpr DType value = DType::int32;
};
template <>
struct dtype_of<std::int64_t> {
  static constexpr DType value = DType::int64;
};
template <>
struct dtype_of<float> {
  static constexpr DType value = DType::float32;
};
template <>
struct dtype_of<double> {
  static constexpr DType value = DType::float64;
};

class Array {
 public:
  static constexpr std::int64_t any = -1;

  // Takes DLPack or buffer-protocol objects. TypeError for anything else.
  Array(py::handle object, const char* name, Access access = Access::read);

  const std::string& name() const { return name_; }
  DType dtype() const { return dtype_; }
  Device device() const { return device_; }
  int ndim() const { return static_cast<int>(shape_.size()); }
  std::int64_t shape(int d) const { return shape_[static_cast<std::size_t>(d)]; }
  std::int64_t stride(int d) const { return stride_[static_cast<std::size_t>(d)]; }
  std::int64_t size() const;
  bool contiguous() const;  // C order
  void* data() const { return data_; }
  std::string shape_text() const;

  // Each check returns the array, so that they chain; each throws TypeError or ValueError.
  const Array& expect_dtype(std::initializer_list<DType> allowed) const;
  const Array& expect_shape(std::initializer_list<std::int64_t> shape) const;  // `any` matches all
  const Array& expect_contiguous() const;
  const Array& expect_cpu() const;
  const Array& expect_device(Device device) const;
  const Array& expect_like(const Array& other) const;  // same dtype and device

  template <class T, int Rank>
  View<T, Rank> view() const {
    expect_dtype({dtype_of<std::remove_const_t<T>>::value});
    if (ndim() != Rank) fail_rank(Rank);
    View<T, Rank> out;
    out.data = static_cast<T*>(data_);
    for (int d = 0; d < Rank; ++d) {
      out.shape[static_cast<std::size_t>(d)] = shape(d);
      out.stride[static_cast<std::size_t>(d)] = stride(d);
    }
    return out;
  }
  template <class T>
  T* contiguous_data() const {
    expect_dtype({dtype_of<std::remove_const_t<T>>::value}).expect_contiguous();
    return static_cast<T*>(data_);
  }

 private:
  void read_buffer(py::handle object, Access access);
  bool read_exchange(py::handle object);
  void read_dlpack(py::handle given);
  void take(const dlpack::Tensor& tensor);
  [[noreturn]] void fail_rank(int rank) const;

  std::string name_;
  DType dtype_ = DType::float32;
  Device device_;
  void* data_ = nullptr;
  std::vector<std::int64_t> shape_, stride_;
  std::shared_ptr<void> owner_;  // keeps the memory alive while a kernel reads it
};

// Calls f.template operator()<float>() or <double>().
template <class F>
decltype(auto) dispatch_float(const Array& array, F&& f) {
  array.expect_dtype({DType::float32, DType::float64});
  if (array.dtype() == DType::float32) return f.template operator()<float>();
  return f.template operator()<double>();
}

void raise_if_failed(Status status, const char* operation);
int checked_threads(int threads);

}  // namespace jacpot
