// One element at a time: the oracle of every other variant.
#include <cmath>

#include "code_maps/code_maps.h"

namespace bantamweight {
namespace {

float weighted(const WeightedSum& sum, int64_t i) {
  float t = sum.shift;
  if (sum.floats != nullptr) t = std::fma(sum.floats[i], sum.factor, t);
  if (sum.a != nullptr) t = std::fma(static_cast<float>(sum.a[i]), sum.factor_a, t);
  if (sum.b != nullptr) t = std::fma(static_cast<float>(sum.b[i]), sum.factor_b, t);
  return t;
}

void to_codes(const WeightedSum& sum, int8_t* codes) {
  for (int64_t i = 0; i < sum.count; ++i) {
    const float t = weighted(sum, i), most = t < 127.0f ? t : 127.0f, bounded = most > -127.0f ? most : -127.0f;
    codes[i] = static_cast<int8_t>(std::nearbyint(bounded));
  }
}

void to_floats(const WeightedSum& sum, bool relu, float* y) {
  for (int64_t i = 0; i < sum.count; ++i) {
    const float t = weighted(sum, i);
    y[i] = !relu || t > 0.0f ? t : 0.0f;
  }
}

void largest(const int8_t* const* rows, int64_t row_count, int64_t count, int8_t* codes) {
  for (int64_t i = 0; i < count; ++i) {
    int8_t most = rows[0][i];
    for (int64_t r = 1; r < row_count; ++r) most = rows[r][i] > most ? rows[r][i] : most;
    codes[i] = most;
  }
}

constexpr CodeMapsKernel kernel = {Isa::reference, to_codes, to_floats, largest};

}  // namespace

const CodeMapsKernel* code_maps_reference() { return &kernel; }

}  // namespace bantamweight
