#include "common/blas.hpp"

#include <dlfcn.h>
#if defined(__linux__)
#include <link.h>
#endif

#include <algorithm>
#include <cstring>
#include <limits>
#include <string>

namespace jacpot::blas {
namespace {

template <class T>
using Gemm = void (*)(const char*, const char*, const int*, const int*, const int*, const T*,
                      const T*, const int*, const T*, const int*, const T*, T*, const int*);
struct Symbols {
  Gemm<float> sgemm = nullptr;
  Gemm<double> dgemm = nullptr;
  const char* provider = "none";

  bool complete() const { return sgemm && dgemm; }
};

#if defined(__linux__)
int find_torch(dl_phdr_info* info, std::size_t, void* out) {
  if (!info->dlpi_name || !std::strstr(info->dlpi_name, "libtorch_cpu.")) return 0;
  *static_cast<std::string*>(out) = info->dlpi_name;
  return 1;
}
#endif

Symbols from_torch() {
  std::string path;
#if defined(__linux__)
  dl_iterate_phdr(find_torch, &path);
#endif
  void* library = path.empty() ? nullptr : dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
  if (!library) return {};
  Symbols s;
  s.sgemm = reinterpret_cast<Gemm<float>>(dlsym(library, "sgemm_"));
  s.dgemm = reinterpret_cast<Gemm<double>>(dlsym(library, "dgemm_"));
  s.provider = "torch";
  return s;
}

Symbols& symbols() {
  static Symbols found = [] {
    Symbols s = from_torch();
    return s.complete() ? s : Symbols{};
  }();
  return found;
}

constexpr Status missing{Code::unsupported, "no BLAS was found in the process"};
constexpr Status too_large{Code::overflow, "a dimension exceeds the 32-bit integers of the BLAS"};

bool fits(std::int64_t value) { return value <= std::numeric_limits<int>::max(); }

// BLAS is column-major: a row-major C = A·B is the column-major Cᵀ = Bᵀ·Aᵀ on the same memory.
template <class T>
Status gemm_rows(Gemm<T> call, bool transpose_a, bool transpose_b, std::int64_t m, std::int64_t n,
                 std::int64_t k, T alpha, const T* a, std::int64_t lda, const T* b,
                 std::int64_t ldb, T beta, T* c, std::int64_t ldc) {
  if (m == 0 || n == 0) return {};
  if (!call) return missing;
  if (!fits(m) || !fits(n) || !fits(k) || !fits(lda) || !fits(ldb) || !fits(ldc)) return too_large;
  const char ta = transpose_a ? 'T' : 'N', tb = transpose_b ? 'T' : 'N';
  const int im = static_cast<int>(m), in = static_cast<int>(n), ik = static_cast<int>(k);
  const auto at_least_one = [](std::int64_t ld) { return ld > 0 ? static_cast<int>(ld) : 1; };
  const int ila = at_least_one(lda), ilb = at_least_one(ldb), ilc = at_least_one(ldc);
  call(&tb, &ta, &in, &im, &ik, &alpha, b, &ilb, a, &ila, &beta, c, &ilc);
  return {};
}

}  // namespace

Status gemm(bool ta, bool tb, std::int64_t m, std::int64_t n, std::int64_t k, float alpha,
            const float* a, std::int64_t lda, const float* b, std::int64_t ldb, float beta,
            float* c, std::int64_t ldc) {
  return gemm_rows(symbols().sgemm, ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}
Status gemm(bool ta, bool tb, std::int64_t m, std::int64_t n, std::int64_t k, double alpha,
            const double* a, std::int64_t lda, const double* b, std::int64_t ldb, double beta,
            double* c, std::int64_t ldc) {
  return gemm_rows(symbols().dgemm, ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}
void set_fallback(void* sgemm, void* dgemm) {
  Symbols& s = symbols();
  if (s.complete()) return;
  s.sgemm = reinterpret_cast<Gemm<float>>(sgemm);
  s.dgemm = reinterpret_cast<Gemm<double>>(dgemm);
  s.provider = "scipy";
}

const char* provider() { return symbols().provider; }

}  // namespace jacpot::blas
