// AVX-512: one pass for the maximum, one for the codes, 64 floats a step.
//
// Per 64 floats: 4 loads, 4 and, 4 max, then 4 loads, 4 multiplications, 4 conversions, 3 packs,
// 1 permutation, 1 store and 4 additions. Bound by ports 0 and 5, about 12 cycles per 64 floats.
#include "quantize_activations/quantize_activations.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#include "quantize_activations/round_rows.h"
#include "runtime/floats_avx512.h"

namespace bantamweight {
namespace {

struct Range {
  // Codes of x[begin, end) into q; returns their sum.
  static int32_t quantize_group(const float* x, int64_t begin, int64_t end, float to_code, int8_t* q) {
    const __m512 factor = _mm512_set1_ps(to_code);
    // The packs interleave the four vectors by 128-bit lanes; this puts the dwords back in order.
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    __m512i sum0 = _mm512_setzero_si512(), sum1 = sum0;
    int64_t i = begin;
    for (; i + 64 <= end; i += 64) {
      const __m512i a = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + i), factor));
      const __m512i b = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + i + 16), factor));
      const __m512i c = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + i + 32), factor));
      const __m512i d = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + i + 48), factor));
      const __m512i bytes = _mm512_packs_epi16(_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d));
      _mm512_storeu_si512(q + i, _mm512_permutexvar_epi32(order, bytes));
      sum0 = _mm512_add_epi32(sum0, _mm512_add_epi32(a, b));
      sum1 = _mm512_add_epi32(sum1, _mm512_add_epi32(c, d));
    }
    for (; i < end; i += 16) {
      const __mmask16 valid = Floats::part(end - i);
      const __m512i a = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(valid, x + i), factor));
      _mm512_mask_cvtepi32_storeu_epi8(q + i, valid, a);
      sum0 = _mm512_add_epi32(sum0, a);
    }
    return _mm512_reduce_add_epi32(_mm512_add_epi32(sum0, sum1));
  }

  // As quantize_group, into two rows of halves; their sums go to sum[0] and sum[1].
  static void halve_group(const float* x, int64_t begin, int64_t end, float to_code, int8_t* high, int8_t* low,
                          int32_t* sum) {
    const __m512 factor = _mm512_set1_ps(to_code), inverse = _mm512_set1_ps(kInverseHalf), half = _mm512_set1_ps(kHalf);
    __m512i sum_high = _mm512_setzero_si512(), sum_low = sum_high;
    for (int64_t i = begin; i < end; i += 16) {
      const __mmask16 valid = Floats::part(end - i);
      const __m512 t = _mm512_mul_ps(_mm512_maskz_loadu_ps(valid, x + i), factor);
      const __m512i h = _mm512_cvtps_epi32(_mm512_mul_ps(t, inverse));
      const __m512i l = _mm512_cvtps_epi32(_mm512_sub_ps(t, _mm512_mul_ps(half, _mm512_cvtepi32_ps(h))));
      _mm512_mask_cvtepi32_storeu_epi8(high + i, valid, h);
      _mm512_mask_cvtepi32_storeu_epi8(low + i, valid, l);
      sum_high = _mm512_add_epi32(sum_high, h);
      sum_low = _mm512_add_epi32(sum_low, l);
    }
    sum[0] = _mm512_reduce_add_epi32(sum_high);
    sum[1] = _mm512_reduce_add_epi32(sum_low);
  }

  static void set_zero(int8_t* q, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += 64) {
      const __mmask64 valid = end - i >= 64 ? ~__mmask64{0} : (__mmask64{1} << (end - i)) - 1;
      _mm512_mask_storeu_epi8(q + i, valid, _mm512_setzero_si512());
    }
  }
};

constexpr QuantizeRowsKernel kernel = {Isa::avx512, round_rows<Floats, Range>};

}  // namespace

const QuantizeRowsKernel* quantize_rows_avx512() { return &kernel; }

}  // namespace bantamweight

#else

namespace bantamweight {
const QuantizeRowsKernel* quantize_rows_avx512() { return nullptr; }
}  // namespace bantamweight

#endif
