// NEON vectors of floats under the names that every instruction set shares, so that a loop whose only
// difference is the width of a vector is written once, over `Floats`. Each file that includes it keeps a
// copy with its own flags.
#pragma once

#include <arm_neon.h>

#include <cstdint>

namespace bantamweight {
namespace {

struct Floats {
  using Vector = float32x4_t;
  static constexpr int64_t kLanes = 4;

  static inline Vector load(const float* from) { return vld1q_f32(from); }
  static inline void store(float* to, Vector v) { vst1q_f32(to, v); }
  static inline Vector all(float x) { return vdupq_n_f32(x); }
  static inline Vector add(Vector a, Vector b) { return vaddq_f32(a, b); }
  static inline Vector subtract(Vector a, Vector b) { return vsubq_f32(a, b); }
  static inline Vector multiply(Vector a, Vector b) { return vmulq_f32(a, b); }
  static inline Vector multiply_add(Vector a, Vector b, Vector c) { return vfmaq_f32(c, a, b); }      // a b + c
  static inline Vector subtract_product(Vector c, Vector a, Vector b) { return vfmsq_f32(c, a, b); }  // c - a b
  static inline Vector absolute(Vector v) { return vabsq_f32(v); }
  // minnm and maxnm return the number beside a NaN, as the comparisons of the references do.
  static inline Vector smaller(Vector a, Vector b) { return vminnmq_f32(a, b); }
  // min(|v|, end), and `end` for NaN.
  static inline Vector smaller_magnitude(Vector v, Vector end) { return smaller(absolute(v), end); }
  static inline Vector larger(Vector a, Vector b) { return vmaxnmq_f32(a, b); }
  // |v| where it is above `largest`, which is not negative; NaN where either is.
  static inline Vector larger_magnitude(Vector largest, Vector v) { return vmaxq_f32(largest, vabsq_f32(v)); }
  static inline float largest_lane(Vector magnitudes) { return vmaxvq_f32(magnitudes); }

  // The first `count` lanes, the others zero.
  static inline Vector load_part(const float* from, int64_t count) {
    float lanes[kLanes] = {};
    for (int64_t i = 0; i < count; ++i) lanes[i] = from[i];
    return load(lanes);
  }
  static inline void store_part(float* to, Vector v, int64_t count) {
    float lanes[kLanes];
    store(lanes, v);
    for (int64_t i = 0; i < count; ++i) to[i] = lanes[i];
  }
};

}  // namespace
}  // namespace bantamweight
