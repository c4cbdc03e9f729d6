#include "vector_ops/vector_ops.h"

#if defined(__AVX2__) && defined(__FMA__)
#include "runtime/floats_avx2.h"
#include "vector_ops/rows.h"

namespace bantamweight {
namespace {

struct Lanes : Floats {
  static inline void fetch(const float* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T1); }
  static inline float sum(Vector eight) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
};

void stream(const float* from, float* to, int64_t n) {
  int64_t i = 0;
  if (reinterpret_cast<uintptr_t>(to) % 32 == 0) {
    for (; i + 8 <= n; i += 8) _mm256_stream_ps(to + i, _mm256_loadu_ps(from + i));
    _mm_sfence();  // before another thread may read it
  }
  for (; i < n; ++i) to[i] = from[i];
}

// Two rows at a time: eight of the sixteen registers are sums.
const VectorKernel kKernel = {Isa::avx2, dots_by<Lanes, 2, 2>, combine_rows<Lanes>, stream};

}  // namespace

const VectorKernel* vector_kernel_avx2() { return &kKernel; }

}  // namespace bantamweight
#else
namespace bantamweight {
const VectorKernel* vector_kernel_avx2() { return nullptr; }
}  // namespace bantamweight
#endif
