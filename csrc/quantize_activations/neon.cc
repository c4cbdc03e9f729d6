// Sixteen floats at a time: two passes over a row that is in L1 for the second.
//
// vcvtnq rounds to nearest, ties to even, as nearbyint does in the default mode. The narrowing
// saturates, but |x * (127 / max)| never reaches 127.5, so it never has to.
#include "quantize_activations/quantize_activations.h"

#if defined(__aarch64__)

#include <arm_neon.h>

#include <cmath>
#include <cstring>

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

// Codes of x[0, count), which share a maximum of at most `most` codes; false if one is not finite.
bool round_range(const float* x, int64_t count, float most, int8_t* q, int8_t* low, float* scale) {
  const float max = absolute_maximum(x, count);
  if (!std::isfinite(max)) return false;
  // A maximum so small that most / max overflows is as good as zero.
  const float to_code = most / max;
  const bool zero = !std::isfinite(to_code);
  *scale = zero ? 0.0f : max / most;
  const float32x4_t factor = vdupq_n_f32(zero ? 0.0f : to_code);
  int64_t k = 0;
  for (; k + 16 <= count; k += 16) round_16(x + k, factor, q + k, low == nullptr ? nullptr : low + k);
  if (k < count) {
    const auto left = static_cast<std::size_t>(count - k);
    float last[16] = {};
    int8_t bytes[2][16];
    std::memcpy(last, x + k, left * sizeof(float));
    round_16(last, factor, bytes[0], low == nullptr ? nullptr : bytes[1]);
    std::memcpy(q + k, bytes[0], left);
    if (low != nullptr) std::memcpy(low + k, bytes[1], left);
  }
  return true;
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
  const int64_t padded = padded_row_bytes(args.k), per_row = rows_per_row(args.mode);
  const int64_t groups = args.k == 0 ? 0 : (args.k + args.group_size - 1) / args.group_size;
  const auto size_of = [&](int64_t g) {
    const int64_t left = args.k - g * args.group_size;
    return left < args.group_size ? left : args.group_size;
  };
  for (int64_t m = 0; m < args.m; ++m) {
    const float* x = args.x + m * args.ldx;
    int8_t* q = args.q + m * per_row * padded;
    bool finite = true;
    if (args.mode == Activations::int8_block) {
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t begin = g * args.group_size;
        finite &= round_range(x + begin, size_of(g), 127.0f, q + begin, nullptr, args.scale + m * groups + g);
      }
    } else if (args.mode == Activations::int16) {
      float* scale = args.scale + 2 * m;
      finite = round_range(x, args.k, kInt16Max, q, q + padded, scale + 1);
      if (finite) scale[0] = kHalf * scale[1];
    } else {
      finite = round_range(x, args.k, 127.0f, q, nullptr, args.scale + m);
    }
    if (!finite) return Status::not_finite;
    for (int64_t r = m * per_row; r < (m + 1) * per_row; ++r, q += padded) {
      for (int64_t k = args.k; k < padded; ++k) q[k] = 0;
      for (int64_t g = 0; g < groups; ++g) {
        args.sums[r * groups + g] = sum_of(q + g * args.group_size, size_of(g));
      }
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
