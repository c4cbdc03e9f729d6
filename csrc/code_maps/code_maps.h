// Feature maps as int8 codes with one scale a map: value = scale * (code - zero), codes -127 .. 127.
//
// What the multiplication of a convolution does not do itself: weighted sums of codes and floats to
// codes or floats, and the largest of several rows of codes. All variants agree to the last bit: fused
// multiply-adds in the order of the members below, rounding to nearest, ties to even.
#pragma once

#include <cstddef>
#include <cstdint>

#include "runtime/isa.h"

namespace bantamweight {

// t[i] = shift + factor * floats[i] + factor_a * a[i] + factor_b * b[i], what is null left out.
struct WeightedSum {
  const float* floats = nullptr;
  float factor = 1.0f;
  const int8_t* a = nullptr;
  float factor_a = 0.0f;
  const int8_t* b = nullptr;
  float factor_b = 0.0f;
  float shift = 0.0f;
  int64_t count = 0;
};

struct CodeMapsKernel {
  Isa isa;
  // codes[i] = rint(max(min(t[i], 127), -127)); not a number gives 127. May be a or b.
  void (*to_codes)(const WeightedSum& sum, int8_t* codes);
  // y[i] = t[i], or the larger of t[i] and 0. May be `floats`.
  void (*to_floats)(const WeightedSum& sum, bool relu, float* y);
  // codes[i] = the largest of rows[0 .. row_count - 1][i], row_count > 0
  void (*largest)(const int8_t* const* rows, int64_t row_count, int64_t count, int8_t* codes);
};

const CodeMapsKernel* code_maps_reference();
const CodeMapsKernel* code_maps_avx2();
const CodeMapsKernel* code_maps_avx512();
const CodeMapsKernel* code_maps_neon();

// The best variant under `ceiling` that this CPU runs.
const CodeMapsKernel* code_maps_kernel(Isa ceiling);

// Variants this op has in this build, best first.
const Isa* code_maps_variants(std::size_t* count);

}  // namespace bantamweight
