// NEON: 4 elements a vector.
#include "code_maps/code_maps.h"

#if defined(__aarch64__)
#include "code_maps/rows.h"
#include "runtime/floats_neon.h"

namespace bantamweight {
namespace {

struct Codes {
  static inline float32x4_t load(const int8_t* from) {
    int32_t four;
    __builtin_memcpy(&four, from, sizeof four);
    const int8x8_t bytes = vreinterpret_s8_s32(vdup_n_s32(four));
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(bytes))));
  }
  static inline void store(int8_t* to, float32x4_t v) {
    const int16x4_t words = vqmovn_s32(vcvtnq_s32_f32(v));
    const int32_t four = vget_lane_s32(vreinterpret_s32_s8(vqmovn_s16(vcombine_s16(words, words))), 0);
    __builtin_memcpy(to, &four, sizeof four);
  }

  static constexpr int64_t kBytes = 16;
  static inline int8x16_t load_bytes(const int8_t* from) { return vld1q_s8(from); }
  static inline void store_bytes(int8_t* to, int8x16_t v) { vst1q_s8(to, v); }
  static inline int8x16_t larger(int8x16_t a, int8x16_t b) { return vmaxq_s8(a, b); }
};

constexpr CodeMapsKernel kernel = {Isa::neon, to_codes<Floats, Codes>, to_floats<Floats, Codes>, largest<Codes>};

}  // namespace

const CodeMapsKernel* code_maps_neon() { return &kernel; }

}  // namespace bantamweight

#else

namespace bantamweight {
const CodeMapsKernel* code_maps_neon() { return nullptr; }
}  // namespace bantamweight

#endif
