// Sixteen floats at a time: two passes over a row that is in L1 for the second.
//
// vcvtnq rounds to nearest, ties to even, as nearbyint does in the default mode. The narrowing
// saturates, but |x * (127 / max)| never reaches 127.5, so it never has to.
#include "quantize_activations/quantize_activations.h"

#if defined(__aarch64__)

#include <arm_neon.h>

#include <cmath>

namespace bantamweight {
namespace {

// The largest |x| of a row; NaN or infinity if it holds one. vmaxq gives NaN if either side is NaN.
float absolute_maximum(const float* x, int64_t k_size) {
  float32x4_t max[4];
  for (auto& m : max) m = vdupq_n_f32(0.0f);
  int64_t k = 0;
  for (; k + 16 <= k_size; k += 16) {
    for (int i = 0; i < 4; ++i) max[i] = vmaxq_f32(max[i], vabsq_f32(vld1q_f32(x + k + 4 * i)));
  }
  for (; k < k_size; ++k) max[0] = vmaxq_f32(max[0], vabsq_f32(vdupq_n_f32(x[k])));
  return vmaxvq_f32(vmaxq_f32(vmaxq_f32(max[0], max[1]), vmaxq_f32(max[2], max[3])));
}

int8x16_t round_16(const float* x, float32x4_t to_code) {
  int32x4_t q[4];
  for (int i = 0; i < 4; ++i) q[i] = vcvtnq_s32_f32(vmulq_f32(vld1q_f32(x + 4 * i), to_code));
  const int16x8_t low = vcombine_s16(vqmovn_s32(q[0]), vqmovn_s32(q[1]));
  const int16x8_t high = vcombine_s16(vqmovn_s32(q[2]), vqmovn_s32(q[3]));
  return vcombine_s8(vqmovn_s16(low), vqmovn_s16(high));
}

int32_t sum_of(const int8_t* q, int64_t count) {
  int32x4_t sums = vdupq_n_s32(0);
  int64_t k = 0;
  for (; k + 16 <= count; k += 16) sums = vpadalq_s16(sums, vpaddlq_s8(vld1q_s8(q + k)));
  int32_t sum = vaddvq_s32(sums);
  for (; k < count; ++k) sum += q[k];
  return sum;
}

Status run(const QuantizeRowsArgs& args) {
  const int64_t padded = padded_row_bytes(args.k);
  const int64_t groups = args.k == 0 ? 0 : (args.k + args.group_size - 1) / args.group_size;
  for (int64_t m = 0; m < args.m; ++m) {
    const float* x = args.x + m * args.ldx;
    int8_t* q = args.q + m * padded;
    int32_t* sums = args.sums + m * groups;
    const float max = absolute_maximum(x, args.k);
    if (!std::isfinite(max)) return Status::not_finite;
    // A maximum so small that 127 / max overflows is as good as zero.
    const float to_code = 127.0f / max;
    const bool zero_row = !std::isfinite(to_code);
    args.scale[m] = zero_row ? 0.0f : max / 127.0f;
    const float32x4_t factor = vdupq_n_f32(zero_row ? 0.0f : to_code);
    int64_t k = 0;
    for (; k + 16 <= args.k; k += 16) vst1q_s8(q + k, round_16(x + k, factor));
    if (k < args.k) {
      float last[16] = {};
      for (int64_t i = k; i < args.k; ++i) last[i - k] = x[i];
      vst1q_s8(q + k, round_16(last, factor));
      k += 16;
    }
    for (; k < padded; k += 16) vst1q_s8(q + k, vdupq_n_s8(0));
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t begin = g * args.group_size, left = args.k - begin;
      sums[g] = sum_of(q + begin, left < args.group_size ? left : args.group_size);
    }
  }
  return Status::ok;
}

constexpr QuantizeRowsKernel kernel = {Isa::neon, run};

}  // namespace

const QuantizeRowsKernel* quantize_rows_neon() { return &kernel; }

}  // namespace bantamweight

#else

namespace bantamweight {
const QuantizeRowsKernel* quantize_rows_neon() { return nullptr; }
}  // namespace bantamweight

#endif
