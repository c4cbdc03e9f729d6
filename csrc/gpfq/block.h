// The recursion of gpfq.h over any vectors, kRows rows by kVectors registers of columns at a time: the
// rows above the block are applied to its accumulators as in a matrix product, then the block's own
// triangle is solved in registers.
//
// `Lanes` is the Floats of runtime/floats_*.h and
//   Vector floor(Vector)
//   Vector with_sign_of(Vector magnitude, Vector sign)        magnitude >= 0
//   Vector where_larger(Vector a, Vector b, Vector value)     value in lanes where a > b, 0 elsewhere
//   Vector uniform(uint32_t key, int64_t column)              in [0, 1): the upper 24 bits of each column's draw
//   void store_codes(uint8_t* to, Vector codes, Part)
// Everything is static: each file that includes it keeps a copy with its own flags.
#pragma once

#include "gpfq/gpfq.h"

namespace bantamweight {

template <class Lanes, int kVectors>
struct GpfqRun {
  const GpfqPanel<float>* panel;
  int64_t problem, begin;
  typename Lanes::Part part[kVectors];  // columns that each register really has
};

// How an argument becomes a code, and what is fed back; writes the row's codes.
template <class Lanes, int kVectors>
static inline typename Lanes::Vector gpfq_quantize(const GpfqRun<Lanes, kVectors>& run, int64_t row, int v,
                                                   typename Lanes::Vector z) {
  using Vector = typename Lanes::Vector;
  const GpfqPanel<float>& p = *run.panel;
  const typename Lanes::Part part = run.part[v];
  const int64_t column = run.begin + v * Lanes::kLanes;
  const int64_t grid = (run.problem * p.groups + p.group_of_row[row]) * p.columns + column;
  const int64_t at = (run.problem * p.rows + row) * p.columns + column;
  const Vector none = Lanes::all(0.0f), zero = Lanes::load(p.zero + grid, part);

  Vector offset = Lanes::all(0.5f);
  if (p.rounding == GpfqRounding::stochastic)
    offset = Lanes::uniform(gpfq_row_key(p.seed, run.problem, p.first_row + row), column);
  Vector steps = Lanes::multiply(z, Lanes::load(p.inverse_scale + grid, part));
  const Vector size = Lanes::absolute(steps), threshold = Lanes::all(p.threshold);
  if (p.shrink == GpfqShrink::soft)
    steps = Lanes::with_sign_of(Lanes::larger(Lanes::subtract(size, threshold), none), steps);
  else if (p.shrink == GpfqShrink::hard)
    steps = Lanes::where_larger(size, threshold, steps);
  // larger gives the number beside a NaN: code 0.
  Vector code = Lanes::larger(Lanes::floor(Lanes::add(steps, Lanes::add(zero, offset))), none);
  code = Lanes::smaller(code, Lanes::all(static_cast<float>(p.levels - 1)));
  Lanes::store_codes(p.codes + at, code, part);

  const Vector q = Lanes::multiply(Lanes::load(p.scale + grid, part), Lanes::subtract(code, zero));
  if (p.feedback == GpfqFeedback::change) return Lanes::subtract(q, Lanes::load(p.previous + at, part));
  if (p.feedback == GpfqFeedback::error) return Lanes::subtract(q, z);
  return q;
}

template <class Lanes, int kRows, int kVectors>
static void gpfq_run_columns(const GpfqRun<Lanes, kVectors>& run) {
  using Vector = typename Lanes::Vector;
  constexpr int64_t kLanes = Lanes::kLanes;
  const GpfqPanel<float>& p = *run.panel;
  float* panel = p.panel + run.problem * p.rows * p.columns + run.begin;
  const float* lower = p.lower + run.problem * p.rows * p.rows;
  // The amounts so far; the panel's rows may share cache sets.
  alignas(64) float done[kGpfqMaxRows][kVectors * kLanes];

  for (int64_t top = 0; top < p.rows; top += kRows) {
    const int64_t rows = p.rows - top < kRows ? p.rows - top : kRows;
    const float* l[kRows];
    Vector acc[kRows][kVectors];
    for (int i = 0; i < kRows; ++i) {
      // Rows past the end repeat the last one; their results are dropped.
      const int64_t row = top + (i < rows ? i : rows - 1);
      l[i] = lower + row * p.rows;
      for (int v = 0; v < kVectors; ++v) acc[i][v] = Lanes::load(panel + row * p.columns + v * kLanes, run.part[v]);
    }
    for (int64_t k = 0; k < top; ++k) {
      Vector amount[kVectors];
      for (int v = 0; v < kVectors; ++v) amount[v] = Lanes::load(done[k] + v * kLanes);
      for (int i = 0; i < kRows; ++i) {
        const Vector factor = Lanes::all(l[i][k]);
        for (int v = 0; v < kVectors; ++v) acc[i][v] = Lanes::subtract_product(acc[i][v], factor, amount[v]);
      }
    }
    for (int i = 0; i < kRows; ++i) {
      if (i >= rows) break;
      Vector amount[kVectors];
      for (int v = 0; v < kVectors; ++v) {
        amount[v] = gpfq_quantize(run, top + i, v, acc[i][v]);
        Lanes::store(done[top + i] + v * kLanes, amount[v]);
        Lanes::store(panel + (top + i) * p.columns + v * kLanes, amount[v], run.part[v]);
      }
      for (int below = i + 1; below < kRows; ++below) {
        const Vector factor = Lanes::all(l[below][top + i]);
        for (int v = 0; v < kVectors; ++v) acc[below][v] = Lanes::subtract_product(acc[below][v], factor, amount[v]);
      }
    }
  }
}

// GpfqKernel::run
template <class Lanes, int kRows, int kVectors>
static void gpfq_run(const GpfqPanel<float>& p, int64_t problem, int64_t begin, int64_t end) {
  constexpr int64_t kLanes = Lanes::kLanes, kWidth = kVectors * kLanes;
  static_assert(kGpfqSlice % kWidth == 0, "a slice is whole runs");
  for (int64_t at = begin; at < end; at += kWidth) {
    GpfqRun<Lanes, kVectors> columns = {&p, problem, at, {}};
    for (int v = 0; v < kVectors; ++v) columns.part[v] = Lanes::part(end - at - v * kLanes);
    gpfq_run_columns<Lanes, kRows, kVectors>(columns);
  }
}

}  // namespace bantamweight
