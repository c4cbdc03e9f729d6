// The obvious loops: the oracle of every other variant.
#include <cmath>
#include <cstring>

#include "quantize_images/quantize_images.h"

namespace bantamweight {
namespace {

uint32_t absmax_bits(const float* x, int64_t count) {
  uint32_t max = 0;
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, &x[i], sizeof bits);
    bits &= 0x7fffffffu;
    max = bits > max ? bits : max;
  }
  return max;
}

void quantize_row(const ImageRow& row) {
  for (int64_t w = 0; w < row.width; ++w) {
    for (int64_t c = 0; c < row.channels; ++c) {
      const float scaled = row.x[c * row.stride_c + w * row.stride_w] * row.to_code;
      row.q[w * row.channels + c] = static_cast<int8_t>(std::nearbyint(scaled));
    }
  }
}

void sum_slices(const int8_t* q, int64_t count, int64_t stride, int64_t slice_size, int32_t* sums, int64_t sum_stride) {
  for (int64_t i = 0; i < count; ++i) {
    int32_t sum = 0;
    for (int64_t c = 0; c < slice_size; ++c) sum += q[i * stride + c];
    sums[i * sum_stride] = sum;
  }
}

constexpr QuantizeImagesKernel kernel = {Isa::reference, absmax_bits, quantize_row, sum_slices};

}  // namespace

const QuantizeImagesKernel* quantize_images_reference() { return &kernel; }

}  // namespace bantamweight
