// AVX2: 16 channels of four pixels stay in eight registers while the taps go by. What is left of the
// channels runs in scalar fused multiply-adds.
#include "depthwise_conv/depthwise_conv.h"

#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>

namespace bantamweight {
namespace {

constexpr int kPixels = 4;

// `pixels` output pixels from ox on, taps kx_begin .. kx_end - 1, channels c .. c + 15.
template <int pixels>
void run_pixels(const DepthwiseRow& row, int64_t c, int64_t ox, int64_t kx_begin, int64_t kx_end) {
  const int64_t lanes = depthwise_lanes(row.channels), next = row.stride * row.step;
  const __m256 bias_low = row.bias == nullptr ? _mm256_setzero_ps() : _mm256_loadu_ps(row.bias + c);
  const __m256 bias_high = row.bias == nullptr ? _mm256_setzero_ps() : _mm256_loadu_ps(row.bias + c + 8);
  __m256 low_sum[pixels], high_sum[pixels];
#pragma GCC unroll 4
  for (int p = 0; p < pixels; ++p) {
    low_sum[p] = bias_low;
    high_sum[p] = bias_high;
  }
  for (int64_t ky = 0; ky < row.kernel_h; ++ky) {
    if (row.x[ky] == nullptr) continue;
    for (int64_t kx = kx_begin; kx < kx_end; ++kx) {
      const float* weight = row.weight + (ky * row.kernel_w + kx) * lanes + c;
      const __m256 weight_low = _mm256_loadu_ps(weight), weight_high = _mm256_loadu_ps(weight + 8);
      const float* x = row.x[ky] + row.pixel(ox, kx) * row.step + c;
#pragma GCC unroll 4
      for (int p = 0; p < pixels; ++p) {
        low_sum[p] = _mm256_fmadd_ps(_mm256_loadu_ps(x + p * next), weight_low, low_sum[p]);
        high_sum[p] = _mm256_fmadd_ps(_mm256_loadu_ps(x + p * next + 8), weight_high, high_sum[p]);
      }
    }
  }
  float* y = row.y + ox * row.channels + c;
#pragma GCC unroll 4
  for (int p = 0; p < pixels; ++p) {
    _mm256_storeu_ps(y + p * row.channels, low_sum[p]);
    _mm256_storeu_ps(y + p * row.channels + 8, high_sum[p]);
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
  for (; c + 16 <= row.channels; c += 16) run_pixels<pixels>(row, c, ox, kx_begin, kx_end);
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

constexpr DepthwiseKernel kernel = {Isa::avx2, run};

}  // namespace

const DepthwiseKernel* depthwise_avx2() { return &kernel; }

}  // namespace bantamweight

#else
namespace bantamweight {
const DepthwiseKernel* depthwise_avx2() { return nullptr; }
}  // namespace bantamweight
#endif
