// One channel over vectors that divide the 32 lanes (runtime/floats_*.h), the last length % 32 elements of a row
// one by one, each in its lane. Everything is static: each file that includes it keeps a copy with its own flags.
#pragma once

#include "batch_norm/coefficients.h"
#include "runtime/fold.h"

namespace bantamweight {

template <class F>
static inline BatchNormSums batch_norm_sums(const BatchNormSecondArgs& args, int64_t c) {
  constexpr int64_t kLanes = F::kLanes, kVectors = kBatchNormLanes / kLanes;
  const int64_t length = args.length, whole = length / kBatchNormLanes * kBatchNormLanes;
  const float mean = args.mean[c];
  const auto means = F::all(mean);
  BatchNormSums sums;
  float lanes[3][kBatchNormLanes] = {};
  int64_t filled = 0;
  for (int64_t row = 0; row < args.n; ++row) {
    const int64_t begin = (row * args.channels + c) * length;
    const float *u = args.u + begin, *dy = args.dy + begin, *x = args.x + begin;
    // Two vectors of each sum at a time: all of NEON's eight, thrice, would not fit its registers.
    for (int64_t j = 0; j < kVectors; j += 2) {
      typename F::Vector s[3][2];
#pragma GCC unroll 2
      for (int64_t k = 0; k < 2; ++k) {
        for (int64_t t = 0; t < 3; ++t) s[t][k] = F::load(lanes[t] + kLanes * (j + k));
      }
      for (int64_t i = 0; i < whole; i += kBatchNormLanes) {
#pragma GCC unroll 2
        for (int64_t k = 0; k < 2; ++k) {
          const int64_t at = i + kLanes * (j + k);
          const auto value = F::load(u + at);
          s[0][k] = F::add(s[0][k], value);
          s[1][k] = F::multiply_add(value, F::subtract(F::load(x + at), means), s[1][k]);
          s[2][k] = F::multiply_add(value, F::load(dy + at), s[2][k]);
        }
      }
#pragma GCC unroll 2
      for (int64_t k = 0; k < 2; ++k) {
        for (int64_t t = 0; t < 3; ++t) F::store(lanes[t] + kLanes * (j + k), s[t][k]);
      }
    }
    for (int64_t i = whole; i < length; ++i) {
      lanes[0][i - whole] += u[i];
      lanes[1][i - whole] = __builtin_fmaf(u[i], x[i] - mean, lanes[1][i - whole]);
      lanes[2][i - whole] = __builtin_fmaf(u[i], dy[i], lanes[2][i - whole]);
    }
    filled += length;
    if (filled >= kBatchNormBlock || row + 1 == args.n) {
      sums.u += fold_lanes<kBatchNormLanes>(lanes[0]);
      sums.u_d += fold_lanes<kBatchNormLanes>(lanes[1]);
      sums.u_dy += fold_lanes<kBatchNormLanes>(lanes[2]);
      for (auto& of : lanes) {
        for (float& lane : of) lane = 0.0f;
      }
      filled = 0;
    }
  }
  return sums;
}

template <class F, bool kHasU>
static inline void batch_norm_results(const BatchNormSecondArgs& args, int64_t c, const BatchNormCoefficients& to) {
  constexpr int64_t kLanes = F::kLanes;
  const int64_t length = args.length;
  const float mean = args.mean[c];
  const auto means = F::all(mean);
  const auto dy_u = F::all(to.dy_u), dy_d = F::all(to.dy_d), dy_1 = F::all(to.dy_1);
  const auto x_u = F::all(to.x_u), x_dy = F::all(to.x_dy), x_d = F::all(to.x_d), x_1 = F::all(to.x_1);
  for (int64_t row = 0; row < args.n; ++row) {
    const int64_t begin = (row * args.channels + c) * length;
    const float *u = kHasU ? args.u + begin : nullptr, *dy = args.dy + begin, *x = args.x + begin;
    float *to_dy = args.to_dy + begin, *to_x = args.to_x + begin;
    int64_t i = 0;
    for (; i + kLanes <= length; i += kLanes) {
      const auto d = F::subtract(F::load(x + i), means);
      auto a = F::multiply_add(dy_d, d, dy_1);
      auto b = F::multiply_add(x_dy, F::load(dy + i), F::multiply_add(x_d, d, x_1));
      if (kHasU) {
        const auto value = F::load(u + i);
        a = F::multiply_add(dy_u, value, a);
        b = F::multiply_add(x_u, value, b);
      }
      F::store(to_dy + i, a);
      F::store(to_x + i, b);
    }
    for (; i < length; ++i) {
      const float d = x[i] - mean;
      float a = __builtin_fmaf(to.dy_d, d, to.dy_1);
      float b = __builtin_fmaf(to.x_dy, dy[i], __builtin_fmaf(to.x_d, d, to.x_1));
      if (kHasU) {
        a = __builtin_fmaf(to.dy_u, u[i], a);
        b = __builtin_fmaf(to.x_u, u[i], b);
      }
      to_dy[i] = a;
      to_x[i] = b;
    }
  }
}

template <class F>
static void batch_norm_channel(const BatchNormSecondArgs& args, int64_t c) {
  const BatchNormSums sums = args.u == nullptr ? BatchNormSums() : batch_norm_sums<F>(args, c);
  const BatchNormCoefficients to = batch_norm_coefficients(args, c, sums);
  args.to_weight[c] = to.weight;
  if (args.u == nullptr) {
    batch_norm_results<F, false>(args, c, to);
  } else {
    batch_norm_results<F, true>(args, c, to);
  }
}

}  // namespace bantamweight
