// AVX-512: 32 channels of four pixels stay in eight registers while the taps go by: ten loads for
// eight fused multiply-adds, so the loads bound it where memory does not.
#include "depthwise_conv/depthwise_conv.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#include "runtime/floats_avx512.h"

namespace bantamweight {
namespace {

constexpr int kPixels = 4;

// `pixels` output pixels from ox on, taps kx_begin .. kx_end - 1, channels c .. c + 31.
template <int pixels>
void run_pixels(const DepthwiseRow& row, int64_t c, int64_t ox, int64_t kx_begin, int64_t kx_end) {
  const int64_t lanes = depthwise_lanes(row.channels), next = row.stride * row.step;
  const __mmask16 low = Floats::part(row.channels - c), high = Floats::part(row.channels - c - 16);
  __m512 low_sum[pixels], high_sum[pixels];
  const __m512 bias_low = row.bias == nullptr ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(low, row.bias + c);
  const __m512 bias_high = row.bias == nullptr ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(high, row.bias + c + 16);
#pragma GCC unroll 4
  for (int p = 0; p < pixels; ++p) {
    low_sum[p] = bias_low;
    high_sum[p] = bias_high;
  }
  for (int64_t ky = 0; ky < row.kernel_h; ++ky) {
    if (row.x[ky] == nullptr) continue;
    for (int64_t kx = kx_begin; kx < kx_end; ++kx) {
      const float* weight = row.weight + (ky * row.kernel_w + kx) * lanes + c;
      const __m512 weight_low = _mm512_loadu_ps(weight), weight_high = _mm512_loadu_ps(weight + 16);
      const float* x = row.x[ky] + row.pixel(ox, kx) * row.step + c;
#pragma GCC unroll 4
      for (int p = 0; p < pixels; ++p) {
        low_sum[p] = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(low, x + p * next), weight_low, low_sum[p]);
        high_sum[p] = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(high, x + p * next + 16), weight_high, high_sum[p]);
      }
    }
  }
  float* y = row.y + ox * row.channels + c;
#pragma GCC unroll 4
  for (int p = 0; p < pixels; ++p) {
    _mm512_mask_storeu_ps(y + p * row.channels, low, low_sum[p]);
    _mm512_mask_storeu_ps(y + p * row.channels + 16, high, high_sum[p]);
  }
}

// Channels inside pixels: the input under a few pixels stays in L1.
template <int pixels>
void run_channels(const DepthwiseRow& row, int64_t ox, int64_t kx_begin, int64_t kx_end) {
  for (int64_t c = 0; c < row.channels; c += 32) run_pixels<pixels>(row, c, ox, kx_begin, kx_end);
}

void run(const DepthwiseRow& row) {
  depthwise_split(
      row, [&](int64_t ox, int64_t kx_begin, int64_t kx_end) { run_channels<1>(row, ox, kx_begin, kx_end); },
      [&](int64_t ox, int64_t end) {
        for (; ox + kPixels <= end; ox += kPixels) run_channels<kPixels>(row, ox, 0, row.kernel_w);
        for (; ox < end; ++ox) run_channels<1>(row, ox, 0, row.kernel_w);
      });
}

constexpr DepthwiseKernel kernel = {Isa::avx512, run};

}  // namespace

const DepthwiseKernel* depthwise_avx512() { return &kernel; }

}  // namespace bantamweight

#else
namespace bantamweight {
const DepthwiseKernel* depthwise_avx512() { return nullptr; }
}  // namespace bantamweight
#endif
