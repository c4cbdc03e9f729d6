// Float activations to int8 rows, each against its own absolute maximum.
//
//   int8        scale[m] = max_k |x[m, k]| / 127        q[m, k] = rint(x[m, k] * (127 / max))
//   int8_block  for each group, x ~= offset[m, g] + scale[m, g] * q: the offset is the middle of its range,
//               scale[m, g] = max_{k in g} |x[m, k] - offset| / 127, q = rint((x[m, k] - offset) * (127 / max)).
//               Half the range of 128 Gaussian values is 8% less than their largest magnitude, and of
//               a group with one outlier half as much
//   int16       two rows a row, x ~= scale[2 m] * q[2 m] + scale[2 m + 1] * q[2 m + 1]: with
//               t = x * (127 * 254 / max), the first holds h = rint(t * (1 / 254)) and the second
//               rint(t - 254 h), both within -127 .. 127; scale[2 m + 1] = max / (127 * 254) and
//               scale[2 m] = 254 times that
//
// Rounding is to nearest, ties to even. A row (group) of zeros has scale 0 and codes 0, and so
// has a group of equal values, which its offset holds.
#pragma once

#include <cstddef>
#include <cstdint>

#include "epilogue/epilogue.h"
#include "runtime/isa.h"
#include "runtime/status.h"

namespace bantamweight {

// Rows are padded with zeros to a multiple of this many bytes, and kernels may read that far.
constexpr int64_t kRowAlign = 64;

inline int64_t padded_row_bytes(int64_t k) { return (k + kRowAlign - 1) / kRowAlign * kRowAlign; }

// Rows that were rounded before, as quantize_rows leaves them in mode int8.
struct QuantizedRows {
  const int8_t* q = nullptr;      // [m, padded_row_bytes(k)], and kRowAlign bytes more that may be read
  const float* scale = nullptr;   // [m]
  const int32_t* sums = nullptr;  // [m, ceil(k / group_size)]
  int64_t group_size = 0;
};

enum class Activations : int { int8 = 0, int8_block = 1, int16 = 2 };

// int8 rows that a float row becomes.
inline int64_t rows_per_row(Activations mode) { return mode == Activations::int16 ? 2 : 1; }

// The second half of an int16 activation counts in units of 1 / kHalf of the first.
constexpr float kHalf = 254.0f, kInverseHalf = 1.0f / kHalf, kInt16Max = 127.0f * kHalf;

struct QuantizeRowsArgs {
  const float* x;  // [m, k], rows ldx floats apart
  int64_t ldx;
  int64_t m, k;
  int64_t group_size;  // k per sum; groups = ceil(k / group_size)
  int8_t* q;           // out [rows, padded_row_bytes(k)], rows = m * rows_per_row(mode)
  float* scale;        // out [rows]; int8_block: [rows, groups]
  int32_t* sums;       // out [rows, groups], the sums of q over each group
  Activations mode = Activations::int8;
  float* offset = nullptr;        // out [rows, groups] in mode int8_block
  Epilogue epilogue;              // of x, before it is rounded
  float* epilogue_row = nullptr;  // [k] to work in, where there is an epilogue; quantize_rows brings its own
};

// sums[m, g] of rows that were rounded with other groups.
void sum_rows(const int8_t* q, int64_t m, int64_t k, int64_t group_size, int32_t* sums);

// Returns Status::not_finite (and writes nothing that may be used) if any x is NaN or infinite.
Status quantize_rows(const QuantizeRowsArgs& args, Isa ceiling);

struct QuantizeRowsKernel {
  Isa isa;
  Status (*run)(const QuantizeRowsArgs& args);  // one thread, all rows
};

const QuantizeRowsKernel* quantize_rows_reference();
const QuantizeRowsKernel* quantize_rows_avx2();
const QuantizeRowsKernel* quantize_rows_avx512();
const QuantizeRowsKernel* quantize_rows_neon();

// Variants this op has in this build, best first.
const Isa* quantize_rows_variants(std::size_t* count);

}  // namespace bantamweight
