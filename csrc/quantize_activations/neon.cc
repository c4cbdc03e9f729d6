// Sixteen floats at a time: two passes over a row that is in L1 for the second.
//
// vcvtnq rounds to nearest, ties to even, as nearbyint does in the default mode. The narrowing
// saturates, but |x * (127 / max)| never reaches 127.5, so it never has to.
#include "quantize_activations/quantize_activations.h"

#if defined(__aarch64__)

#include <arm_neon.h>

#include <cstring>

#include "quantize_activations/round_rows.h"
#include "runtime/floats_neon.h"

namespace bantamweight {
namespace {

int8x16_t narrow_16(const int32x4_t (&q)[4]) {
  const int16x8_t low = vcombine_s16(vqmovn_s32(q[0]), vqmovn_s32(q[1]));
  const int16x8_t high = vcombine_s16(vqmovn_s32(q[2]), vqmovn_s32(q[3]));
  return vcombine_s8(vqmovn_s16(low), vqmovn_s16(high));
}

// Codes of 16 values, in halves if `low` is not null.
void round_16(const float* x, float32x4_t to_code, int8_t* q, int8_t* low) {
  int32x4_t first[4], second[4];
  for (int i = 0; i < 4; ++i) {
    const float32x4_t t = vmulq_f32(vld1q_f32(x + 4 * i), to_code);
    if (low == nullptr) {
      first[i] = vcvtnq_s32_f32(t);
      continue;
    }
    first[i] = vcvtnq_s32_f32(vmulq_n_f32(t, kInverseHalf));
    second[i] = vcvtnq_s32_f32(vsubq_f32(t, vmulq_n_f32(vcvtq_f32_s32(first[i]), kHalf)));
  }
  vst1q_s8(q, narrow_16(first));
  if (low != nullptr) vst1q_s8(low, narrow_16(second));
}

// Codes of x[begin, end), in halves if `low` is not null.
void round_range(const float* x, int64_t begin, int64_t end, float to_code, int8_t* q, int8_t* low) {
  const float32x4_t factor = vdupq_n_f32(to_code);
  int64_t k = begin;
  for (; k + 16 <= end; k += 16) round_16(x + k, factor, q + k, low == nullptr ? nullptr : low + k);
  if (k < end) {
    const auto left = static_cast<std::size_t>(end - k);
    float last[16] = {};
    int8_t bytes[2][16];
    std::memcpy(last, x + k, left * sizeof(float));
    round_16(last, factor, bytes[0], low == nullptr ? nullptr : bytes[1]);
    std::memcpy(q + k, bytes[0], left);
    if (low != nullptr) std::memcpy(low + k, bytes[1], left);
  }
}

int32_t sum_of(const int8_t* q, int64_t begin, int64_t end) {
  int32x4_t sums = vdupq_n_s32(0);
  int64_t k = begin;
  for (; k + 16 <= end; k += 16) sums = vpadalq_s16(sums, vpaddlq_s8(vld1q_s8(q + k)));
  int32_t sum = vaddvq_s32(sums);
  for (; k < end; ++k) sum += q[k];
  return sum;
}

struct Range {
  static int32_t quantize_group(const float* x, int64_t begin, int64_t end, float to_code, int8_t* q) {
    round_range(x, begin, end, to_code, q, nullptr);
    return sum_of(q, begin, end);
  }
  static void halve_group(const float* x, int64_t begin, int64_t end, float to_code, int8_t* high, int8_t* low,
                          int32_t* sum) {
    round_range(x, begin, end, to_code, high, low);
    sum[0] = sum_of(high, begin, end);
    sum[1] = sum_of(low, begin, end);
  }
  static void set_zero(int8_t* q, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) q[i] = 0;
  }
};

constexpr QuantizeRowsKernel kernel = {Isa::neon, round_rows<Floats, Range>};

}  // namespace

const QuantizeRowsKernel* quantize_rows_neon() { return &kernel; }

}  // namespace bantamweight

#else

namespace bantamweight {
const QuantizeRowsKernel* quantize_rows_neon() { return nullptr; }
}  // namespace bantamweight

#endif
