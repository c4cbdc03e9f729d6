// NEON: a quarter of a unit, 4 codes, a step: shifts bring the codes to their lanes, then arithmetic.
//
// 4 codes: 1 shift, 1 and, 1 conversion, 1 subtraction, 1 product, 1 store (3 bits: 1 shift, 1 and,
// 1 or more), and one broadcast load for each of the 4 steps of a unit.
#include "embedding/embedding.h"

#if defined(__aarch64__)

#include <arm_neon.h>

#include "embedding/gather.h"

namespace bantamweight {
namespace {

constexpr int32_t kOnes[4] = {0, -1, -2, -3};  // vshl by a negative count shifts down
constexpr int32_t kTwos[4] = {0, -2, -4, -6};
constexpr int64_t kFours[2] = {0, -4};

// Codes 4 * quarter .. 4 * quarter + 3 of a unit.
template <int kBits>
inline uint32x4_t codes_of(const uint8_t* unit, int quarter) {
  if constexpr (kBits == 2 || kBits == 3) {
    const uint32x4_t low = vandq_u32(vshlq_u32(vdupq_n_u32(unit[quarter]), vld1q_s32(kTwos)), vdupq_n_u32(3));
    if constexpr (kBits == 2) return low;
    const uint32_t third = static_cast<uint32_t>(unit[4 + quarter / 2]) >> (quarter % 2 * 4) << 2;
    return vorrq_u32(low, vandq_u32(vshlq_u32(vdupq_n_u32(third), vld1q_s32(kOnes)), vdupq_n_u32(4)));
  } else if constexpr (kBits == 4) {
    uint64_t word;
    __builtin_memcpy(&word, unit, 8);
    const uint64x2_t pairs = vshlq_u64(vdupq_n_u64(word >> 8 * quarter), vld1q_s64(kFours));
    return vandq_u32(vreinterpretq_u32_u64(pairs), vdupq_n_u32(15));
  } else {
    uint32_t word;
    __builtin_memcpy(&word, unit + 4 * quarter, 4);
    return vmovl_u16(vget_low_u16(vmovl_u8(vreinterpret_u8_u32(vdup_n_u32(word)))));
  }
}

template <int kBits>
struct Values {
  float32x4_t step, zero;

  Values(float step, float zero) : step(vdupq_n_f32(step)), zero(vdupq_n_f32(zero)) {}

  void store(const uint8_t* unit, float* y) const {
    for (int quarter = 0; quarter < 4; ++quarter) {
      const float32x4_t codes = vcvtq_f32_u32(codes_of<kBits>(unit, quarter));
      vst1q_f32(y + 4 * quarter, vmulq_f32(vsubq_f32(codes, zero), step));
    }
  }

  void store_part(const uint8_t* unit, float* y, int64_t count) const {
    float last[kUnitCodes];
    store(unit, last);
    __builtin_memcpy(y, last, static_cast<size_t>(count) * sizeof(float));
  }
};

constexpr EmbeddingKernel kernel = {Isa::neon, gather<Values>};

}  // namespace

const EmbeddingKernel* embedding_kernel_neon() { return &kernel; }

}  // namespace bantamweight

#else

namespace bantamweight {
const EmbeddingKernel* embedding_kernel_neon() { return nullptr; }
}  // namespace bantamweight

#endif
