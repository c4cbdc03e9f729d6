#include <algorithm>
#include <cmath>

#include "vector_ops/vector_ops.h"

namespace bantamweight {
namespace {

float dot(const float* x, const float* y, int64_t n) {
  float lanes[kVectorLanes] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i % kVectorLanes] = std::fma(x[i], y[i], lanes[i % kVectorLanes]);
  for (int64_t half = kVectorLanes / 2; half > 0; half /= 2) {
    for (int64_t lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
}

void dots(const float* const* rows, int64_t k, int64_t at, const float* w, int64_t n, float* sums) {
  for (int64_t r = 0; r < k; ++r) sums[r] = dot(rows[r] + at, w, n);
}

void combine(const float* x, float scale, const float* const* rows, const float* coefficients, int64_t k, int64_t at,
             float* w, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    float sum = scale * x[i];
    for (int64_t r = 0; r < k; ++r) sum = std::fma(-coefficients[r], rows[r][at + i], sum);
    w[i] = sum;
  }
}

void stream(const float* from, float* to, int64_t n) { std::copy(from, from + n, to); }

}  // namespace

const VectorKernel* vector_kernel_reference() {
  static const VectorKernel kernel = {Isa::reference, dots, combine, stream};
  return &kernel;
}

}  // namespace bantamweight
