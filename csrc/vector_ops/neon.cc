#include "vector_ops/vector_ops.h"

#if defined(__aarch64__)
#include "runtime/floats_neon.h"
#include "vector_ops/rows.h"

namespace bantamweight {
namespace {

struct Lanes : Floats {
  static inline void fetch(const float*) {}  // these CPUs fetch plain streams by themselves
};

// Ordinary stores: these CPUs notice by themselves when whole lines are overwritten.
void stream(const float* from, float* to, int64_t n) {
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) vst1q_f32(to + i, vld1q_f32(from + i));
  for (; i < n; ++i) to[i] = from[i];
}

// Three rows at a time: 24 of the 32 registers are sums.
const VectorKernel kKernel = {Isa::neon, dots_by<Lanes, 3, 3>, combine_rows<Lanes>, stream};

}  // namespace

const VectorKernel* vector_kernel_neon() { return &kKernel; }

}  // namespace bantamweight
#else
namespace bantamweight {
const VectorKernel* vector_kernel_neon() { return nullptr; }
}  // namespace bantamweight
#endif
