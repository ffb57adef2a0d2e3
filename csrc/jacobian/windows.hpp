// What a convolution's kernel is laid on, place by place: the activations of its weight.
#pragma once

#include <cstdint>

namespace jacpot {

// out[n, t, i] = x[n · size + places[t] + offsets[i]]
template <class T>
void windows(const T* x, std::int64_t n, std::int64_t size, const std::int64_t* places,
             std::int64_t t, const std::int64_t* offsets, std::int64_t i, T* out, int threads);

}  // namespace jacpot
