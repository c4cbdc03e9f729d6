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
static inline float epilogue_row(const float* x, const float* residual, int64_t n, float* y) {
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
  for (; i + kLanes <= n; i += kLanes) {
    const auto out = finish(F::load(x + i), F::load(residual + i));
    F::store(y + i, out);
    if constexpr (kMagnitude) largest[0] = F::larger_magnitude(largest[0], out);
  }
  if (i < n) {
    const auto part = F::part(n - i);
    const auto out = finish(F::load(x + i, part), F::load(residual + i, part));
    F::store(y + i, out, part);
    if constexpr (kMagnitude) largest[1] = F::larger_magnitude(largest[1], out);
  }
  if constexpr (!kMagnitude) return 0.0f;
  for (int64_t j = 1; j < kUnroll; ++j) largest[0] = F::larger_magnitude(largest[0], largest[j]);
  return F::largest_lane(largest[0]);
}

template <Activation kActivation, bool kResidual>
struct EpilogueKind {
  static constexpr Activation activation = kActivation;
  static constexpr bool residual = kResidual;
};

// use(EpilogueKind of the epilogue)
template <class Use>
static inline auto with_epilogue_kind(const Epilogue& epilogue, const Use& use) {
  const bool residual = epilogue.residual != nullptr;
  switch (epilogue.activation) {
    case Activation::relu:
      return residual ? use(EpilogueKind<Activation::relu, true>()) : use(EpilogueKind<Activation::relu, false>());
    case Activation::gelu:
      return residual ? use(EpilogueKind<Activation::gelu, true>()) : use(EpilogueKind<Activation::gelu, false>());
    case Activation::gelu_tanh:
      return residual ? use(EpilogueKind<Activation::gelu_tanh, true>())
                      : use(EpilogueKind<Activation::gelu_tanh, false>());
    default:
      return residual ? use(EpilogueKind<Activation::none, true>()) : use(EpilogueKind<Activation::none, false>());
  }
}

// The row's function where there is work between rows; it returns the largest magnitude.
using EpilogueRow = float (*)(const float* x, const float* residual, int64_t n, float* y);

template <class F>
static EpilogueRow epilogue_row_of(const Epilogue& epilogue) {
  return with_epilogue_kind(epilogue, [](auto kind) -> EpilogueRow {
    return epilogue_row<F, true, decltype(kind)::activation, decltype(kind)::residual>;
  });
}

// Rows are as short as 16 channels of a pixel, so the row's code stands in the loop: a call for each took a sixth of
// ResNet-20's time.
template <class F>
static void epilogue_rows(const EpilogueArgs& args) {
  if (args.epilogue.empty()) return;
  with_epilogue_kind(args.epilogue, [&args](auto kind) {
    const float* residual = args.epilogue.residual;
    for (int64_t r = 0; r < args.m; ++r) {
      float* y = args.y + r * args.ldy;
      const float* added = decltype(kind)::residual ? residual + r * args.epilogue.ldr : nullptr;
      epilogue_row<F, false, decltype(kind)::activation, decltype(kind)::residual>(y, added, args.n, y);
    }
  });
}

}  // namespace bantamweight
