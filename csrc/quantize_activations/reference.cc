// The obvious loop: the oracle of every other variant.
#include <cmath>

#include "quantize_activations/quantize_activations.h"

namespace bantamweight {
namespace {

// Codes and scale of x[0, count), which share a maximum; false if one is not finite.
bool round_range(const float* x, int64_t count, int8_t* q, float* scale) {
  float max = 0.0f;
  for (int64_t k = 0; k < count; ++k) {
    if (!std::isfinite(x[k])) return false;
    max = std::fmax(max, std::fabs(x[k]));
  }
  // A maximum so small that 127 / max overflows is as good as zero.
  const float to_code = 127.0f / max;
  const bool zero = !std::isfinite(to_code);
  *scale = zero ? 0.0f : max / 127.0f;
  for (int64_t k = 0; k < count; ++k) q[k] = zero ? 0 : static_cast<int8_t>(std::nearbyint(x[k] * to_code));
  return true;
}

// Codes and scale of x[0, count) around the middle of its range.
bool round_around(const float* x, int64_t count, int8_t* q, float* scale, float* offset) {
  float least = x[0], largest = x[0];
  for (int64_t k = 0; k < count; ++k) {
    if (!std::isfinite(x[k])) return false;
    least = std::fmin(least, x[k]);
    largest = std::fmax(largest, x[k]);
  }
  *offset = (0.5f * largest + 0.5f * least) + 0.0f;
  // The middle is rounded, so that either end may be farther from it; x - offset is no farther than both.
  const float max = std::fmax(largest - *offset, *offset - least), to_code = 127.0f / max;
  const bool zero = !std::isfinite(to_code);
  *scale = zero ? 0.0f : max / 127.0f;
  for (int64_t k = 0; k < count; ++k) {
    q[k] = zero ? 0 : static_cast<int8_t>(std::nearbyint((x[k] - *offset) * to_code));
  }
  return true;
}

// The same as two rows, `low` behind `high`.
bool round_halves(const float* x, int64_t count, int8_t* high, int8_t* low, float* scale) {
  float max = 0.0f;
  for (int64_t k = 0; k < count; ++k) {
    if (!std::isfinite(x[k])) return false;
    max = std::fmax(max, std::fabs(x[k]));
  }
  const float to_code = kInt16Max / max;
  const bool zero = !std::isfinite(to_code);
  scale[1] = zero ? 0.0f : max / kInt16Max;
  scale[0] = kHalf * scale[1];
  for (int64_t k = 0; k < count; ++k) {
    const float t = zero ? 0.0f : x[k] * to_code, h = std::nearbyint(t * kInverseHalf);
    high[k] = static_cast<int8_t>(h);
    low[k] = static_cast<int8_t>(std::nearbyint(t - kHalf * h));  // exact: both are multiples of t's last place
  }
  return true;
}

Status run(const QuantizeRowsArgs& args) {
  const int64_t padded = padded_row_bytes(args.k), per_row = rows_per_row(args.mode);
  const int64_t groups = args.k == 0 ? 0 : (args.k + args.group_size - 1) / args.group_size;
  const bool blocks = args.mode == Activations::int8_block;
  for (int64_t m = 0; m < args.m; ++m) {
    const float* x = args.x + m * args.ldx;
    if (!args.epilogue.empty()) {
      for (int64_t k = 0; k < args.k; ++k) args.epilogue_row[k] = x[k];
      EpilogueArgs finish = {args.epilogue_row, args.k, 1, args.k, args.epilogue};
      if (finish.epilogue.residual != nullptr) finish.epilogue.residual += m * args.epilogue.ldr;
      epilogue_reference()->run(finish);
      x = args.epilogue_row;
    }
    const int64_t row = m * per_row;
    int8_t* q = args.q + row * padded;
    float* scale = args.scale + (blocks ? m * groups : row);
    bool finite = true;
    if (args.mode == Activations::int16) {
      finite = round_halves(x, args.k, q, q + padded, scale);
    } else if (!blocks) {
      finite = round_range(x, args.k, q, scale);
    }
    for (int64_t g = 0; blocks && g < groups; ++g) {
      const int64_t begin = g * args.group_size, left = args.k - begin;
      const int64_t count = left < args.group_size ? left : args.group_size;
      finite = round_around(x + begin, count, q + begin, scale + g, args.offset + m * groups + g) && finite;
    }
    if (!finite) return Status::not_finite;
    for (int64_t r = row; r < row + per_row; ++r, q += padded) {
      int32_t* sums = args.sums + r * groups;
      for (int64_t g = 0; g < groups; ++g) sums[g] = 0;
      for (int64_t k = 0; k < args.k; ++k) sums[k / args.group_size] += q[k];
      for (int64_t k = args.k; k < padded; ++k) q[k] = 0;
    }
  }
  return Status::ok;
}

constexpr QuantizeRowsKernel kernel = {Isa::reference, run};

}  // namespace

const QuantizeRowsKernel* quantize_rows_reference() { return &kernel; }

}  // namespace bantamweight
