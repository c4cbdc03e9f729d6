// AVX2: one pass for the maximum, one for the codes, 32 floats a step.
//
// Per 32 floats: 4 loads, 4 and, 4 max, then 4 loads, 4 multiplications, 4 conversions, 3 packs,
// 1 permutation, 1 store and 4 additions.
#include "quantize_activations/quantize_activations.h"

#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>

#include "quantize_activations/round_rows.h"
#include "runtime/floats_avx2.h"

namespace bantamweight {
namespace {

struct Range {
  // Codes of x[begin, end) into q; returns their sum.
  static int32_t quantize_group(const float* x, int64_t begin, int64_t end, float to_code, int8_t* q) {
    const __m256 factor = _mm256_set1_ps(to_code);
    // The packs interleave the four vectors by 128-bit lanes; this puts the dwords back in order.
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    __m256i sum = _mm256_setzero_si256();
    int64_t i = begin;
    for (; i + 32 <= end; i += 32) {
      const __m256i a = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i), factor));
      const __m256i b = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i + 8), factor));
      const __m256i c = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i + 16), factor));
      const __m256i d = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i + 24), factor));
      const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(q + i), _mm256_permutevar8x32_epi32(bytes, order));
      sum = _mm256_add_epi32(sum, _mm256_add_epi32(_mm256_add_epi32(a, b), _mm256_add_epi32(c, d)));
    }
    alignas(32) int32_t lanes[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), sum);
    int32_t total = 0;
    for (int j = 0; j < 8; ++j) total += lanes[j];
    for (; i < end; ++i) {
      const int32_t code = _mm_cvtss_si32(_mm_set_ss(x[i] * to_code));
      q[i] = static_cast<int8_t>(code);
      total += code;
    }
    return total;
  }

  // As quantize_group, into two rows of halves; their sums go to sum[0] and sum[1].
  static void halve_group(const float* x, int64_t begin, int64_t end, float to_code, int8_t* high, int8_t* low,
                          int32_t* sum) {
    const __m256 factor = _mm256_set1_ps(to_code), inverse = _mm256_set1_ps(kInverseHalf), half = _mm256_set1_ps(kHalf);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    __m256i sum_high = _mm256_setzero_si256(), sum_low = sum_high;
    for (int64_t i = begin; i < end; i += 32) {
      float last[32];
      const int64_t left = end - i;
      const float* from = x + i;
      if (left < 32) {
        for (int64_t j = 0; j < 32; ++j) last[j] = j < left ? from[j] : 0.0f;
        from = last;
      }
      __m256i h[4], l[4];
      for (int j = 0; j < 4; ++j) {
        const __m256 t = _mm256_mul_ps(_mm256_loadu_ps(from + 8 * j), factor);
        h[j] = _mm256_cvtps_epi32(_mm256_mul_ps(t, inverse));
        l[j] = _mm256_cvtps_epi32(_mm256_sub_ps(t, _mm256_mul_ps(half, _mm256_cvtepi32_ps(h[j]))));
        sum_high = _mm256_add_epi32(sum_high, h[j]);
        sum_low = _mm256_add_epi32(sum_low, l[j]);
      }
      int8_t bytes[64];
      int8_t* to[2] = {left < 32 ? bytes : high + i, left < 32 ? bytes + 32 : low + i};
      const __m256i first = _mm256_packs_epi16(_mm256_packs_epi32(h[0], h[1]), _mm256_packs_epi32(h[2], h[3]));
      const __m256i second = _mm256_packs_epi16(_mm256_packs_epi32(l[0], l[1]), _mm256_packs_epi32(l[2], l[3]));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to[0]), _mm256_permutevar8x32_epi32(first, order));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to[1]), _mm256_permutevar8x32_epi32(second, order));
      for (int64_t j = 0; left < 32 && j < left; ++j) {
        high[i + j] = bytes[j];
        low[i + j] = bytes[32 + j];
      }
    }
    alignas(32) int32_t lanes[16];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), sum_high);
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes + 8), sum_low);
    sum[0] = sum[1] = 0;
    for (int j = 0; j < 8; ++j) {
      sum[0] += lanes[j];
      sum[1] += lanes[8 + j];
    }
  }

  static void set_zero(int8_t* q, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) q[i] = 0;
  }
};

constexpr QuantizeRowsKernel kernel = {Isa::avx2, round_rows<Floats, Range>};

}  // namespace

const QuantizeRowsKernel* quantize_rows_avx2() { return &kernel; }

}  // namespace bantamweight

#else

namespace bantamweight {
const QuantizeRowsKernel* quantize_rows_avx2() { return nullptr; }
}  // namespace bantamweight

#endif
