// NEON: 8 channels of four pixels stay in eight registers while the taps go by. What is left of the
// channels runs in scalar fused multiply-adds.
#include "depthwise_conv/depthwise_conv.h"

#if defined(__ARM_NEON) && defined(__aarch64__)
#include <arm_neon.h>

namespace bantamweight {
namespace {

constexpr int kPixels = 4;

// `pixels` output pixels from ox on, taps kx_begin .. kx_end - 1, channels c .. c + 7.
template <int pixels>
void run_pixels(const DepthwiseRow& row, int64_t c, int64_t ox, int64_t kx_begin, int64_t kx_end) {
  const int64_t lanes = depthwise_lanes(row.channels), next = row.stride * row.step;
  const float32x4_t bias_low = row.bias == nullptr ? vdupq_n_f32(0.0f) : vld1q_f32(row.bias + c);
  const float32x4_t bias_high = row.bias == nullptr ? vdupq_n_f32(0.0f) : vld1q_f32(row.bias + c + 4);
  float32x4_t low_sum[pixels], high_sum[pixels];
#pragma GCC unroll 4
  for (int p = 0; p < pixels; ++p) {
    low_sum[p] = bias_low;
    high_sum[p] = bias_high;
  }
  for (int64_t ky = 0; ky < row.kernel_h; ++ky) {
    if (row.x[ky] == nullptr) continue;
    for (int64_t kx = kx_begin; kx < kx_end; ++kx) {
      const float* weight = row.weight + (ky * row.kernel_w + kx) * lanes + c;
      const float32x4_t weight_low = vld1q_f32(weight), weight_high = vld1q_f32(weight + 4);
      const float* x = row.x[ky] + row.pixel(ox, kx) * row.step + c;
#pragma GCC unroll 4
      for (int p = 0; p < pixels; ++p) {
        low_sum[p] = vfmaq_f32(low_sum[p], vld1q_f32(x + p * next), weight_low);
        high_sum[p] = vfmaq_f32(high_sum[p], vld1q_f32(x + p * next + 4), weight_high);
      }
    }
  }
  float* y = row.y + ox * row.channels + c;
#pragma GCC unroll 4
  for (int p = 0; p < pixels; ++p) {
    vst1q_f32(y + p * row.channels, low_sum[p]);
    vst1q_f32(y + p * row.channels + 4, high_sum[p]);
  }
}

void run_channel(const DepthwiseRow& row, int64_t c, int64_t ox, int64_t kx_begin, int64_t kx_end) {
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
template <int pixels>
void run_channels(const DepthwiseRow& row, int64_t ox, int64_t kx_begin, int64_t kx_end) {
  int64_t c = 0;
  for (; c + 8 <= row.channels; c += 8) run_pixels<pixels>(row, c, ox, kx_begin, kx_end);
  for (; c < row.channels; ++c) {
    for (int p = 0; p < pixels; ++p) run_channel(row, c, ox + p, kx_begin, kx_end);
  }
}

void run(const DepthwiseRow& row) {
  depthwise_split(
      row, [&](int64_t ox, int64_t kx_begin, int64_t kx_end) { run_channels<1>(row, ox, kx_begin, kx_end); },
      [&](int64_t ox, int64_t end) {
        for (; ox + kPixels <= end; ox += kPixels) run_channels<kPixels>(row, ox, 0, row.kernel_w);
        for (; ox < end; ++ox) run_channels<1>(row, ox, 0, row.kernel_w);
      });
}

constexpr DepthwiseKernel kernel = {Isa::neon, run};

}  // namespace

const DepthwiseKernel* depthwise_neon() { return &kernel; }

}  // namespace bantamweight

#else
namespace bantamweight {
const DepthwiseKernel* depthwise_neon() { return nullptr; }
}  // namespace bantamweight
#endif
