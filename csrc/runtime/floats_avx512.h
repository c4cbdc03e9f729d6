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
  static inline Vector larger(Vector a, Vector b) { return _mm512_max_ps(a, b); }

  // The first `count` lanes, the others zero.
  static inline Vector load_part(const float* from, int64_t count) {
    return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), from);
  }
  static inline void store_part(float* to, Vector v, int64_t count) {
    _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << count) - 1), v);
  }
};

}  // namespace
}  // namespace bantamweight
