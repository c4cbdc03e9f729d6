// NEON: 32 elements a step in eight vectors; the last n % 32 one by one, each in its lane.
#include "layer_norm/layer_norm.h"

#if defined(__aarch64__)
#include <arm_neon.h>

namespace bantamweight {
namespace {

constexpr int kVectors = 8, kLanes = 4;

inline float fold(float* lanes) {
  for (int half = kVectors * kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

void run(const LayerNormArgs& args) {
  const int64_t n = args.n, whole = n / kNormLanes * kNormLanes;
  const auto size = static_cast<float>(n);
  const float *weight = args.norm.weight, *bias = args.norm.bias;
  for (int64_t r = 0; r < args.m; ++r) {
    const float* x = args.x + r * args.ldx;
    const float* residual = args.residual == nullptr ? nullptr : args.residual + r * args.ldr;
    float* y = args.y + r * args.ldy;
    float lanes[kNormLanes];
    float32x4_t s[kVectors];

    for (int j = 0; j < kVectors; ++j) s[j] = vdupq_n_f32(0.0f);
    for (int64_t i = 0; i < whole; i += kNormLanes) {
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) {
        const int64_t at = i + kLanes * j;
        float32x4_t z = vld1q_f32(x + at);
        if (residual != nullptr) z = vaddq_f32(z, vld1q_f32(residual + at));
        vst1q_f32(y + at, z);
        s[j] = vaddq_f32(s[j], z);
      }
    }
    for (int j = 0; j < kVectors; ++j) vst1q_f32(lanes + kLanes * j, s[j]);
    for (int64_t i = whole; i < n; ++i) {
      y[i] = residual == nullptr ? x[i] : x[i] + residual[i];
      lanes[i - whole] += y[i];
    }
    const float mean = fold(lanes) / size;
    const float32x4_t means = vdupq_n_f32(mean);

    for (int j = 0; j < kVectors; ++j) s[j] = vdupq_n_f32(0.0f);
    for (int64_t i = 0; i < whole; i += kNormLanes) {
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) {
        const float32x4_t d = vsubq_f32(vld1q_f32(y + i + kLanes * j), means);
        s[j] = vfmaq_f32(s[j], d, d);
      }
    }
    for (int j = 0; j < kVectors; ++j) vst1q_f32(lanes + kLanes * j, s[j]);
    for (int64_t i = whole; i < n; ++i) {
      const float d = y[i] - mean;
      lanes[i - whole] = __builtin_fmaf(d, d, lanes[i - whole]);
    }
    const float inverse = 1.0f / __builtin_sqrtf(fold(lanes) / size + args.norm.eps);
    const float32x4_t inverses = vdupq_n_f32(inverse);

    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
      const float32x4_t w = weight == nullptr ? vdupq_n_f32(1.0f) : vld1q_f32(weight + i);
      const float32x4_t b = bias == nullptr ? vdupq_n_f32(0.0f) : vld1q_f32(bias + i);
      const float32x4_t d = vsubq_f32(vld1q_f32(y + i), means);
      vst1q_f32(y + i, vfmaq_f32(b, vmulq_f32(d, inverses), w));
    }
    for (; i < n; ++i) {
      const float w = weight == nullptr ? 1.0f : weight[i], b = bias == nullptr ? 0.0f : bias[i];
      y[i] = __builtin_fmaf((y[i] - mean) * inverse, w, b);
    }
  }
}

constexpr LayerNormKernel kernel = {Isa::neon, run};

}  // namespace

const LayerNormKernel* layer_norm_neon() { return &kernel; }

}  // namespace bantamweight

#else

namespace bantamweight {
const LayerNormKernel* layer_norm_neon() { return nullptr; }
}  // namespace bantamweight

#endif
