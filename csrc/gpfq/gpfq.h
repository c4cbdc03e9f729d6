// The in-block recursion of greedy path following (GPFQ): the one step of the method that is not a
// matrix product.
//
// A panel holds the arguments of `rows` consecutive weights of every column (a column is a neuron,
// or a neuron under one candidate step). Going down the rows t, each column rounds its argument to
// the grid and takes what it did out of the arguments below:
//
//   code = clamp(floor(panel[t] / scale + zero + 1/2), 0, levels - 1)
//   q    = scale * (code - zero)
//   a_t  = q, q - previous[t] or q - panel[t]     (Feedback)
//   panel[s] -= lower[s, t] * a_t   for s > t,    panel[t] = a_t
//
// With lower = H / H_ss and Feedback::value this is GPFQ's path following in Gram form; with
// Feedback::change a sweep of coordinate descent; with Feedback::error and the negated rows of an
// inverse Cholesky factor GPTQ's error propagation.
//
// Every variant takes s in the same order with fused multiply-adds, so all agree to the last bit.
#pragma once

#include <cstddef>
#include <cstdint>

#include "runtime/isa.h"
#include "runtime/status.h"

namespace bantamweight {

enum class GpfqFeedback : int { value = 0, change = 1, error = 2 };
enum class GpfqRounding : int { nearest = 0, stochastic = 1 };
// What is done to an argument z (in steps) before it is rounded: nothing, sign(z) max(|z| - t, 0),
// or z if |z| > t and 0 otherwise.
enum class GpfqShrink : int { none = 0, soft = 1, hard = 2 };

constexpr int64_t kGpfqMaxRows = 128;
// Columns of a slice: a slice of kGpfqMaxRows rows stays in the first-level cache.
constexpr int64_t kGpfqSlice = 32;

// `problems` independent panels one behind the other (the channel groups of a convolution).
template <class T>
struct GpfqPanel {
  int64_t problems, rows, columns;  // rows <= kGpfqMaxRows
  T* panel;                         // in: arguments, out: amounts a_t; [problems, rows, columns]
  const T* lower;                   // [problems, rows, rows]; only entries below the diagonal are read
  const T* scale;                   // [problems, groups, columns], > 0
  const T* inverse_scale;           // the same shape, 1 / scale
  const T* zero;                    // the same shape, in code units
  int64_t groups;
  const int32_t* group_of_row;  // [rows], 0 .. groups - 1
  const T* previous;            // [problems, rows, columns] for Feedback::change, else null
  uint8_t* codes;               // out [problems, rows, columns]
  int levels;                   // 2 .. 256
  GpfqFeedback feedback;
  GpfqRounding rounding;
  GpfqShrink shrink;
  T threshold;        // of the shrinkage, in steps, >= 0
  uint32_t seed;      // of stochastic rounding
  int64_t first_row;  // of the panel in the whole problem; enters the random numbers
};

// Threads: OpenMP's current setting, over slices of columns.
Status gpfq_panel(const GpfqPanel<float>& panel, Isa ceiling);
// Scalar on every CPU: the oracle's arithmetic.
Status gpfq_panel(const GpfqPanel<double>& panel);

struct GpfqKernel {
  Isa isa;
  // Columns [begin, end) of one problem, end - begin <= kGpfqSlice.
  void (*run)(const GpfqPanel<float>& panel, int64_t problem, int64_t begin, int64_t end);
};

// What GpfqKernel::run does, in double precision.
void gpfq_columns(const GpfqPanel<double>& panel, int64_t problem, int64_t begin, int64_t end);

const GpfqKernel* gpfq_kernel_reference();
const GpfqKernel* gpfq_kernel_avx2();
const GpfqKernel* gpfq_kernel_avx512();
const GpfqKernel* gpfq_kernel_neon();

// The variant this op would run under `ceiling`.
Isa gpfq_select(Isa ceiling);

// Variants this op has in this build, best first.
const Isa* gpfq_variants(std::size_t* count);

// Counter-based random bits: the finalizer of MurmurHash3 (Appleby, public domain). The bits of a
// rounding depend on (seed, problem, row, column) alone, so neither threads, slices nor the
// variant change a draw. `static`: each file keeps a copy compiled for its own instruction set.
static inline uint32_t gpfq_mix(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x85ebca6bu;
  x = (x ^ (x >> 13)) * 0xc2b2ae35u;
  return x ^ (x >> 16);
}
constexpr uint32_t kGpfqColumnStride = 0x9e3779b9u;
// Column c of the row draws gpfq_mix(key + c * kGpfqColumnStride), of which the upper 24 bits count.
static inline uint32_t gpfq_row_key(uint32_t seed, int64_t problem, int64_t row) {
  return gpfq_mix(gpfq_mix(seed ^ static_cast<uint32_t>(problem) * 0x27d4eb2fu) + static_cast<uint32_t>(row));
}

}  // namespace bantamweight
