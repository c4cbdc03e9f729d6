// AVX2 vectors of floats under the names that every instruction set shares, so that a loop whose only
// difference is the width of a vector is written once, over `Floats`. Each file that includes it keeps a
// copy with its own flags.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace bantamweight {
namespace {

struct Floats {
  using Vector = __m256;
  static constexpr int64_t kLanes = 8;

  static inline Vector load(const float* from) { return _mm256_loadu_ps(from); }
  static inline void store(float* to, Vector v) { _mm256_storeu_ps(to, v); }
  static inline Vector all(float x) { return _mm256_set1_ps(x); }
  static inline Vector add(Vector a, Vector b) { return _mm256_add_ps(a, b); }
  static inline Vector subtract(Vector a, Vector b) { return _mm256_sub_ps(a, b); }
  static inline Vector multiply(Vector a, Vector b) { return _mm256_mul_ps(a, b); }
  static inline Vector multiply_add(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }       // a b + c
  static inline Vector subtract_product(Vector c, Vector a, Vector b) { return _mm256_fnmadd_ps(a, b, c); }  // c - a b
  static inline Vector absolute(Vector v) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v); }
  static inline Vector smaller(Vector a, Vector b) { return _mm256_min_ps(a, b); }
  // min(|v|, end), and `end` for NaN.
  static inline Vector smaller_magnitude(Vector v, Vector end) { return smaller(absolute(v), end); }
  static inline Vector larger(Vector a, Vector b) { return _mm256_max_ps(a, b); }
  static inline float largest(Vector eight) {
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
  }
  // |v| where it is above `largest`, which is not negative. The bits of magnitudes order as the floats do, with
  // infinity and NaN above every number.
  static inline Vector larger_magnitude(Vector largest, Vector v) {
    const __m256i bits = _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0x7fffffff));
    return _mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(largest), bits));
  }
  static inline float largest_lane(Vector magnitudes) {
    const __m256i all = _mm256_castps_si256(magnitudes);
    __m128i bits = _mm_max_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
    bits = _mm_max_epi32(bits, _mm_shuffle_epi32(bits, 0x4e));
    bits = _mm_max_epi32(bits, _mm_shuffle_epi32(bits, 0xb1));
    return _mm_cvtss_f32(_mm_castsi128_ps(bits));
  }

  // 2^(e - 127) where the low bits of v's fraction hold e, from 0 to 255.
  static inline Vector shifted_to_exponent(Vector v) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(v), 23));
  }

  // Lane i meets i + 4, then i + 2 and i + 1.
  static inline float sum(Vector eight) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }

  // The first `count` lanes: none below 1, all from kLanes on. The others are read as zeros.
  struct Part {
    __m256i mask;
    int64_t count;
  };
  static inline Part part(int64_t count) {
    count = count >= kLanes ? kLanes : count <= 0 ? 0 : count;
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return {_mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lane), count};
  }
  static inline Vector load(const float* from, Part part) { return _mm256_maskload_ps(from, part.mask); }
  static inline void store(float* to, Vector v, Part part) { _mm256_maskstore_ps(to, part.mask, v); }
};

}  // namespace
}  // namespace bantamweight
