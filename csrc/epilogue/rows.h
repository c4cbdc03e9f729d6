// The epilogue over any vectors (runtime/floats_*.h). Everything is static: each file that includes it
// keeps a copy with its own flags.
#pragma once

#include "epilogue/epilogue.h"

namespace bantamweight {

template <class F, int kDegree>
static inline typename F::Vector gelu(typename F::Vector y, const float* coefficients, float end) {
  const auto a = F::smaller(F::absolute(y), F::all(end));
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

template <class F, Activation kActivation, bool kResidual>
static void epilogue_rows_as(const EpilogueArgs& args) {
  constexpr int64_t kLanes = F::kLanes, kStep = 4 * kLanes;
  const auto finish = [](typename F::Vector y, typename F::Vector add) __attribute__((always_inline)) {
    const auto out = activate<F, kActivation>(y);
    return kResidual ? F::add(out, add) : out;
  };
  for (int64_t r = 0; r < args.m; ++r) {
    float* y = args.y + r * args.ldy;
    const float* residual = kResidual ? args.epilogue.residual + r * args.epilogue.ldr : y;
    int64_t i = 0;
    for (; i + kStep <= args.n; i += kStep) {
#pragma GCC unroll 4
      for (int64_t j = i; j < i + kStep; j += kLanes) F::store(y + j, finish(F::load(y + j), F::load(residual + j)));
    }
    for (; i + kLanes <= args.n; i += kLanes) F::store(y + i, finish(F::load(y + i), F::load(residual + i)));
    if (const int64_t left = args.n - i; left > 0) {
      F::store_part(y + i, finish(F::load_part(y + i, left), F::load_part(residual + i, left)), left);
    }
  }
}

template <class F, Activation kActivation>
static void epilogue_rows_activated(const EpilogueArgs& args) {
  if (args.epilogue.residual != nullptr)
    epilogue_rows_as<F, kActivation, true>(args);
  else
    epilogue_rows_as<F, kActivation, false>(args);
}

template <class F>
static void epilogue_rows(const EpilogueArgs& args) {
  switch (args.epilogue.activation) {
    case Activation::none:
      if (args.epilogue.residual != nullptr) epilogue_rows_as<F, Activation::none, true>(args);
      return;
    case Activation::relu:
      return epilogue_rows_activated<F, Activation::relu>(args);
    case Activation::gelu:
      return epilogue_rows_activated<F, Activation::gelu>(args);
    case Activation::gelu_tanh:
      return epilogue_rows_activated<F, Activation::gelu_tanh>(args);
  }
}

}  // namespace bantamweight
