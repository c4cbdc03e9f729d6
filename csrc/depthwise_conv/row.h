// A row of output pixels by vectors of floats (runtime/floats_*.h): two vectors of channels of four pixels
// stay in eight registers while the taps go by, and the last channels go one by one. Everything is
// static: each file that includes it keeps a copy with its own flags.
#pragma once

#include "depthwise_conv/depthwise_conv.h"

namespace bantamweight {

static constexpr int kPixels = 4;

// `pixels` output pixels from ox on, taps kx_begin .. kx_end - 1, channels c .. c + 2 F::kLanes - 1.
template <class F, int pixels>
static void run_pixels(const DepthwiseRow& row, int64_t c, int64_t ox, int64_t kx_begin, int64_t kx_end) {
  const int64_t lanes = depthwise_lanes(row.channels), next = row.stride * row.step;
  const auto bias_low = row.bias == nullptr ? F::all(0.0f) : F::load(row.bias + c);
  const auto bias_high = row.bias == nullptr ? F::all(0.0f) : F::load(row.bias + c + F::kLanes);
  typename F::Vector low_sum[pixels], high_sum[pixels];
#pragma GCC unroll 4
  for (int p = 0; p < pixels; ++p) {
    low_sum[p] = bias_low;
    high_sum[p] = bias_high;
  }
  for (int64_t ky = 0; ky < row.kernel_h; ++ky) {
    if (row.x[ky] == nullptr) continue;
    for (int64_t kx = kx_begin; kx < kx_end; ++kx) {
      const float* weight = row.weight + (ky * row.kernel_w + kx) * lanes + c;
      const auto weight_low = F::load(weight), weight_high = F::load(weight + F::kLanes);
      const float* x = row.x[ky] + row.pixel(ox, kx) * row.step + c;
#pragma GCC unroll 4
      for (int p = 0; p < pixels; ++p) {
        low_sum[p] = F::multiply_add(F::load(x + p * next), weight_low, low_sum[p]);
        high_sum[p] = F::multiply_add(F::load(x + p * next + F::kLanes), weight_high, high_sum[p]);
      }
    }
  }
  float* y = row.y + ox * row.channels + c;
#pragma GCC unroll 4
  for (int p = 0; p < pixels; ++p) {
    F::store(y + p * row.channels, low_sum[p]);
    F::store(y + p * row.channels + F::kLanes, high_sum[p]);
  }
}

static void run_channel(const DepthwiseRow& row, int64_t c, int64_t ox, int64_t kx_begin, int64_t kx_end) {
  const int64_t lanes = depthwise_lanes(row.channels);
  float sum = row.bias == nullptr ? 0.0f : row.bias[c];
  for (int64_t ky = 0; ky < row.kernel_h; ++ky) {
    if (row.x[ky] == nullptr) continue;
    for (int64_t kx = kx_begin; kx < kx_end; ++kx) {
      sum = __builtin_fmaf(row.x[ky][row.pixel(ox, kx) * row.step + c],
                           row.weight[(ky * row.kernel_w + kx) * lanes + c], sum);
    }
  }
  row.y[ox * row.channels + c] = sum;
}

// Channels inside pixels: the input under a few pixels stays in L1.
template <class F, int pixels>
static void run_channels(const DepthwiseRow& row, int64_t ox, int64_t kx_begin, int64_t kx_end) {
  int64_t c = 0;
  for (; c + 2 * F::kLanes <= row.channels; c += 2 * F::kLanes) run_pixels<F, pixels>(row, c, ox, kx_begin, kx_end);
  for (; c < row.channels; ++c) {
    for (int p = 0; p < pixels; ++p) run_channel(row, c, ox + p, kx_begin, kx_end);
  }
}

template <class F>
static void depthwise_row(const DepthwiseRow& row) {
  depthwise_split(
      row, [&](int64_t ox, int64_t kx_begin, int64_t kx_end) { run_channels<F, 1>(row, ox, kx_begin, kx_end); },
      [&](int64_t ox, int64_t end) {
        for (; ox + kPixels <= end; ox += kPixels) run_channels<F, kPixels>(row, ox, 0, row.kernel_w);
        for (; ox < end; ++ox) run_channels<F, 1>(row, ox, 0, row.kernel_w);
      });
}

}  // namespace bantamweight
