// The steps of a network that are no convolution, on the maps of some images.
#pragma once

#include <algorithm>
#include <cstdint>

#include "conv_network/conv_network.h"
#include "lowbit_conv/conv_plan.h"

namespace bantamweight {

// x [images, in], y [images, out], floats; residual has the size of y.
struct FloatStep {
  const NetworkStep& step;
  ImageSize in, out;
  int64_t images;
  const float* x;
  const float* residual;
  float* y;
};

void run_float_step(const FloatStep& call);

// A map of codes, or as an output one of floats without a border.
struct Maps {
  CodeMap size;
  float scale = 0.0f;  // 0: floats
  int64_t zero = 0;
  int8_t* codes = nullptr;
  float* floats = nullptr;

  float shift() const { return -scale * static_cast<float>(zero); }  // of a code's value
};

struct CodeStep {
  const NetworkStep& step;
  Isa isa;
  int64_t images;
  Maps in, residual, out;
  uint8_t* memory;  // code_step_bytes
};

int64_t code_step_bytes(const NetworkStep& step, const CodeMap& out, int64_t images);

Status run_code_step(const CodeStep& call);

// The pixels of a map of height x width under a window of a pooling; the padding holds nothing.
struct Window {
  int64_t y_begin, y_end, x_begin, x_end;

  Window(const NetworkStep& step, int64_t height, int64_t width, int64_t oy, int64_t ox) {
    const int64_t top = oy * step.stride_h - step.pad_h, left = ox * step.stride_w - step.pad_w;
    y_begin = std::max<int64_t>(0, top);
    y_end = std::min(height, top + step.kernel_h);
    x_begin = std::max<int64_t>(0, left);
    x_end = std::min(width, left + step.kernel_w);
  }
};

// The pixels around each image.
void fill_border(const Maps& maps, int64_t images);

}  // namespace bantamweight
