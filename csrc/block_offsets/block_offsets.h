// What the offsets of activation blocks add to a linear layer's outputs (Activations::int8_block).
//
//   y[r, n] += sum_g offset[r, g] * weight_sum[g, n]
//
// A block of activations x ~= offset + scale * q gives the outputs scale * sum_k w q, which the matmul
// has written, and offset * sum_k w, which this adds: one multiply-add for every block of 128 products.
// Fused multiply-adds over g ascending, from y, so that all variants agree to the last bit.
#pragma once

#include <cstddef>
#include <cstdint>

#include "runtime/isa.h"

namespace bantamweight {

struct BlockOffsetsArgs {
  const float* offset;      // [m, groups]
  const float* weight_sum;  // [groups][width]; whole vectors of a row may be read where width holds them
  int64_t groups, width;
  float* y;  // in and out: [m, n], rows ldy floats apart
  int64_t ldy;
  int64_t m, n;  // n <= width
};

struct BlockOffsetsKernel {
  Isa isa;
  void (*run)(const BlockOffsetsArgs& args);  // one thread
};

// The best variant under `ceiling`.
const BlockOffsetsKernel* block_offsets_kernel(Isa ceiling);

const BlockOffsetsKernel* block_offsets_reference();
const BlockOffsetsKernel* block_offsets_avx2();
const BlockOffsetsKernel* block_offsets_avx512();
const BlockOffsetsKernel* block_offsets_neon();

// Variants this op has in this build, best first.
const Isa* block_offsets_variants(std::size_t* count);

}  // namespace bantamweight
