// NEON: a quarter of a unit, 4 codes, a step: shifts bring the codes to their lanes, then arithmetic.
//
// 4 codes: 1 shift, 1 and, 1 conversion, 1 subtraction, 1 product, 1 store (3 bits: 1 shift, 1 and,
// 1 or more), and one broadcast load for each of the 4 steps of a unit.
#include "embedding/embedding.h"

#if defined(__aarch64__)

#include <arm_neon.h>

namespace bantamweight {
namespace {

constexpr int64_t kAhead = 2;

inline float float_at(const uint8_t* memory, int64_t i) {
  float value;
  __builtin_memcpy(&value, memory + 4 * i, 4);
  return value;
}

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
inline float32x4_t values_of(const uint8_t* unit, int quarter, float32x4_t step, float32x4_t zero) {
  return vmulq_f32(vsubq_f32(vcvtq_f32_u32(codes_of<kBits>(unit, quarter)), zero), step);
}

template <int kBits>
void run_bits(const EmbeddingTask& task) {
  for (int64_t i = 0; i < task.count; ++i) {
    if (i + kAhead < task.count) {
      const uint8_t* ahead = task.records + task.index[i + kAhead] * task.record_bytes;
      for (int64_t line = 0; line < task.record_bytes; line += 64) __builtin_prefetch(ahead + line);
    }
    const uint8_t* scale = task.records + task.index[i] * task.record_bytes;
    const uint8_t* zeros = scale + 4 * task.groups;
    const uint8_t* unit = task.uniform_zero ? zeros : zeros + 4 * task.groups;
    float* y = task.y + i * task.ldy;
    for (int64_t g = 0; g < task.groups; ++g) {
      const float32x4_t step = vdupq_n_f32(float_at(scale, g));
      const float32x4_t zero = vdupq_n_f32(task.uniform_zero ? task.zero : float_at(zeros, g));
      const int64_t begin = g * task.group_size;
      const int64_t end = task.dim - begin < task.group_size ? task.dim : begin + task.group_size;
      int64_t d = begin;
      for (; d + kUnitCodes <= end; d += kUnitCodes, unit += 2 * kBits) {
        for (int quarter = 0; quarter < 4; ++quarter) {
          vst1q_f32(y + d + 4 * quarter, values_of<kBits>(unit, quarter, step, zero));
        }
      }
      if (d < end) {
        float last[kUnitCodes];
        for (int quarter = 0; quarter < 4; ++quarter) {
          vst1q_f32(last + 4 * quarter, values_of<kBits>(unit, quarter, step, zero));
        }
        __builtin_memcpy(y + d, last, static_cast<size_t>(end - d) * sizeof(float));
        unit += 2 * kBits;
      }
    }
  }
}

void run(int bits, const EmbeddingTask& task) {
  switch (bits) {
    case 2:
      return run_bits<2>(task);
    case 3:
      return run_bits<3>(task);
    case 4:
      return run_bits<4>(task);
    default:
      return run_bits<8>(task);
  }
}

constexpr EmbeddingKernel kernel = {Isa::neon, run};

}  // namespace

const EmbeddingKernel* embedding_kernel_neon() { return &kernel; }

}  // namespace bantamweight

#else

namespace bantamweight {
const EmbeddingKernel* embedding_kernel_neon() { return nullptr; }
}  // namespace bantamweight

#endif
