// Layer norm over vectors that divide the 32 lanes (runtime/floats_*.h), the last n % 32 elements one by
// one, each in its lane. Everything is static: each file that includes it keeps a copy with its own flags.
#pragma once

#include "layer_norm/layer_norm.h"
#include "runtime/fold.h"

namespace bantamweight {

template <class F>
static void layer_norm_rows(const LayerNormArgs& args) {
  constexpr int64_t kLanes = F::kLanes, kVectors = kNormLanes / kLanes;
  const int64_t n = args.n, whole = n / kNormLanes * kNormLanes;
  const auto size = static_cast<float>(n);
  const float *weight = args.norm.weight, *bias = args.norm.bias;
  for (int64_t r = 0; r < args.m; ++r) {
    const float* x = args.x + r * args.ldx;
    const float* residual = args.residual == nullptr ? nullptr : args.residual + r * args.ldr;
    float* y = args.y + r * args.ldy;
    float lanes[kNormLanes];
    typename F::Vector s[kVectors];

    for (int64_t j = 0; j < kVectors; ++j) s[j] = F::all(0.0f);
    for (int64_t i = 0; i < whole; i += kNormLanes) {
#pragma GCC unroll 8
      for (int64_t j = 0; j < kVectors; ++j) {
        const int64_t at = i + kLanes * j;
        auto z = F::load(x + at);
        if (residual != nullptr) z = F::add(z, F::load(residual + at));
        F::store(y + at, z);
        s[j] = F::add(s[j], z);
      }
    }
    for (int64_t j = 0; j < kVectors; ++j) F::store(lanes + kLanes * j, s[j]);
    for (int64_t i = whole; i < n; ++i) {
      y[i] = residual == nullptr ? x[i] : x[i] + residual[i];
      lanes[i - whole] += y[i];
    }
    const float mean = fold_lanes<kNormLanes>(lanes) / size;
    const auto means = F::all(mean);

    for (int64_t j = 0; j < kVectors; ++j) s[j] = F::all(0.0f);
    for (int64_t i = 0; i < whole; i += kNormLanes) {
#pragma GCC unroll 8
      for (int64_t j = 0; j < kVectors; ++j) {
        const auto d = F::subtract(F::load(y + i + kLanes * j), means);
        s[j] = F::multiply_add(d, d, s[j]);
      }
    }
    for (int64_t j = 0; j < kVectors; ++j) F::store(lanes + kLanes * j, s[j]);
    for (int64_t i = whole; i < n; ++i) {
      const float d = y[i] - mean;
      lanes[i - whole] = __builtin_fmaf(d, d, lanes[i - whole]);
    }
    const float inverse = 1.0f / __builtin_sqrtf(fold_lanes<kNormLanes>(lanes) / size + args.norm.eps);
    const auto inverses = F::all(inverse);

    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
      const auto w = weight == nullptr ? F::all(1.0f) : F::load(weight + i);
      const auto b = bias == nullptr ? F::all(0.0f) : F::load(bias + i);
      const auto d = F::subtract(F::load(y + i), means);
      F::store(y + i, F::multiply_add(F::multiply(d, inverses), w, b));
    }
    for (; i < n; ++i) {
      const float w = weight == nullptr ? 1.0f : weight[i], b = bias == nullptr ? 0.0f : bias[i];
      y[i] = __builtin_fmaf((y[i] - mean) * inverse, w, b);
    }
  }
}

}  // namespace bantamweight
