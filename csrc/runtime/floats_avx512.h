// AVX-512 vectors of floats under the names that every instruction set shares, so that a loop whose only
// difference is the width of a vector is written once, over `Floats`. Each file that includes it keeps a
// copy with its own flags.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace bantamweight {
namespace {

struct Floats {
  using Vector = __m512;
  static constexpr int64_t kLanes = 16;

  static inline Vector load(const float* from) { return _mm512_loadu_ps(from); }
  static inline void store(float* to, Vector v) { _mm512_storeu_ps(to, v); }
  static inline Vector all(float x) { return _mm512_set1_ps(x); }
  static inline Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
  static inline Vector subtract(Vector a, Vector b) { return _mm512_sub_ps(a, b); }
  static inline Vector multiply(Vector a, Vector b) { return _mm512_mul_ps(a, b); }
  static inline Vector multiply_add(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }       // a b + c
  static inline Vector subtract_product(Vector c, Vector a, Vector b) { return _mm512_fnmadd_ps(a, b, c); }  // c - a b
  static inline Vector absolute(Vector v) { return _mm512_abs_ps(v); }
  static inline Vector smaller(Vector a, Vector b) { return _mm512_min_ps(a, b); }
  // min(|v|, end), and `end` for NaN.
  static inline Vector smaller_magnitude(Vector v, Vector end) { return _mm512_range_ps(v, end, 0b1010); }
  static inline Vector larger(Vector a, Vector b) { return _mm512_max_ps(a, b); }
  static inline float largest(Vector v) { return _mm512_reduce_max_ps(v); }
  // |v| where it is above `largest`, which is not negative. The bits of magnitudes order as the floats do, with
  // infinity and NaN above every number.
  static inline Vector larger_magnitude(Vector largest, Vector v) {
    const __m512i bits = _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7fffffff));
    return _mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(largest), bits));
  }
  static inline float largest_lane(Vector magnitudes) {
    const int32_t bits = _mm512_reduce_max_epi32(_mm512_castps_si512(magnitudes));
    float largest;
    __builtin_memcpy(&largest, &bits, sizeof largest);
    return largest;
  }

  // 2^(e - 127) where the low bits of v's fraction hold e, from 0 to 255.
  static inline Vector shifted_to_exponent(Vector v) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(v), 23));
  }

  // Lane i meets i + 8, then i + 4, i + 2 and i + 1.
  static inline float sum(Vector sixteen) {
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(sixteen), _mm512_extractf32x8_ps(sixteen, 1));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }

  // The first `count` lanes: none below 1, all from kLanes on. The others are read as zeros.
  using Part = __mmask16;
  static inline Part part(int64_t count) {
    return count >= kLanes ? 0xffff : count <= 0 ? 0 : static_cast<Part>((1u << count) - 1);
  }
  static inline Vector load(const float* from, Part part) { return _mm512_maskz_loadu_ps(part, from); }
  static inline void store(float* to, Vector v, Part part) { _mm512_mask_storeu_ps(to, part, v); }
};

}  // namespace
}  // namespace bantamweight
