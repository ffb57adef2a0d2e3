// Raw views of arrays that somebody else owns. Sizes and strides count elements and are int64.
#pragma once

#include <array>
#include <cstdint>

namespace jacpot {

enum class DType : std::uint8_t {
  boolean,
  uint8,
  uint16,
  int16,
  int32,
  int64,
  float16,
  bfloat16,
  float32,
  float64
};

enum class DeviceKind : std::uint8_t { cpu, cuda };

struct Device {
  DeviceKind kind = DeviceKind::cpu;
  int index = 0;
  friend bool operator==(const Device&, const Device&) = default;
};

template <class T, int Rank>
struct View {
  T* data = nullptr;
  std::array<std::int64_t, Rank> shape{};
  std::array<std::int64_t, Rank> stride{};

  std::int64_t size() const {
    std::int64_t n = 1;
    for (auto s : shape) n *= s;
    return n;
  }
  template <class... I>
  T& operator()(I... index) const {
    static_assert(sizeof...(I) == Rank);
    const std::array<std::int64_t, Rank> at{static_cast<std::int64_t>(index)...};
    std::int64_t offset = 0;
    for (int d = 0; d < Rank; ++d) offset += at[d] * stride[d];
    return data[offset];
  }
};

}  // namespace jacpot
