// Runs the body of a CUDA kernel on the CPU, for tests: the same source, compiled as C++.
//
// Every thread of a block is a fiber. A warp runs until all of it has met a barrier of the block;
// once every warp has, all go on. The order of warps and of lanes is chosen by the test: a value
// that one thread writes and another reads without a barrier between them comes out differently in
// forward and in reverse order. Shared memory is filled with NaN before each block, lies between
// the red zones of AddressSanitizer. Asynchronous copies arrive when they are waited for; in
// reverse order, at once.
//
// This checks the logic of a kernel (indices, barriers, tails). It says nothing of the hardware.
#pragma once

#ifndef JACPOT_CUDA_EMULATOR
#error "cuda_emulator.hpp stands in for the CUDA runtime in emulated builds only"
#endif

#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace jacpot::emulator {

enum class Order : int { forward, reverse, shuffled };

// What the device that is stood in for has, and how its threads take turns.
struct Device {
  std::int64_t shared_bytes = 227 * 1024;
  int multiprocessors = 4;
  Order order = Order::forward;
  int count = 2;         // of such devices
  int current = 0;       // as cudaSetDevice left it
  int launched_on = -1;  // what was current at the last launch
};
Device& device();

// Runs body() for every thread of every block. Gives null, or what a GPU would not have allowed.
const char* run_grid(dim3 grid, dim3 block, std::size_t shared_bytes,
                     const std::function<void()>& body);

unsigned char* shared_bytes();
void fail(const char* fault);  // ends the grid after this block
void block_barrier();
void warp_barrier();
// The slot through which a lane of this thread's warp shows a value to the others.
std::array<std::uint64_t, 4>& exchange(int lane);
int lane();

// Asynchronous copies of this thread: queued, closed to a group, and carried out when waited for.
// Zeros follow up to `size` bytes, of which both addresses must be multiples.
void copy_later(void* to, const void* from, std::size_t bytes, std::size_t size);
void close_group();
void wait_groups(int left_over);

template <class T>
T shuffle(T value, int source) {
  static_assert(sizeof(T) <= 8);
  std::memcpy(exchange(lane()).data(), &value, sizeof(T));
  warp_barrier();
  T out;
  std::memcpy(&out, exchange(source & 31).data(), sizeof(T));
  warp_barrier();  // before anyone shows the next value
  return out;
}

// The bits that TF32 keeps of a float32, and its rounding: to nearest, halves away from zero.
inline float cut_to_tf32(float x) {
  return std::bit_cast<float>(std::bit_cast<std::uint32_t>(x) & ~0x1fffu);
}
inline float to_tf32(float x) {
  if (!std::isfinite(x)) return x;
  return cut_to_tf32(std::bit_cast<float>(std::bit_cast<std::uint32_t>(x) + 0x1000u));
}

// Where tensor cores look for an operand's elements: that of row (or column) `outer` and inner
// index k is in a register of a lane, see cuda_mma.cuh.
struct Tf32 {
  using Register = float;
  static constexpr int depth = 8;
  static int lane(int outer, int k) { return outer % 8 * 4 + k % 4; }
  static int a_register(int row, int k) { return row / 8 + k / 4 * 2; }
  static int b_register(int k) { return k / 4; }
  static double value(float x, int) { return cut_to_tf32(x); }
};

// c += a·b, every lane showing its registers to the others. Products are exact; each sum of eight
// or sixteen is cut off to float32, as tensor cores do, and not rounded.
template <class Format>
void mma(float (&c)[4], const typename Format::Register (&a)[4],
         const typename Format::Register (&b)[2]) {
  const int self = lane();
  std::memcpy(exchange(self).data(), a, sizeof(a));
  std::memcpy(exchange(self).data() + 2, b, sizeof(b));
  warp_barrier();
  const auto shown = [](int lane_index, int place) {
    typename Format::Register out;
    std::memcpy(&out,
                reinterpret_cast<const unsigned char*>(exchange(lane_index).data()) +
                    static_cast<std::size_t>(place) * sizeof(out),
                sizeof(out));
    return out;
  };
  for (int i = 0; i < 4; ++i) {
    const int row = self / 4 + i / 2 * 8, column = self % 4 * 2 + i % 2;
    double sum = c[i];
    for (int k = 0; k < Format::depth; ++k)
      sum += Format::value(shown(Format::lane(row, k), Format::a_register(row, k)), k) *
             Format::value(shown(Format::lane(column, k), 4 + Format::b_register(k)), k);
    const auto nearest = static_cast<float>(sum);
    c[i] = std::abs(static_cast<double>(nearest)) > std::abs(sum) ? std::nextafter(nearest, 0.0f)
                                                                  : nearest;
  }
  warp_barrier();  // before anyone shows the next registers
}

// See cuda_mma.cuh.
inline void load_transposed(std::uint32_t (&out)[4], const void* row) {
  if (reinterpret_cast<std::uintptr_t>(row) % 16 != 0) {
    fail("a row of a matrix is misaligned");
    row = shared_bytes();
  }
  std::memcpy(exchange(lane()).data(), &row, sizeof(row));
  warp_barrier();
  for (int i = 0; i < 4; ++i) {
    std::uint16_t pair[2];
    for (int half = 0; half < 2; ++half) {
      const std::uint16_t* from;
      std::memcpy(&from, exchange(i * 8 + lane() % 4 * 2 + half).data(), sizeof(from));
      pair[half] = from[lane() / 4];
    }
    std::memcpy(&out[i], pair, sizeof(pair));
  }
  warp_barrier();
}

}  // namespace jacpot::emulator

enum cudaError_t { cudaSuccess, cudaErrorInvalidDevice };

inline cudaError_t cudaGetDevice(int* number) {
  *number = jacpot::emulator::device().current;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int number) {
  auto& device = jacpot::emulator::device();
  if (number < 0 || number >= device.count) return cudaErrorInvalidDevice;
  device.current = number;
  return cudaSuccess;
}

inline void __syncthreads() { jacpot::emulator::block_barrier(); }
inline void __syncwarp(unsigned = ~0u) { jacpot::emulator::warp_barrier(); }
template <class T>
T __shfl_sync(unsigned, T value, int source) {
  return jacpot::emulator::shuffle(value, source);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return jacpot::emulator::shuffle(value, jacpot::emulator::lane() ^ mask);
}
template <class T>
T __ldg(const T* p) {
  return *p;
}
