// Packed low-bit convolution: the linear kernel over rows given by pointers, no im2col buffer.
//
// The input is rounded once to int8 NHWC with its padding written in (quantize_images.h). An output
// pixel's row is then a pointer to its top left input pixel; the pieces of K are the kernel's rows
// (or taps, where dilation or channel groups break the run of bytes). A 1x1 convolution is a linear
// layer over pixels, each with a scale of its own. Depthwise convolutions keep float inputs and go to
// a kernel of their own (depthwise_conv.h).
//
// A packed weight is one flat, position-independent buffer, as in lowbit_linear.h: never on disk.
#pragma once

#include <cstddef>
#include <cstdint>

#include "runtime/isa.h"
#include "runtime/status.h"

namespace bantamweight {

struct ConvShape {
  int64_t in_channels = 0, out_channels = 0, groups = 1;
  int64_t kernel_h = 0, kernel_w = 0;
  int64_t stride_h = 1, stride_w = 1;
  int64_t pad_top = 0, pad_bottom = 0, pad_left = 0, pad_right = 0;
  int64_t dilation_h = 1, dilation_w = 1;
  int64_t bits = 0;        // 2, 3, 4 or 8 bits a code in memory (ternary is 2)
  int64_t group_size = 0;  // k per scale, k = (ky * kernel_w + kx) * (in_channels / groups) + c

  int64_t k() const { return kernel_h * kernel_w * (in_channels / groups); }
  bool depthwise() const { return groups > 1 && groups == in_channels && groups == out_channels; }
  // A linear layer over the channels of each pixel, whose activations are rounded pixel by pixel.
  bool by_pixel() const {
    return kernel_h == 1 && kernel_w == 1 && groups == 1 && pad_top + pad_bottom + pad_left + pad_right == 0;
  }
};

// Output pixels along each axis for an input of h x w; below 1 if the kernel does not fit.
inline int64_t conv_out_height(const ConvShape& s, int64_t h) {
  return (h + s.pad_top + s.pad_bottom - s.dilation_h * (s.kernel_h - 1) - 1) / s.stride_h + 1;
}
inline int64_t conv_out_width(const ConvShape& s, int64_t w) {
  return (w + s.pad_left + s.pad_right - s.dilation_w * (s.kernel_w - 1) - 1) / s.stride_w + 1;
}

// Bytes of the packed buffer for `isa`, or -1 if the shape is invalid or there is no such variant.
int64_t conv_layout_bytes(const ConvShape& shape, Isa isa);

// The variant that a layer of this shape runs under `ceiling`: the linear kernel's, or the
// depthwise kernel's.
Isa conv_select(const ConvShape& shape, Isa ceiling);

Status conv_pack(const ConvShape& shape, Isa isa,
                 const uint8_t* codes,  // [out_channels, k] row-major, values 0 .. 2^bits - 1
                 const float* scale,    // [out_channels, ceil(k / group_size)]
                 const float* zero,     // the same shape, in code units
                 void* layout,          // out, 64-byte aligned, conv_layout_bytes() long
                 int64_t layout_bytes);

// The exact inverse of conv_pack.
Status conv_unpack(const void* layout, int64_t layout_bytes, uint8_t* codes, float* scale, float* zero);

// Checks the header and reads the shape and the kernel out of a packed buffer.
Status conv_describe(const void* layout, int64_t layout_bytes, ConvShape* shape, Isa* isa);

struct ConvInput {
  const float* x;  // [images, in_channels, height, width] at the strides below
  int64_t images, height, width;
  int64_t stride_n, stride_c, stride_h, stride_w;  // floats
};

// y[n, oh, ow, out_channels], contiguous. Threads: OpenMP's current setting.
Status conv_forward(const void* layout, int64_t layout_bytes, const ConvInput& input,
                    const float* bias,  // [out_channels] or null
                    float* y);

}  // namespace bantamweight
