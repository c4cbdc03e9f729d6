// Depthwise convolution of float images by low-bit weights: every channel has taps of its own.
//
//   y[p, c] = bias[c] + sum_t weight[t, c] * x[p + offset[t], c]
//
// A few multiply-adds a float make it a matter of reading and writing memory. Rounding the input to
// int8 would read it twice more (its maximum must be known first) and gain nothing, so it stays float,
// and the weights are dequantized when they are packed. Sums are fused multiply-adds from the bias on,
// taps ascending, those outside the image left out: all variants agree to the last bit.
#pragma once

#include <cstddef>
#include <cstdint>

#include "runtime/isa.h"

namespace bantamweight {

// Channels of the weights are padded to a multiple of this with zeros.
constexpr int64_t kDepthwiseLanes = 32;

inline int64_t depthwise_lanes(int64_t channels) {
  return (channels + kDepthwiseLanes - 1) / kDepthwiseLanes * kDepthwiseLanes;
}

// One row of output pixels.
struct DepthwiseRow {
  const float* weight;    // [kernel_h * kernel_w][depthwise_lanes(channels)]
  const float* bias;      // [channels] or null
  const float* const* x;  // [kernel_h] the input row under each row of the kernel; null outside the image
  int64_t kernel_h, kernel_w;
  int64_t stride, dilation, pad_left;  // pixels along the row
  int64_t width;                       // pixels of an input row
  int64_t step;                        // floats from one of them to the next
  int64_t channels;
  float* y;  // out [out_width][channels]
  int64_t out_width;

  // The input pixel under tap kx of output pixel ox.
  int64_t pixel(int64_t ox, int64_t kx) const { return ox * stride - pad_left + kx * dilation; }
};

// Calls at_border(ox, kx_begin, kx_end) for each output pixel some of whose taps lie outside the row,
// inside(ox_begin, ox_end) once for those between, whose taps all lie in it.
template <class AtBorder, class Inside>
inline void depthwise_split(const DepthwiseRow& row, AtBorder at_border, Inside inside) {
  const auto first_tap = [&](int64_t ox) {
    int64_t kx = 0;
    while (kx < row.kernel_w && row.pixel(ox, kx) < 0) ++kx;
    return kx;
  };
  const auto last_tap = [&](int64_t ox) {
    int64_t kx = row.kernel_w;
    while (kx > 0 && row.pixel(ox, kx - 1) >= row.width) --kx;
    return kx;
  };
  int64_t ox = 0;
  for (; ox < row.out_width && first_tap(ox) > 0; ++ox) at_border(ox, first_tap(ox), last_tap(ox));
  int64_t end = ox;
  while (end < row.out_width && last_tap(end) == row.kernel_w) ++end;
  inside(ox, end);
  for (ox = end; ox < row.out_width; ++ox) at_border(ox, first_tap(ox), last_tap(ox));
}

struct DepthwiseKernel {
  Isa isa;
  void (*run)(const DepthwiseRow& row);  // one thread
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
