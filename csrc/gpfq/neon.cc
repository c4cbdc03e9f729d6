// NEON: four rows by four registers, sixteen accumulators.
#include "gpfq/gpfq.h"

#if defined(__aarch64__)
#include "gpfq/block.h"
#include "runtime/floats_neon.h"

namespace bantamweight {
namespace {

struct Lanes : Floats {
  static inline void store_codes(uint8_t* to, Vector codes, Part part) {
    uint32_t words[kLanes];
    vst1q_u32(words, vcvtq_u32_f32(codes));
    for (int64_t i = 0; i < part.count; ++i) to[i] = static_cast<uint8_t>(words[i]);
  }

  static inline Vector floor(Vector v) { return vrndmq_f32(v); }
  static inline Vector with_sign_of(Vector magnitude, Vector sign) {
    return vbslq_f32(vdupq_n_u32(0x80000000u), sign, magnitude);
  }
  static inline Vector where_larger(Vector a, Vector b, Vector value) {
    return vreinterpretq_f32_u32(vandq_u32(vcgtq_f32(a, b), vreinterpretq_u32_f32(value)));
  }

  static inline Vector uniform(uint32_t key, int64_t column) {  // gpfq_mix, four columns at a time
    const uint32_t lane[kLanes] = {0, 1, 2, 3};
    const uint32x4_t counter = vaddq_u32(vdupq_n_u32(static_cast<uint32_t>(column)), vld1q_u32(lane));
    uint32x4_t x = vmlaq_n_u32(vdupq_n_u32(key), counter, kGpfqColumnStride);
    x = vmulq_u32(veorq_u32(x, vshrq_n_u32(x, 16)), vdupq_n_u32(0x85ebca6bu));
    x = vmulq_u32(veorq_u32(x, vshrq_n_u32(x, 13)), vdupq_n_u32(0xc2b2ae35u));
    x = vshrq_n_u32(veorq_u32(x, vshrq_n_u32(x, 16)), 8);
    return vmulq_n_f32(vcvtq_f32_u32(x), 1.0f / 16777216.0f);
  }
};

constexpr GpfqKernel kernel = {Isa::neon, gpfq_run<Lanes, 4, 4>};

}  // namespace

const GpfqKernel* gpfq_kernel_neon() { return &kernel; }

}  // namespace bantamweight

#else

namespace bantamweight {
const GpfqKernel* gpfq_kernel_neon() { return nullptr; }
}  // namespace bantamweight

#endif
