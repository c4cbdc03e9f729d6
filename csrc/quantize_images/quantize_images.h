// Float images of any strides to int8 NHWC with their zero padding written in, each image against
// its own absolute maximum over all channels.
//
//   scale[n] = max |x[n]| / 127          q[n, h, w, c] = rint(x[n, c, h, w] * (127 / max))
//
// Rounding is to nearest, ties to even. An image of zeros has scale 0 and codes 0.
#pragma once

#include <cstddef>
#include <cstdint>

#include "runtime/isa.h"
#include "runtime/status.h"

namespace bantamweight {

struct QuantizeImagesArgs {
  const float* x;  // [images, channels, height, width] at the strides below
  int64_t images, channels, height, width;
  int64_t stride_n, stride_c, stride_h, stride_w;    // floats
  int64_t pad_top, pad_bottom, pad_left, pad_right;  // pixels
  int64_t slice_size;                                // channels a sum; divides `channels`
  int8_t* q;      // out [images, pad_top + height + pad_bottom, pad_left + width + pad_right, channels]
  float* scale;   // out [images]
  int32_t* sums;  // out, the shape of q with channels / slice_size at its end; null if not wanted
};

// Returns Status::not_finite (and writes nothing that may be used) if any x is NaN or infinite.
Status quantize_images(const QuantizeImagesArgs& args, Isa ceiling);

// One row of one image: x[c * stride_c + w * stride_w] to q[w * channels + c].
struct ImageRow {
  const float* x;
  int64_t stride_c, stride_w;
  int64_t channels, width;
  float to_code;  // 127 / max, or 0
  int8_t* q;
};

struct QuantizeImagesKernel {
  Isa isa;
  // The largest bit pattern of |x[0 .. count)|: 0x7f800000 and above means infinity or NaN.
  uint32_t (*absmax_bits)(const float* x, int64_t count);
  void (*quantize_row)(const ImageRow& row);
  // sums[i * sum_stride] = q[i * stride] + .. + q[i * stride + slice_size - 1] for i < count
  void (*sum_slices)(const int8_t* q, int64_t count, int64_t stride, int64_t slice_size, int32_t* sums,
                     int64_t sum_stride);
};

const QuantizeImagesKernel* quantize_images_reference();
const QuantizeImagesKernel* quantize_images_avx2();
const QuantizeImagesKernel* quantize_images_avx512();
const QuantizeImagesKernel* quantize_images_neon();

// Variants this op has in this build, best first.
const Isa* quantize_images_variants(std::size_t* count);

// The variant this op runs under `ceiling`.
const QuantizeImagesKernel& quantize_images_pick(Isa ceiling);

}  // namespace bantamweight
