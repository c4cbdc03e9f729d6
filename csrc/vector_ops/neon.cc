#include "vector_ops/vector_ops.h"

#if defined(__aarch64__)
#include <arm_neon.h>

namespace bantamweight {
namespace {

// The 32 lanes of a sum are eight registers.
constexpr int kRegisters = 8;

// The last, incomplete 32 elements, followed by zeros.
void read_tail(const float* from, int64_t count, float* to) {
  for (int64_t i = 0; i < 4 * kRegisters; ++i) to[i] = i < count ? from[i] : 0.0f;
}

float fold(const float32x4_t* lanes) {
  // 32 lanes to 16 to 8 to 4: lane i meets i + 16, then i + 8, then i + 4.
  float32x4_t half[4];
  for (int j = 0; j < 4; ++j) half[j] = vaddq_f32(lanes[j], lanes[j + 4]);
  const float32x4_t four = vaddq_f32(vaddq_f32(half[0], half[2]), vaddq_f32(half[1], half[3]));
  const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
  return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}

// kRows dot products against one reading of w.
template <int kRows>
void dots_of(const float* const* rows, int64_t at, const float* w, int64_t n, float* sums) {
  float32x4_t lanes[kRows][kRegisters];
  for (int r = 0; r < kRows; ++r) {
    for (int j = 0; j < kRegisters; ++j) lanes[r][j] = vdupq_n_f32(0.0f);
  }
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    for (int j = 0; j < kRegisters; ++j) {
      const float32x4_t wj = vld1q_f32(w + i + 4 * j);
      for (int r = 0; r < kRows; ++r) lanes[r][j] = vfmaq_f32(lanes[r][j], vld1q_f32(rows[r] + at + i + 4 * j), wj);
    }
  }
  if (i < n) {
    float w_tail[32], row_tail[32];
    read_tail(w + i, n - i, w_tail);
    for (int r = 0; r < kRows; ++r) {
      read_tail(rows[r] + at + i, n - i, row_tail);
      for (int j = 0; j < kRegisters; ++j) {
        lanes[r][j] = vfmaq_f32(lanes[r][j], vld1q_f32(row_tail + 4 * j), vld1q_f32(w_tail + 4 * j));
      }
    }
  }
  for (int r = 0; r < kRows; ++r) sums[r] = fold(lanes[r]);
}

void dots(const float* const* rows, int64_t k, int64_t at, const float* w, int64_t n, float* sums) {
  int64_t r = 0;
  for (; r + 3 <= k; r += 3) dots_of<3>(rows + r, at, w, n, sums + r);  // 24 of the 32 registers are sums
  for (; r < k; ++r) dots_of<1>(rows + r, at, w, n, sums + r);
}

// kRows multiples removed from scale * x in one reading of x and writing of w.
template <int kRows>
void combine_of(const float* x, float scale, const float* const* rows, const float* coefficients, int64_t at, float* w,
                int64_t n) {
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) {
    float32x4_t sum = vmulq_n_f32(vld1q_f32(x + i), scale);
    for (int r = 0; r < kRows; ++r) {
      sum = vfmsq_f32(sum, vld1q_f32(rows[r] + at + i), vdupq_n_f32(coefficients[r]));
    }
    vst1q_f32(w + i, sum);
  }
  for (; i < n; ++i) {
    float sum = scale * x[i];
    for (int r = 0; r < kRows; ++r) sum = __builtin_fmaf(-coefficients[r], rows[r][at + i], sum);
    w[i] = sum;
  }
}

void combine(const float* x, float scale, const float* const* rows, const float* coefficients, int64_t k, int64_t at,
             float* w, int64_t n) {
  if (k == 0) return combine_of<0>(x, scale, rows, coefficients, at, w, n);
  for (int64_t r = 0; r < k;) {  // each group goes on from what the one before it left in w
    if (r + 4 <= k) {
      combine_of<4>(x, scale, rows + r, coefficients + r, at, w, n);
      r += 4;
    } else {
      combine_of<1>(x, scale, rows + r, coefficients + r, at, w, n);
      r += 1;
    }
    x = w;
    scale = 1.0f;
  }
}

// Ordinary stores: these CPUs notice by themselves when whole lines are overwritten.
void stream(const float* from, float* to, int64_t n) {
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) vst1q_f32(to + i, vld1q_f32(from + i));
  for (; i < n; ++i) to[i] = from[i];
}

const VectorKernel kKernel = {Isa::neon, dots, combine, stream};

}  // namespace

const VectorKernel* vector_kernel_neon() { return &kKernel; }

}  // namespace bantamweight
#else
namespace bantamweight {
const VectorKernel* vector_kernel_neon() { return nullptr; }
}  // namespace bantamweight
#endif
