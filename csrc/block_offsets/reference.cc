// One output at a time: the oracle of every other variant.
#include <cmath>

#include "block_offsets/block_offsets.h"

namespace bantamweight {
namespace {

void run(const BlockOffsetsArgs& args) {
  for (int64_t r = 0; r < args.m; ++r) {
    for (int64_t i = 0; i < args.n; ++i) {
      float sum = args.y[r * args.ldy + i];
      for (int64_t g = 0; g < args.groups; ++g) {
        sum = std::fma(args.offset[r * args.groups + g], args.weight_sum[g * args.width + i], sum);
      }
      args.y[r * args.ldy + i] = sum;
    }
  }
}

constexpr BlockOffsetsKernel kernel = {Isa::reference, run};

}  // namespace

const BlockOffsetsKernel* block_offsets_reference() { return &kernel; }

}  // namespace bantamweight
