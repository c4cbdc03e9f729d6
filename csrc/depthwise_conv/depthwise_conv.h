// Depthwise convolution of int8 activations: every channel has taps of its own, so vectors run
// over channels and nothing is shared between them.
//
//   y[r, c] = bias[c] + row_scale[r] * sum_g (scale[g, c] * sum_{t in g} w[t, c] * a[r + offset[t], c]
//                                             - zero_scale[g, c] * sum_{t in g} a[r + offset[t], c])
//
// The second sum is there only for zeros that are no integers; integer zeros are inside w. Taps are
// worked off in pairs, because the 16-bit multiply-adds of every architecture take two at once.
#pragma once

#include <cstddef>
#include <cstdint>

#include "runtime/isa.h"

namespace bantamweight {

// Channels of the tables are padded to a multiple of this with zeros.
constexpr int64_t kDepthwiseLanes = 32;

inline int64_t depthwise_lanes(int64_t channels) {
  return (channels + kDepthwiseLanes - 1) / kDepthwiseLanes * kDepthwiseLanes;
}

// Two taps of one scale group; a group with an odd number of taps ends in a pair whose second
// weight is 0.
struct TapPair {
  int64_t offset[2];  // bytes from the row pointer
  int64_t group;      // non-decreasing over the pairs
};

struct DepthwiseTask {
  const int16_t* weight;    // [pair_count][lanes][2]
  const float* scale;       // [groups][lanes]
  const float* zero_scale;  // [groups][lanes], or null
  const TapPair* pairs;     // [pair_count]
  int64_t pair_count;
  int64_t groups;
  int64_t channels;
  const int8_t* const* rows;  // [row_count]; readable 64 bytes past the last channel of each tap
  const float* row_scale;     // [row_count]
  int64_t row_count;
  bool int16_sums;    // the weights are so small that no sum over a group leaves 16 bits
  const float* bias;  // [channels] or null
  float* y;           // out: row r at y + r * ldy
  int64_t ldy;
};

struct DepthwiseKernel {
  Isa isa;
  void (*run)(const DepthwiseTask& task);  // one thread
};

const DepthwiseKernel* depthwise_reference();
const DepthwiseKernel* depthwise_avx2();
const DepthwiseKernel* depthwise_avx512();
const DepthwiseKernel* depthwise_neon();

// Variants this op has in this build, best first.
const Isa* depthwise_variants(std::size_t* count);

// The best variant under `ceiling`.
const DepthwiseKernel* depthwise_pick(Isa ceiling);

}  // namespace bantamweight
