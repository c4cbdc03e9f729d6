// AVX-512: one pass for the maximum, one for the codes, 64 floats a step.
//
// Per 64 floats: 4 loads, 4 and, 4 max, then 4 loads, 4 multiplications, 4 conversions, 3 packs,
// 1 permutation, 1 store and 4 additions. Bound by ports 0 and 5, about 12 cycles per 64 floats.
#include "quantize_activations/quantize_activations.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#include <immintrin.h>

namespace bantamweight {
namespace {

// The bits of |x| as integers order like the floats, with infinity and NaN above every number, so
// one integer maximum gives both the largest magnitude and the check.
int32_t largest_magnitude(const float* x, int64_t k) {
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  __m512i max0 = _mm512_setzero_si512(), max1 = max0, max2 = max0, max3 = max0;
  int64_t i = 0;
  for (; i + 64 <= k; i += 64) {
    max0 = _mm512_max_epi32(max0, _mm512_and_si512(_mm512_loadu_si512(x + i), magnitude));
    max1 = _mm512_max_epi32(max1, _mm512_and_si512(_mm512_loadu_si512(x + i + 16), magnitude));
    max2 = _mm512_max_epi32(max2, _mm512_and_si512(_mm512_loadu_si512(x + i + 32), magnitude));
    max3 = _mm512_max_epi32(max3, _mm512_and_si512(_mm512_loadu_si512(x + i + 48), magnitude));
  }
  for (; i < k; i += 16) {
    const __mmask16 valid = k - i >= 16 ? 0xffff : static_cast<__mmask16>((1u << (k - i)) - 1);
    max0 = _mm512_max_epi32(max0, _mm512_and_si512(_mm512_maskz_loadu_epi32(valid, x + i), magnitude));
  }
  return _mm512_reduce_max_epi32(_mm512_max_epi32(_mm512_max_epi32(max0, max1), _mm512_max_epi32(max2, max3)));
}

// Codes of x[begin, end) into q; returns their sum.
int32_t quantize_group(const float* x, int64_t begin, int64_t end, float to_code, int8_t* q) {
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
    const __mmask16 valid = end - i >= 16 ? 0xffff : static_cast<__mmask16>((1u << (end - i)) - 1);
    const __m512i a = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(valid, x + i), factor));
    _mm512_mask_cvtepi32_storeu_epi8(q + i, valid, a);
    sum0 = _mm512_add_epi32(sum0, a);
  }
  return _mm512_reduce_add_epi32(_mm512_add_epi32(sum0, sum1));
}

// As quantize_group, into two rows of halves; their sums go to sum[0] and sum[1].
void halve_group(const float* x, int64_t begin, int64_t end, float to_code, int8_t* high, int8_t* low, int32_t* sum) {
  const __m512 factor = _mm512_set1_ps(to_code), inverse = _mm512_set1_ps(kInverseHalf), half = _mm512_set1_ps(kHalf);
  __m512i sum_high = _mm512_setzero_si512(), sum_low = sum_high;
  for (int64_t i = begin; i < end; i += 16) {
    const __mmask16 valid = end - i >= 16 ? 0xffff : static_cast<__mmask16>((1u << (end - i)) - 1);
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

void set_zero(int8_t* q, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i += 64) {
    const __mmask64 valid = end - i >= 64 ? ~__mmask64{0} : (__mmask64{1} << (end - i)) - 1;
    _mm512_mask_storeu_epi8(q + i, valid, _mm512_setzero_si512());
  }
}

constexpr int32_t kInfinity = 0x7f800000;

// From the bits of the largest magnitude to the factor of the codes 0 .. `most`, or 0 where the
// maximum is so small that the factor overflows; and to the scale.
float factor_of(int32_t max_bits, float most, float* scale) {
  const float max = _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(max_bits)));
  const float to_code = most / max;
  const bool zero = !(to_code < __builtin_inff());
  *scale = zero ? 0.0f : max / most;
  return zero ? 0.0f : to_code;
}

Status run(const QuantizeRowsArgs& args) {
  const int64_t padded = padded_row_bytes(args.k);
  const int64_t groups = args.k == 0 ? 0 : (args.k + args.group_size - 1) / args.group_size;
  for (int64_t m = 0; m < args.m; ++m) {
    const float* x = args.x + m * args.ldx;
    const auto end_of = [&](int64_t g) {
      return args.k - g * args.group_size < args.group_size ? args.k : (g + 1) * args.group_size;
    };
    if (args.mode == Activations::int16) {
      int8_t *high = args.q + 2 * m * padded, *low = high + padded;
      int32_t* sums = args.sums + 2 * m * groups;
      float* scale = args.scale + 2 * m;
      const int32_t max_bits = largest_magnitude(x, args.k);
      if (max_bits >= kInfinity) return Status::not_finite;
      const float to_code = factor_of(max_bits, kInt16Max, scale + 1);
      scale[0] = kHalf * scale[1];
      for (int64_t g = 0; g < groups; ++g) {
        int32_t both[2];
        halve_group(x, g * args.group_size, end_of(g), to_code, high, low, both);
        sums[g] = both[0];
        sums[groups + g] = both[1];
      }
      set_zero(high, args.k, padded);
      set_zero(low, args.k, padded);
      continue;
    }
    int8_t* q = args.q + m * padded;
    int32_t* sums = args.sums + m * groups;
    const bool blocks = args.mode == Activations::int8_block;
    float to_code = 0.0f;
    if (!blocks) {
      const int32_t max_bits = largest_magnitude(x, args.k);
      if (max_bits >= kInfinity) return Status::not_finite;
      to_code = factor_of(max_bits, 127.0f, args.scale + m);
    }
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t begin = g * args.group_size, end = end_of(g);
      if (blocks) {
        const int32_t max_bits = largest_magnitude(x + begin, end - begin);
        if (max_bits >= kInfinity) return Status::not_finite;
        to_code = factor_of(max_bits, 127.0f, args.scale + m * groups + g);
      }
      sums[g] = quantize_group(x, begin, end, to_code, q);
    }
    set_zero(q, args.k, padded);
  }
  return Status::ok;
}

constexpr QuantizeRowsKernel kernel = {Isa::avx512, run};

}  // namespace

const QuantizeRowsKernel* quantize_rows_avx512() { return &kernel; }

}  // namespace bantamweight

#else

namespace bantamweight {
const QuantizeRowsKernel* quantize_rows_avx512() { return nullptr; }
}  // namespace bantamweight

#endif
