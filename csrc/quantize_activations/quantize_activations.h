// Float activations to int8 rows, each against its own absolute maximum.
//
//   scale[m] = max_k |x[m, k]| / 127          q[m, k] = rint(x[m, k] * (127 / max))
//
// Rounding is to nearest, ties to even. A row of zeros has scale 0 and codes 0.
#pragma once

#include <cstddef>
#include <cstdint>

#include "runtime/isa.h"
#include "runtime/status.h"

namespace bantamweight {

// Rows are padded with zeros to a multiple of this many bytes, and kernels may read that far.
constexpr int64_t kRowAlign = 64;

inline int64_t padded_row_bytes(int64_t k) { return (k + kRowAlign - 1) / kRowAlign * kRowAlign; }

// Rows that were rounded before, as quantize_rows leaves them.
struct QuantizedRows {
  const int8_t* q = nullptr;      // [m, padded_row_bytes(k)], and kRowAlign bytes more that may be read
  const float* scale = nullptr;   // [m]
  const int32_t* sums = nullptr;  // [m, ceil(k / group_size)]
  int64_t group_size = 0;
};

struct QuantizeRowsArgs {
  const float* x;  // [m, k], rows ldx floats apart
  int64_t ldx;
  int64_t m, k;
  int64_t group_size;  // k per sum; groups = ceil(k / group_size)
  int8_t* q;           // out [m, padded_row_bytes(k)]
  float* scale;        // out [m]
  int32_t* sums;       // out [m, groups], the sums of q over each group
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
