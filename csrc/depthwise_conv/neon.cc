// NEON: 8 channels a time, each tap widened to 16 bits and multiplied and added into 32 bits: 3
// instructions for 8 multiply-adds.
#include "depthwise_conv/depthwise_conv.h"

#if defined(__ARM_NEON) && defined(__aarch64__)
#include <arm_neon.h>

namespace bantamweight {
namespace {

template <bool zeros>
void run_lanes(const DepthwiseTask& task, int64_t row, int64_t c, int64_t lanes) {
  float32x4_t low = vdupq_n_f32(0.0f), high = low;
  int64_t p = 0;
  for (int64_t g = 0; g < task.groups; ++g) {
    int32x4_t dot_low = vdupq_n_s32(0), dot_high = dot_low, sum_low = dot_low, sum_high = dot_low;
    for (; p < task.pair_count && task.pairs[p].group == g; ++p) {
      const TapPair& pair = task.pairs[p];
      const int8_t* a = task.rows[row] + c;
      const int16x8x2_t weight = vld2q_s16(task.weight + (p * lanes + c) * 2);
      const int16x8_t first = vmovl_s8(vld1_s8(a + pair.offset[0])), second = vmovl_s8(vld1_s8(a + pair.offset[1]));
      dot_low = vmlal_s16(dot_low, vget_low_s16(first), vget_low_s16(weight.val[0]));
      dot_high = vmlal_high_s16(dot_high, first, weight.val[0]);
      dot_low = vmlal_s16(dot_low, vget_low_s16(second), vget_low_s16(weight.val[1]));
      dot_high = vmlal_high_s16(dot_high, second, weight.val[1]);
      if (zeros) {
        sum_low = vaddw_s16(sum_low, vget_low_s16(first));
        sum_high = vaddw_high_s16(sum_high, first);
        if (pair.offset[0] != pair.offset[1]) {  // the second tap may pad an odd group
          sum_low = vaddw_s16(sum_low, vget_low_s16(second));
          sum_high = vaddw_high_s16(sum_high, second);
        }
      }
    }
    const float* scale = task.scale + g * lanes + c;
    low = vfmaq_f32(low, vcvtq_f32_s32(dot_low), vld1q_f32(scale));
    high = vfmaq_f32(high, vcvtq_f32_s32(dot_high), vld1q_f32(scale + 4));
    if (zeros) {
      const float* zero_scale = task.zero_scale + g * lanes + c;
      low = vfmsq_f32(low, vld1q_f32(zero_scale), vcvtq_f32_s32(sum_low));
      high = vfmsq_f32(high, vld1q_f32(zero_scale + 4), vcvtq_f32_s32(sum_high));
    }
  }
  const float32x4_t row_scale = vdupq_n_f32(task.row_scale[row]);
  const int64_t left = task.channels - c, valid = left < 8 ? left : 8;
  float bias[8] = {}, y[8];
  if (task.bias != nullptr) __builtin_memcpy(bias, task.bias + c, static_cast<unsigned long>(valid) * sizeof *bias);
  vst1q_f32(y, vfmaq_f32(vld1q_f32(bias), low, row_scale));
  vst1q_f32(y + 4, vfmaq_f32(vld1q_f32(bias + 4), high, row_scale));
  __builtin_memcpy(task.y + row * task.ldy + c, y, static_cast<unsigned long>(valid) * sizeof *y);
}

void run(const DepthwiseTask& task) {
  const int64_t lanes = depthwise_lanes(task.channels);
  for (int64_t row = 0; row < task.row_count; ++row) {
    for (int64_t c = 0; c < task.channels; c += 8) {
      if (task.zero_scale != nullptr) {
        run_lanes<true>(task, row, c, lanes);
      } else {
        run_lanes<false>(task, row, c, lanes);
      }
    }
  }
}

constexpr DepthwiseKernel kernel = {Isa::neon, run};

}  // namespace

const DepthwiseKernel* depthwise_neon() { return &kernel; }

}  // namespace bantamweight

#else
namespace bantamweight {
const DepthwiseKernel* depthwise_neon() { return nullptr; }
}  // namespace bantamweight
#endif
