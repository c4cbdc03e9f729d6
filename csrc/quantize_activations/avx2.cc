// AVX2: one pass for the maximum, one for the codes, 32 floats a step.
//
// Per 32 floats: 4 loads, 4 and, 4 max, then 4 loads, 4 multiplications, 4 conversions, 3 packs,
// 1 permutation, 1 store and 4 additions.
#include "quantize_activations/quantize_activations.h"

#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>

namespace bantamweight {
namespace {

// The bits of |x| as integers order like the floats, with infinity and NaN above every number, so
// one integer maximum gives both the largest magnitude and the check.
int32_t largest_magnitude(const float* x, int64_t k) {
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  __m256i max[4] = {_mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256()};
  int64_t i = 0;
  for (; i + 32 <= k; i += 32) {
    for (int j = 0; j < 4; ++j) {
      const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i + 8 * j));
      max[j] = _mm256_max_epi32(max[j], _mm256_and_si256(bits, magnitude));
    }
  }
  alignas(32) int32_t lanes[8];
  const __m256i all = _mm256_max_epi32(_mm256_max_epi32(max[0], max[1]), _mm256_max_epi32(max[2], max[3]));
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), all);
  int32_t largest = 0;
  for (int j = 0; j < 8; ++j) largest = lanes[j] > largest ? lanes[j] : largest;
  for (; i < k; ++i) {
    int32_t bits;
    __builtin_memcpy(&bits, x + i, 4);
    bits &= 0x7fffffff;
    largest = bits > largest ? bits : largest;
  }
  return largest;
}

// Codes of x[begin, end) into q; returns their sum.
int32_t quantize_group(const float* x, int64_t begin, int64_t end, float to_code, int8_t* q) {
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

Status run(const QuantizeRowsArgs& args) {
  constexpr int32_t kInfinity = 0x7f800000;
  const int64_t padded = padded_row_bytes(args.k);
  const int64_t groups = args.k == 0 ? 0 : (args.k + args.group_size - 1) / args.group_size;
  for (int64_t m = 0; m < args.m; ++m) {
    const float* x = args.x + m * args.ldx;
    int8_t* q = args.q + m * padded;
    int32_t* sums = args.sums + m * groups;
    const int32_t max_bits = largest_magnitude(x, args.k);
    if (max_bits >= kInfinity) return Status::not_finite;
    float max;
    __builtin_memcpy(&max, &max_bits, 4);
    const float to_code = 127.0f / max;
    const bool zero_row = !(to_code < __builtin_inff());
    args.scale[m] = zero_row ? 0.0f : max / 127.0f;
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t begin = g * args.group_size;
      const int64_t end = args.k - begin < args.group_size ? args.k : begin + args.group_size;
      sums[g] = zero_row ? 0 : quantize_group(x, begin, end, to_code, q);
    }
    for (int64_t i = zero_row ? 0 : args.k; i < padded; ++i) q[i] = 0;
  }
  return Status::ok;
}

constexpr QuantizeRowsKernel kernel = {Isa::avx2, run};

}  // namespace

const QuantizeRowsKernel* quantize_rows_avx2() { return &kernel; }

}  // namespace bantamweight

#else

namespace bantamweight {
const QuantizeRowsKernel* quantize_rows_avx2() { return nullptr; }
}  // namespace bantamweight

#endif
