// The loop over any vectors (runtime/floats_*.h): four rows share the weights' sums, one row alone runs
// four chains of multiply-adds. Everything is static: each file that includes it keeps a copy with its
// own flags.
#pragma once

#include "block_offsets/block_offsets.h"

namespace bantamweight {

// kRows rows from `row` on and kVectors vectors from column `begin` on; of the last, `count` lanes.
template <class F, int kRows, int kVectors>
static inline void add_offsets_tile(const BlockOffsetsArgs& args, int64_t row, int64_t begin, int64_t count) {
  constexpr int64_t kLanes = F::kLanes;
  const bool whole = count == kLanes;
  const auto part = F::part(count);
  const float *sums = args.weight_sum + begin, *offset = args.offset + row * args.groups;
  float* y = args.y + row * args.ldy + begin;
  typename F::Vector sum[kRows][kVectors];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const float* from = y + r * args.ldy + v * kLanes;
      sum[r][v] = v < kVectors - 1 || whole ? F::load(from) : F::load(from, part);
    }
  }
  for (int64_t g = 0; g < args.groups; ++g, sums += args.width) {
    typename F::Vector weight[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const float* from = sums + v * kLanes;
      weight[v] = v < kVectors - 1 || whole ? F::load(from) : F::load(from, part);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const auto a = F::all(offset[r * args.groups + g]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[r][v] = F::multiply_add(a, weight[v], sum[r][v]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      float* to = y + r * args.ldy + v * kLanes;
      v < kVectors - 1 || whole ? F::store(to, sum[r][v]) : F::store(to, sum[r][v], part);
    }
  }
}

template <class F, int kRows, int kVectors>
static inline void add_offsets_columns(const BlockOffsetsArgs& args, int64_t row) {
  constexpr int64_t kLanes = F::kLanes;
  int64_t i = 0;
  for (; i + kVectors * kLanes <= args.n; i += kVectors * kLanes) {
    add_offsets_tile<F, kRows, kVectors>(args, row, i, kLanes);
  }
  for (; i < args.n; i += kLanes) {
    add_offsets_tile<F, kRows, 1>(args, row, i, args.n - i < kLanes ? args.n - i : kLanes);
  }
}

template <class F>
static void add_block_offsets(const BlockOffsetsArgs& args) {
  int64_t r = 0;
  for (; r + 4 <= args.m; r += 4) add_offsets_columns<F, 4, 2>(args, r);
  for (; r < args.m; ++r) add_offsets_columns<F, 1, 4>(args, r);
}

}  // namespace bantamweight
