// The epilogue over any vectors (runtime/floats_*.h). Everything is static: each file that includes it
// keeps a copy with its own flags.
#pragma once

#include "epilogue/epilogue.h"

namespace bantamweight {

template <class F, int kDegree>
static inline typename F::Vector gelu(typename F::Vector y, const float* coefficients, float end) {
  const auto a = F::smaller_magnitude(y, F::all(end));
  auto p = F::all(coefficients[kDegree]);
#pragma GCC unroll 8
  for (int i = kDegree - 1; i >= 0; --i) p = F::multiply_add(p, a, F::all(coefficients[i]));
  const auto p2 = F::multiply(p, p), p4 = F::multiply(p2, p2);
  return F::subtract_product(F::larger(y, F::all(0.0f)), F::multiply(p4, p4), a);
}

template <class F, Activation kActivation>
static inline typename F::Vector activate(typename F::Vector y) {
  if constexpr (kActivation == Activation::relu) return F::larger(y, F::all(0.0f));
  if constexpr (kActivation == Activation::gelu) return gelu<F, kGeluDegree>(y, kGelu, kGeluEnd);
  if constexpr (kActivation == Activation::gelu_tanh) return gelu<F, kGeluTanhDegree>(y, kGeluTanh, kGeluTanhEnd);
  return y;
}

// One row; returns the largest magnitude of its outputs, infinity or NaN if one is not finite, where kMagnitude
// asks for it.
template <class F, bool kMagnitude, Activation kActivation, bool kResidual>
static float epilogue_row(const float* x, const float* residual, int64_t n, float* y) {
  constexpr int64_t kLanes = F::kLanes, kUnroll = 4;
  const auto nothing = F::all(0.0f);
  typename F::Vector largest[kUnroll] = {nothing, nothing, nothing, nothing};
  const auto finish = [](typename F::Vector v, typename F::Vector add) __attribute__((always_inline)) {
    const auto out = activate<F, kActivation>(v);
    return kResidual ? F::add(out, add) : out;
  };
  if (!kResidual) residual = x;
  int64_t i = 0;
  for (; i + kUnroll * kLanes <= n; i += kUnroll * kLanes) {
#pragma GCC unroll 4
    for (int64_t j = 0; j < kUnroll; ++j) {
      const int64_t at = i + j * kLanes;
      const auto out = finish(F::load(x + at), F::load(residual + at));
      F::store(y + at, out);
      if constexpr (kMagnitude) largest[j] = F::larger_magnitude(largest[j], out);
    }
  }
  for (; i < n; i += kLanes) {
    const int64_t left = n - i;
    const bool whole = left >= kLanes;
    const auto out = whole ? finish(F::load(x + i), F::load(residual + i))
                           : finish(F::load_part(x + i, left), F::load_part(residual + i, left));
    whole ? F::store(y + i, out) : F::store_part(y + i, out, left);
    if constexpr (kMagnitude) largest[0] = F::larger_magnitude(largest[0], out);
  }
  if constexpr (!kMagnitude) return 0.0f;
  for (int64_t j = 1; j < kUnroll; ++j) largest[0] = F::larger_magnitude(largest[0], largest[j]);
  return F::largest_lane(largest[0]);
}

using EpilogueRow = float (*)(const float* x, const float* residual, int64_t n, float* y);

template <class F, bool kMagnitude, bool kResidual>
static EpilogueRow epilogue_row_of(Activation activation) {
  switch (activation) {
    case Activation::none:
      return epilogue_row<F, kMagnitude, Activation::none, kResidual>;
    case Activation::relu:
      return epilogue_row<F, kMagnitude, Activation::relu, kResidual>;
    case Activation::gelu:
      return epilogue_row<F, kMagnitude, Activation::gelu, kResidual>;
    case Activation::gelu_tanh:
      return epilogue_row<F, kMagnitude, Activation::gelu_tanh, kResidual>;
  }
  return nullptr;
}

template <class F, bool kMagnitude>
static EpilogueRow epilogue_row_of(const Epilogue& epilogue) {
  return epilogue.residual == nullptr ? epilogue_row_of<F, kMagnitude, false>(epilogue.activation)
                                      : epilogue_row_of<F, kMagnitude, true>(epilogue.activation);
}

template <class F>
static void epilogue_rows(const EpilogueArgs& args) {
  if (args.epilogue.empty()) return;
  const EpilogueRow row = epilogue_row_of<F, false>(args.epilogue);
  const float* residual = args.epilogue.residual;
  for (int64_t r = 0; r < args.m; ++r) {
    float* y = args.y + r * args.ldy;
    row(y, residual == nullptr ? nullptr : residual + r * args.epilogue.ldr, args.n, y);
  }
}

}  // namespace bantamweight
