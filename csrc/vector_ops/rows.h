// Dot products and combinations of rows over any vectors. `Lanes` is the Floats of runtime/floats_*.h and
//   void fetch(const float*)   into the second level
// Everything is static: each file that includes it keeps a copy with its own flags.
#pragma once

#include "vector_ops/vector_ops.h"

namespace bantamweight {

constexpr int64_t kLineFloats = 16;  // of a cache line of 64 bytes

// What the next chunk reads here: a chunk of every row is more than the first level holds. Once a line.
template <class Lanes>
static inline void fetch_ahead(const float* p, int64_t i) {
  if (i % kLineFloats == 0) Lanes::fetch(p + i + kVectorChunk);
}

// kRows dot products against one reading of w, each in 32 lanes.
template <class Lanes, int kRows>
static void dots_of(const float* const* rows, int64_t at, const float* w, int64_t n, float* sums) {
  using Vector = typename Lanes::Vector;
  constexpr int64_t kLanes = Lanes::kLanes;
  constexpr int kRegisters = 32 / kLanes;
  Vector lanes[kRows][kRegisters];
  for (int r = 0; r < kRows; ++r) {
    for (int j = 0; j < kRegisters; ++j) lanes[r][j] = Lanes::all(0.0f);
  }
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    for (int j = 0; j < kRegisters; ++j) {
      const Vector wj = Lanes::load(w + i + kLanes * j);
      for (int r = 0; r < kRows; ++r) {
        const float* row = rows[r] + at + i;
        fetch_ahead<Lanes>(row, kLanes * j);
        lanes[r][j] = Lanes::multiply_add(Lanes::load(row + kLanes * j), wj, lanes[r][j]);
      }
    }
  }
  for (int j = 0; i < n; i += kLanes, ++j) {  // the last, incomplete 32 elements, followed by zeros
    const auto part = Lanes::part(n - i);
    const Vector wj = Lanes::load(w + i, part);
    for (int r = 0; r < kRows; ++r)
      lanes[r][j] = Lanes::multiply_add(Lanes::load(rows[r] + at + i, part), wj, lanes[r][j]);
  }
  for (int r = 0; r < kRows; ++r) {
    for (int half = kRegisters / 2; half > 0; half /= 2) {
      for (int j = 0; j < half; ++j) lanes[r][j] = Lanes::add(lanes[r][j], lanes[r][j + half]);
    }
    sums[r] = Lanes::sum(lanes[r][0]);
  }
}

// VectorKernel::dots, first kMost rows at a time, then kFew, then one.
template <class Lanes, int kMost, int kFew>
static void dots_by(const float* const* rows, int64_t k, int64_t at, const float* w, int64_t n, float* sums) {
  int64_t r = 0;
  for (; r + kMost <= k; r += kMost) dots_of<Lanes, kMost>(rows + r, at, w, n, sums + r);
  for (; r + kFew <= k; r += kFew) dots_of<Lanes, kFew>(rows + r, at, w, n, sums + r);
  for (; r < k; ++r) dots_of<Lanes, 1>(rows + r, at, w, n, sums + r);
}

// kRows multiples removed from scale * x in one reading of x and writing of w.
template <class Lanes, int kRows>
static void combine_of(const float* x, float scale, const float* const* rows, const float* coefficients, int64_t at,
                       float* w, int64_t n) {
  using Vector = typename Lanes::Vector;
  constexpr int64_t kLanes = Lanes::kLanes;
  Vector c[kRows + 1];
  for (int r = 0; r < kRows; ++r) c[r] = Lanes::all(coefficients[r]);
  const Vector factor = Lanes::all(scale);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    fetch_ahead<Lanes>(x, i);
    Vector sum = Lanes::multiply(factor, Lanes::load(x + i));
    for (int r = 0; r < kRows; ++r) {
      fetch_ahead<Lanes>(rows[r] + at, i);
      sum = Lanes::subtract_product(sum, c[r], Lanes::load(rows[r] + at + i));
    }
    Lanes::store(w + i, sum);
  }
  if (i < n) {
    const auto part = Lanes::part(n - i);
    Vector sum = Lanes::multiply(factor, Lanes::load(x + i, part));
    for (int r = 0; r < kRows; ++r) sum = Lanes::subtract_product(sum, c[r], Lanes::load(rows[r] + at + i, part));
    Lanes::store(w + i, sum, part);
  }
}

// VectorKernel::combine
template <class Lanes>
static void combine_rows(const float* x, float scale, const float* const* rows, const float* coefficients, int64_t k,
                         int64_t at, float* w, int64_t n) {
  if (k == 0) return combine_of<Lanes, 0>(x, scale, rows, coefficients, at, w, n);
  for (int64_t r = 0; r < k;) {  // each group goes on from what the one before it left in w
    if (r + 4 <= k) {
      combine_of<Lanes, 4>(x, scale, rows + r, coefficients + r, at, w, n);
      r += 4;
    } else if (r + 2 <= k) {
      combine_of<Lanes, 2>(x, scale, rows + r, coefficients + r, at, w, n);
      r += 2;
    } else {
      combine_of<Lanes, 1>(x, scale, rows + r, coefficients + r, at, w, n);
      r += 1;
    }
    x = w;
    scale = 1.0f;
  }
}

}  // namespace bantamweight
