// NEON: 16 contiguous floats to 16 codes in 4 multiplies, 4 conversions and 3 narrowings; channel
// planes in tiles of 8 pixels by 8 channels, transposed in registers.
#include "quantize_images/quantize_images.h"

#if defined(__ARM_NEON) && defined(__aarch64__)
#include "runtime/floats_neon.h"
#include "runtime/largest_magnitude.h"

namespace bantamweight {
namespace {

int16x8_t eight_codes(const float* x, float32x4_t to_code) {
  const int32x4_t low = vcvtnq_s32_f32(vmulq_f32(vld1q_f32(x), to_code));
  const int32x4_t high = vcvtnq_s32_f32(vmulq_f32(vld1q_f32(x + 4), to_code));
  return vcombine_s16(vmovn_s32(low), vmovn_s32(high));
}

int8_t to_code_of(float x, float to_code) { return static_cast<int8_t>(vcvtns_s32_f32(x * to_code)); }

uint32_t absmax_bits(const float* x, int64_t count) {
  const float largest = largest_magnitude<Floats>(x, count);
  uint32_t bits;
  __builtin_memcpy(&bits, &largest, sizeof bits);
  return bits;
}

void quantize_run(const float* x, int64_t count, float to_code, int8_t* q) {
  const float32x4_t factor = vdupq_n_f32(to_code);
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    const int8x8_t low = vmovn_s16(eight_codes(x + i, factor)), high = vmovn_s16(eight_codes(x + i + 8, factor));
    vst1q_s8(q + i, vcombine_s8(low, high));
  }
  for (; i < count; ++i) q[i] = to_code_of(x[i], to_code);
}

// 8 pixels by 8 channels, or the first `depth` of them.
void transpose_tile(const ImageRow& row, const float* x, int64_t depth, float32x4_t factor, int8_t* q) {
  int8x8_t c[8];
  for (int j = 0; j < 8; ++j) c[j] = j < depth ? vmovn_s16(eight_codes(x + j * row.stride_c, factor)) : vdup_n_s8(0);
  const int8x8x2_t ab = vtrn_s8(c[0], c[1]), cd = vtrn_s8(c[2], c[3]), ef = vtrn_s8(c[4], c[5]),
                   gh = vtrn_s8(c[6], c[7]);
  for (int odd = 0; odd < 2; ++odd) {
    const int16x4x2_t front = vtrn_s16(vreinterpret_s16_s8(ab.val[odd]), vreinterpret_s16_s8(cd.val[odd]));
    const int16x4x2_t back = vtrn_s16(vreinterpret_s16_s8(ef.val[odd]), vreinterpret_s16_s8(gh.val[odd]));
    for (int two = 0; two < 2; ++two) {
      // Element e is pixel 4 e + 2 two + odd.
      const int32x2x2_t pixels = vtrn_s32(vreinterpret_s32_s16(front.val[two]), vreinterpret_s32_s16(back.val[two]));
      for (int four = 0; four < 2; ++four) {
        int8_t bytes[8];
        vst1_s8(bytes, vreinterpret_s8_s32(pixels.val[four]));
        int8_t* to = q + (4 * four + 2 * two + odd) * row.channels;
        if (depth >= 8) {
          __builtin_memcpy(to, bytes, 8);
        } else {
          __builtin_memcpy(to, bytes, static_cast<unsigned long>(depth));
        }
      }
    }
  }
}

void quantize_pixels_one_by_one(const ImageRow& row, int64_t first) {
  for (int64_t w = first; w < row.width; ++w) {
    for (int64_t c = 0; c < row.channels; ++c) {
      row.q[w * row.channels + c] = to_code_of(row.x[c * row.stride_c + w * row.stride_w], row.to_code);
    }
  }
}

void quantize_row(const ImageRow& row) {
  const bool one_channel = row.channels == 1 && row.stride_w == 1;
  if (one_channel || (row.stride_c == 1 && row.stride_w == row.channels)) {
    quantize_run(row.x, row.width * row.channels, row.to_code, row.q);
  } else if (row.stride_c == 1) {
    for (int64_t w = 0; w < row.width; ++w) {
      quantize_run(row.x + w * row.stride_w, row.channels, row.to_code, row.q + w * row.channels);
    }
  } else if (row.stride_w == 1) {
    const float32x4_t factor = vdupq_n_f32(row.to_code);
    int64_t w = 0;
    for (; w + 8 <= row.width; w += 8) {
      for (int64_t c = 0; c < row.channels; c += 8) {
        transpose_tile(row, row.x + c * row.stride_c + w, row.channels - c, factor, row.q + w * row.channels + c);
      }
    }
    quantize_pixels_one_by_one(row, w);
  } else {
    quantize_pixels_one_by_one(row, 0);
  }
}

void sum_slices(const int8_t* q, int64_t count, int64_t stride, int64_t slice_size, int32_t* sums, int64_t sum_stride) {
  for (int64_t i = 0; i < count; ++i, q += stride) {
    int32x4_t sum = vdupq_n_s32(0);
    int64_t c = 0;
    for (; c + 16 <= slice_size; c += 16) sum = vpadalq_s16(sum, vpaddlq_s8(vld1q_s8(q + c)));
    int32_t total = vaddvq_s32(sum);
    for (; c < slice_size; ++c) total += q[c];
    sums[i * sum_stride] = total;
  }
}

constexpr QuantizeImagesKernel kernel = {Isa::neon, absmax_bits, quantize_row, sum_slices};

}  // namespace

const QuantizeImagesKernel* quantize_images_neon() { return &kernel; }

}  // namespace bantamweight

#else
namespace bantamweight {
const QuantizeImagesKernel* quantize_images_neon() { return nullptr; }
}  // namespace bantamweight
#endif
