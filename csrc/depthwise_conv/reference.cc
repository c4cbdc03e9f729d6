// One channel at a time: the oracle of every other variant.
#include <cmath>

#include "depthwise_conv/depthwise_conv.h"

namespace bantamweight {
namespace {

void run(const DepthwiseTask& task) {
  const int64_t lanes = depthwise_lanes(task.channels);
  for (int64_t r = 0; r < task.row_count; ++r) {
    for (int64_t c = 0; c < task.channels; ++c) {
      float sum = 0.0f;
      int64_t p = 0;
      for (int64_t g = 0; g < task.groups; ++g) {
        int32_t dot = 0, activations = 0;
        for (; p < task.pair_count && task.pairs[p].group == g; ++p) {
          const int16_t* weight = task.weight + (p * lanes + c) * 2;
          for (int t = 0; t < 2; ++t) dot += weight[t] * task.rows[r][task.pairs[p].offset[t] + c];
          activations += task.rows[r][task.pairs[p].offset[0] + c];
          // The second tap of a pair that pads an odd group is the first once more, and not counted.
          if (task.pairs[p].offset[1] != task.pairs[p].offset[0]) {
            activations += task.rows[r][task.pairs[p].offset[1] + c];
          }
        }
        sum = std::fma(static_cast<float>(dot), task.scale[g * lanes + c], sum);
        if (task.zero_scale != nullptr) {
          sum = std::fma(-task.zero_scale[g * lanes + c], static_cast<float>(activations), sum);
        }
      }
      task.y[r * task.ldy + c] = std::fma(sum, task.row_scale[r], task.bias == nullptr ? 0.0f : task.bias[c]);
    }
  }
}

constexpr DepthwiseKernel kernel = {Isa::reference, run};

}  // namespace

const DepthwiseKernel* depthwise_reference() { return &kernel; }

}  // namespace bantamweight
