// The obvious loops: the oracle of every other variant.
#include <cmath>

#include "layer_norm/layer_norm.h"
#include "runtime/fold.h"

namespace bantamweight {
namespace {

void run(const LayerNormArgs& args) {
  const int64_t n = args.n;
  const auto size = static_cast<float>(n);
  for (int64_t r = 0; r < args.m; ++r) {
    const float* x = args.x + r * args.ldx;
    float* y = args.y + r * args.ldy;
    float sums[kNormLanes] = {}, squares[kNormLanes] = {};
    for (int64_t i = 0; i < n; ++i) {
      y[i] = args.residual == nullptr ? x[i] : x[i] + args.residual[r * args.ldr + i];
      sums[i % kNormLanes] += y[i];
    }
    const float mean = fold_lanes<kNormLanes>(sums) / size;
    for (int64_t i = 0; i < n; ++i) {
      const float d = y[i] - mean;
      squares[i % kNormLanes] = std::fma(d, d, squares[i % kNormLanes]);
    }
    const float inverse = 1.0f / std::sqrt(fold_lanes<kNormLanes>(squares) / size + args.norm.eps);
    for (int64_t i = 0; i < n; ++i) {
      const float weight = args.norm.weight == nullptr ? 1.0f : args.norm.weight[i];
      const float bias = args.norm.bias == nullptr ? 0.0f : args.norm.bias[i];
      y[i] = std::fma((y[i] - mean) * inverse, weight, bias);
    }
  }
}

constexpr LayerNormKernel kernel = {Isa::reference, run};

}  // namespace

const LayerNormKernel* layer_norm_reference() { return &kernel; }

}  // namespace bantamweight
