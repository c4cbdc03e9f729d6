#include "vector_ops/vector_ops.h"

#if defined(__AVX512F__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#include "runtime/floats_avx512.h"
#include "vector_ops/rows.h"

namespace bantamweight {
namespace {

struct Lanes : Floats {
  static inline void fetch(const float* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T1); }
};

void stream(const float* from, float* to, int64_t n) {
  int64_t i = 0;
  if (reinterpret_cast<uintptr_t>(to) % 64 == 0) {
    for (; i + 16 <= n; i += 16) _mm512_stream_ps(to + i, _mm512_loadu_ps(from + i));
    _mm_sfence();  // before another thread may read it
  }
  for (; i < n; i += 16) {
    const auto part = Lanes::part(n - i);
    Lanes::store(to + i, Lanes::load(from + i, part), part);
  }
}

// Eight rows at a time: sixteen of the 32 registers are sums.
const VectorKernel kKernel = {Isa::avx512, dots_by<Lanes, 8, 4>, combine_rows<Lanes>, stream};

}  // namespace

const VectorKernel* vector_kernel_avx512() { return &kKernel; }

}  // namespace bantamweight
#else
namespace bantamweight {
const VectorKernel* vector_kernel_avx512() { return nullptr; }
}  // namespace bantamweight
#endif
