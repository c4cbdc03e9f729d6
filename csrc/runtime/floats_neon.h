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
  static inline float largest(Vector v) { return vmaxnmvq_f32(v); }
  // |v| where it is above `largest`, which is not negative. The bits of magnitudes order as the floats do, with
  // infinity and NaN above every number.
  static inline Vector larger_magnitude(Vector largest, Vector v) {
    const uint32x4_t bits = vreinterpretq_u32_f32(vabsq_f32(v));
    return vreinterpretq_f32_u32(vmaxq_u32(vreinterpretq_u32_f32(largest), bits));
  }
  static inline float largest_lane(Vector magnitudes) {
    const uint32_t bits = vmaxvq_u32(vreinterpretq_u32_f32(magnitudes));
    float largest;
    __builtin_memcpy(&largest, &bits, sizeof largest);
    return largest;
  }

  // 2^(e - 127) where the low bits of v's fraction hold e, from 0 to 255.
  static inline Vector shifted_to_exponent(Vector v) {
    return vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_f32(v), 23));
  }

  // Lane i meets i + 2, then i + 1.
  static inline float sum(Vector four) {
    const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
    return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
  }

  // The first `count` lanes: none below 1, all from kLanes on. The others are read as zeros.
  struct Part {
    int64_t count;
  };
  static inline Part part(int64_t count) { return {count >= kLanes ? kLanes : count <= 0 ? 0 : count}; }
  static inline Vector load(const float* from, Part part) {
    if (part.count == kLanes) return load(from);
    float lanes[kLanes] = {};
    for (int64_t i = 0; i < part.count; ++i) lanes[i] = from[i];
    return load(lanes);
  }
  static inline void store(float* to, Vector v, Part part) {
    if (part.count == kLanes) return store(to, v);
    float lanes[kLanes];
    store(lanes, v);
    for (int64_t i = 0; i < part.count; ++i) to[i] = lanes[i];
  }
};

}  // namespace
}  // namespace bantamweight
