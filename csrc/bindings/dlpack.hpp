// The in-memory structures of the DLPack protocol (https://dmlc.github.io/dlpack), as much of
// them as reading a tensor needs.
#pragma once

#include <cstdint>

namespace jacpot::dlpack {

struct Device {
  std::int32_t type;
  std::int32_t index;
};
enum DeviceType : std::int32_t { cpu = 1, cuda = 2, cuda_host = 3, cuda_managed = 13 };

struct DataType {
  std::uint8_t code;
  std::uint8_t bits;
  std::uint16_t lanes;
};
enum TypeCode : std::uint8_t {
  integer = 0,
  unsigned_integer = 1,
  floating = 2,
  bfloat = 4,
  boolean = 6
};

struct Tensor {
  void* data;
  Device device;
  std::int32_t ndim;
  DataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;  // in elements; null means contiguous
  std::uint64_t byte_offset;
};

struct Managed {
  Tensor tensor;
  void* context;
  void (*deleter)(Managed*);
};

// The table of C functions behind `type(tensor).__dlpack_c_exchange_api__`: a view of a tensor
// without a Python call, ten times cheaper than __dlpack__().
struct ExchangeHeader {
  std::uint32_t major, minor;
  ExchangeHeader* previous;
};

struct Exchange {
  ExchangeHeader header;
  void* managed_tensor_allocator;
  void* managed_tensor_from_object;
  void* managed_tensor_to_object;
  int (*tensor_from_object)(void* object, Tensor* out);  // borrowed; may be null
  int (*current_stream)(std::int32_t device_type, std::int32_t device_index, void** out);
};

}  // namespace jacpot::dlpack
