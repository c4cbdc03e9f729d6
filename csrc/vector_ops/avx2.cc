#include "vector_ops/vector_ops.h"

#if defined(__AVX2__) && defined(__FMA__)
#include "runtime/floats_avx2.h"
#include "vector_ops/rows.h"

namespace bantamweight {
namespace {

struct Lanes : Floats {
  static inline void fetch(const float* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T1); }
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
