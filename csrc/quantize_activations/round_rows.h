// The walk over rows, groups and modes, over the vectors of runtime/floats_*.h and the `Range` of each
// instruction set, static functions over ranges of floats and codes:
//   quantize_group     codes of a range; returns their sum
//   halve_group        codes of a range as two rows of halves, and their sums
//   set_zero           zero codes
// Everything is static: each file that includes it keeps a copy with its own flags.
#pragma once

#include "epilogue/rows.h"
#include "quantize_activations/quantize_activations.h"
#include "runtime/largest_magnitude.h"

namespace bantamweight {

// The middle of the range of x[0, count) and the largest distance from it, NaN if one is not finite.
template <class F>
static float distance_from_middle(const float* x, int64_t count, float* middle) {
  constexpr int64_t kLanes = F::kLanes;
  float least = x[0], largest = x[0], not_finite = 0.0f;
  if (count >= kLanes) {
    auto low = F::load(x), high = low, bad = F::all(0.0f);
    for (int64_t i = 0; i < count; i += kLanes) {
      const auto v = F::load(x + (i + kLanes <= count ? i : count - kLanes));
      low = F::smaller(low, v);
      high = F::larger(high, v);
      bad = F::multiply_add(v, F::all(0.0f), bad);  // 0 x is NaN for an infinity, too
    }
    float lows[kLanes], highs[kLanes], bads[kLanes];
    F::store(lows, low);
    F::store(highs, high);
    F::store(bads, bad);
    for (int64_t i = 0; i < kLanes; ++i) {
      least = lows[i] < least ? lows[i] : least;
      largest = highs[i] > largest ? highs[i] : largest;
      not_finite += bads[i];
    }
  } else {
    for (int64_t i = 0; i < count; ++i) {
      least = x[i] < least ? x[i] : least;
      largest = x[i] > largest ? x[i] : largest;
      not_finite += 0.0f * x[i];
    }
  }
  *middle = (0.5f * largest + 0.5f * least) + 0.0f;  // which makes a zero of either sign a positive one
  const float above = largest - *middle, below = *middle - least;
  return (above > below ? above : below) + not_finite;
}

// q[begin, end) of x - offset; returns their sum.
template <class F, class Range>
static int32_t quantize_around(const float* x, int64_t begin, int64_t end, float offset, float to_code, int8_t* q) {
  constexpr int64_t kLanes = F::kLanes, kStep = 128;
  float from_offset[kStep];
  int32_t sum = 0;
  for (; begin < end; begin += kStep) {
    const int64_t count = end - begin < kStep ? end - begin : kStep;
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      F::store(from_offset + i, F::subtract(F::load(x + begin + i), F::all(offset)));
    }
    for (; i < count; ++i) from_offset[i] = x[begin + i] - offset;
    sum += Range::quantize_group(from_offset, 0, count, to_code, q + begin);
  }
  return sum;
}

static inline bool is_finite(float magnitude) { return magnitude < __builtin_inff(); }

// From the largest magnitude to the factor of the codes 0 .. `most`, or 0 where it is so small that the
// factor overflows; and to the scale.
static inline float factor_of(float max, float most, float* scale) {
  const float to_code = most / max;
  const bool zero = !(to_code < __builtin_inff());
  *scale = zero ? 0.0f : max / most;
  return zero ? 0.0f : to_code;
}

template <class F, class Range>
static Status round_rows(const QuantizeRowsArgs& args) {
  const int64_t padded = padded_row_bytes(args.k);
  const int64_t groups = args.k == 0 ? 0 : (args.k + args.group_size - 1) / args.group_size;
  const bool blocks = args.mode == Activations::int8_block;
  const EpilogueRow finish = args.epilogue.empty() ? nullptr : epilogue_row_of<F>(args.epilogue);
  for (int64_t m = 0; m < args.m; ++m) {
    const float* x = args.x + m * args.ldx;
    float max = 0.0f;
    if (finish != nullptr) {  // into a row that stays in L1, so that x is read once
      const float* residual = args.epilogue.residual;
      max = finish(x, residual == nullptr ? nullptr : residual + m * args.epilogue.ldr, args.k, args.epilogue_row);
      x = args.epilogue_row;
    } else if (!blocks) {
      max = largest_magnitude<F>(x, args.k);
    }
    if (!is_finite(max)) return Status::not_finite;
    const auto end_of = [&](int64_t g) {
      return args.k - g * args.group_size < args.group_size ? args.k : (g + 1) * args.group_size;
    };
    if (args.mode == Activations::int16) {
      int8_t *high = args.q + 2 * m * padded, *low = high + padded;
      int32_t* sums = args.sums + 2 * m * groups;
      float* scale = args.scale + 2 * m;
      const float to_code = factor_of(max, kInt16Max, scale + 1);
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
    float to_code = blocks ? 0.0f : factor_of(max, 127.0f, args.scale + m);
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t begin = g * args.group_size, end = end_of(g);
      if (blocks) {
        float* offset = args.offset + m * groups + g;
        max = distance_from_middle<F>(x + begin, end - begin, offset);
        if (!is_finite(max)) return Status::not_finite;
        to_code = factor_of(max, 127.0f, args.scale + m * groups + g);
        sums[g] = quantize_around<F, Range>(x, begin, end, *offset, to_code, q);
      } else {
        sums[g] = Range::quantize_group(x, begin, end, to_code, q);
      }
    }
    Range::set_zero(q, args.k, padded);
  }
  return Status::ok;
}

}  // namespace bantamweight
