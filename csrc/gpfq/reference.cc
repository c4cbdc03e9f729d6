// The recursion as it is written in gpfq.h, one column at a time: the oracle of every variant, and
// the only one in double precision.
#include <cmath>

#include "gpfq/gpfq.h"

namespace bantamweight {
namespace {

template <class T>
T shrunk(T z, GpfqShrink shrink, T threshold) {
  switch (shrink) {
    case GpfqShrink::none:
      return z;
    case GpfqShrink::soft: {
      const T left = std::fabs(z) - threshold;
      return left > T(0) ? std::copysign(left, z) : T(0);
    }
    case GpfqShrink::hard:
      return std::fabs(z) > threshold ? z : T(0);
  }
  return z;
}

template <class T>
void run(const GpfqPanel<T>& p, int64_t problem, int64_t begin, int64_t end) {
  const int64_t panel_at = problem * p.rows * p.columns;
  const int64_t grid_at = problem * p.groups * p.columns;
  const T* lower = p.lower + problem * p.rows * p.rows;
  const T top = static_cast<T>(p.levels - 1);
  for (int64_t c = begin; c < end; ++c) {
    T* column = p.panel + panel_at + c;
    for (int64_t t = 0; t < p.rows; ++t) {
      const int64_t grid = grid_at + p.group_of_row[t] * p.columns + c;
      const T z = column[t * p.columns];
      T offset = T(0.5);
      if (p.rounding == GpfqRounding::stochastic) {
        const uint32_t key = gpfq_row_key(p.seed, problem, p.first_row + t);
        const uint32_t bits = gpfq_mix(key + static_cast<uint32_t>(c) * kGpfqColumnStride);
        offset = static_cast<T>(bits >> 8) * T(1.0 / 16777216.0);
      }
      const T steps = shrunk(z * p.inverse_scale[grid], p.shrink, p.threshold);
      T code = std::floor(steps + (p.zero[grid] + offset));
      // Written so that NaN gives code 0, as the vector instructions do.
      code = code > T(0) ? code : T(0);
      code = code < top ? code : top;
      const T q = p.scale[grid] * (code - p.zero[grid]);
      T amount = q;
      if (p.feedback == GpfqFeedback::change) amount = q - p.previous[panel_at + t * p.columns + c];
      if (p.feedback == GpfqFeedback::error) amount = q - z;
      column[t * p.columns] = amount;
      p.codes[panel_at + t * p.columns + c] = static_cast<uint8_t>(code);
      for (int64_t s = t + 1; s < p.rows; ++s) {
        column[s * p.columns] = std::fma(-lower[s * p.rows + t], amount, column[s * p.columns]);
      }
    }
  }
}

void run_float(const GpfqPanel<float>& p, int64_t problem, int64_t begin, int64_t end) { run(p, problem, begin, end); }

constexpr GpfqKernel kernel = {Isa::reference, run_float};

}  // namespace

const GpfqKernel* gpfq_kernel_reference() { return &kernel; }

void gpfq_columns(const GpfqPanel<double>& panel, int64_t problem, int64_t begin, int64_t end) {
  run(panel, problem, begin, end);
}

}  // namespace bantamweight
