// The walk over rows, groups and modes, for the `Range` of each instruction set, static functions over
// ranges of floats and codes:
//   largest_magnitude  the bits of the largest |x|, at least kInfinity if one is not finite
//   quantize_group     codes of a range; returns their sum
//   halve_group        codes of a range as two rows of halves, and their sums
//   set_zero           zero codes
// Everything is static: each file that includes it keeps a copy with its own flags.
#pragma once

#include "quantize_activations/quantize_activations.h"

namespace bantamweight {

static constexpr int32_t kInfinity = 0x7f800000;

// From the bits of the largest magnitude to the factor of the codes 0 .. `most`, or 0 where the
// maximum is so small that the factor overflows; and to the scale.
static inline float factor_of(int32_t max_bits, float most, float* scale) {
  float max;
  __builtin_memcpy(&max, &max_bits, 4);
  const float to_code = most / max;
  const bool zero = !(to_code < __builtin_inff());
  *scale = zero ? 0.0f : max / most;
  return zero ? 0.0f : to_code;
}

template <class Range>
static Status round_rows(const QuantizeRowsArgs& args) {
  const int64_t padded = padded_row_bytes(args.k);
  const int64_t groups = args.k == 0 ? 0 : (args.k + args.group_size - 1) / args.group_size;
  for (int64_t m = 0; m < args.m; ++m) {
    const float* x = args.x + m * args.ldx;
    const auto end_of = [&](int64_t g) {
      return args.k - g * args.group_size < args.group_size ? args.k : (g + 1) * args.group_size;
    };
    if (args.mode == Activations::int16) {
      int8_t *high = args.q + 2 * m * padded, *low = high + padded;
      int32_t* sums = args.sums + 2 * m * groups;
      float* scale = args.scale + 2 * m;
      const int32_t max_bits = Range::largest_magnitude(x, args.k);
      if (max_bits >= kInfinity) return Status::not_finite;
      const float to_code = factor_of(max_bits, kInt16Max, scale + 1);
      scale[0] = kHalf * scale[1];
      for (int64_t g = 0; g < groups; ++g) {
        int32_t both[2];
        Range::halve_group(x, g * args.group_size, end_of(g), to_code, high, low, both);
        sums[g] = both[0];
        sums[groups + g] = both[1];
      }
      Range::set_zero(high, args.k, padded);
      Range::set_zero(low, args.k, padded);
      continue;
    }
    int8_t* q = args.q + m * padded;
    int32_t* sums = args.sums + m * groups;
    const bool blocks = args.mode == Activations::int8_block;
    float to_code = 0.0f;
    if (!blocks) {
      const int32_t max_bits = Range::largest_magnitude(x, args.k);
      if (max_bits >= kInfinity) return Status::not_finite;
      to_code = factor_of(max_bits, 127.0f, args.scale + m);
    }
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t begin = g * args.group_size, end = end_of(g);
      if (blocks) {
        const int32_t max_bits = Range::largest_magnitude(x + begin, end - begin);
        if (max_bits >= kInfinity) return Status::not_finite;
        to_code = factor_of(max_bits, 127.0f, args.scale + m * groups + g);
      }
      sums[g] = Range::quantize_group(x, begin, end, to_code, q);
    }
    Range::set_zero(q, args.k, padded);
  }
  return Status::ok;
}

}  // namespace bantamweight
