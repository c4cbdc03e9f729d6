// One channel at a time: the oracle of every other variant.
#include <cmath>

#include "depthwise_conv/depthwise_conv.h"

namespace bantamweight {
namespace {

void run(const DepthwiseRow& row) {
  const int64_t lanes = depthwise_lanes(row.channels);
  for (int64_t ox = 0; ox < row.out_width; ++ox) {
    for (int64_t c = 0; c < row.channels; ++c) {
      float sum = row.bias == nullptr ? 0.0f : row.bias[c];
      for (int64_t ky = 0; ky < row.kernel_h; ++ky) {
        if (row.x[ky] == nullptr) continue;
        for (int64_t kx = 0; kx < row.kernel_w; ++kx) {
          const int64_t pixel = row.pixel(ox, kx);
          if (pixel < 0 || pixel >= row.width) continue;
          sum = std::fma(row.x[ky][pixel * row.step + c], row.weight[(ky * row.kernel_w + kx) * lanes + c], sum);
        }
      }
      row.y[ox * row.channels + c] = sum;
    }
  }
}

constexpr DepthwiseKernel kernel = {Isa::reference, run};

}  // namespace

const DepthwiseKernel* depthwise_reference() { return &kernel; }

}  // namespace bantamweight
