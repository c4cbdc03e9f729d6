// Layer normalisation (Ba, Kiros & Hinton 2016, arXiv 1607.06450) as torch defines it, with an
// addition before it: for z = x + residual and every row,
//
//   y = (z - mean(z)) / sqrt(var(z) + eps) * weight + bias,   var the mean square of z - mean(z)
//
// Two passes give the mean and the variance. Element i is summed in lane i % 32, in ascending order
// (the squares by fused multiply-adds), and the lanes are folded in halves (16, 8, 4, 2, 1), so that
// every variant gives the same bits.
#pragma once

#include <cstddef>
#include <cstdint>

#include "runtime/isa.h"
#include "runtime/status.h"

namespace bantamweight {

constexpr int64_t kNormLanes = 32;

struct LayerNorm {
  const float* weight = nullptr;  // [n], or null for ones
  const float* bias = nullptr;    // [n], or null for zeros
  float eps = 0.0f;
};

struct LayerNormArgs {
  const float* x = nullptr;  // [m, n], rows ldx floats apart
  int64_t ldx = 0;
  const float* residual = nullptr;  // [m, n], rows ldr floats apart, or null
  int64_t ldr = 0;
  int64_t m = 0, n = 0;
  LayerNorm norm;
  float* y = nullptr;  // out [m, n], rows ldy floats apart; may be x
  int64_t ldy = 0;
};

// Threads: OpenMP's current setting.
Status layer_norm(const LayerNormArgs& args, Isa ceiling);

struct LayerNormKernel {
  Isa isa;
  void (*run)(const LayerNormArgs& args);  // one thread, all rows
};

const LayerNormKernel* layer_norm_reference();
const LayerNormKernel* layer_norm_avx2();
const LayerNormKernel* layer_norm_avx512();
const LayerNormKernel* layer_norm_neon();

// Variants this op has in this build, best first.
const Isa* layer_norm_variants(std::size_t* count);

}  // namespace bantamweight
