// AVX2: 8 elements a vector; the operations of avx512.cc, 14 on ports 0, 1 and 5 a vector of GELU.
#include "epilogue/epilogue.h"

#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>

namespace bantamweight {
namespace {

template <int kDegree>
inline __m256 gelu(__m256 y, const float* coefficients, float end) {
  const __m256 a = _mm256_min_ps(_mm256_andnot_ps(_mm256_set1_ps(-0.0f), y), _mm256_set1_ps(end));
  __m256 p = _mm256_set1_ps(coefficients[kDegree]);
#pragma GCC unroll 8
  for (int i = kDegree - 1; i >= 0; --i) p = _mm256_fmadd_ps(p, a, _mm256_set1_ps(coefficients[i]));
  const __m256 p2 = _mm256_mul_ps(p, p), p4 = _mm256_mul_ps(p2, p2);
  return _mm256_fnmadd_ps(_mm256_mul_ps(p4, p4), a, _mm256_max_ps(y, _mm256_setzero_ps()));
}

template <Activation kActivation>
inline __m256 activate(__m256 y) {
  if constexpr (kActivation == Activation::relu) return _mm256_max_ps(y, _mm256_setzero_ps());
  if constexpr (kActivation == Activation::gelu) return gelu<kGeluDegree>(y, kGelu, kGeluEnd);
  if constexpr (kActivation == Activation::gelu_tanh) return gelu<kGeluTanhDegree>(y, kGeluTanh, kGeluTanhEnd);
  return y;
}

template <Activation kActivation, bool kResidual>
void run_as(const EpilogueArgs& args) {
  for (int64_t r = 0; r < args.m; ++r) {
    float* y = args.y + r * args.ldy;
    const float* residual = kResidual ? args.epilogue.residual + r * args.epilogue.ldr : y;
    const auto step = [](float* to, const float* add) __attribute__((always_inline)) {
      __m256 out = activate<kActivation>(_mm256_loadu_ps(to));
      if constexpr (kResidual) out = _mm256_add_ps(out, _mm256_loadu_ps(add));
      _mm256_storeu_ps(to, out);
    };
    int64_t i = 0;
    for (; i + 32 <= args.n; i += 32) {
#pragma GCC unroll 4
      for (int64_t j = 0; j < 32; j += 8) step(y + i + j, residual + i + j);
    }
    for (; i + 8 <= args.n; i += 8) step(y + i, residual + i);
    if (i < args.n) {
      float tail[8] = {}, tail_residual[8] = {};
      for (int64_t j = i; j < args.n; ++j) {
        tail[j - i] = y[j];
        tail_residual[j - i] = residual[j];
      }
      step(tail, tail_residual);
      for (int64_t j = i; j < args.n; ++j) y[j] = tail[j - i];
    }
  }
}

template <Activation kActivation>
void run_activation(const EpilogueArgs& args) {
  if (args.epilogue.residual != nullptr)
    run_as<kActivation, true>(args);
  else
    run_as<kActivation, false>(args);
}

void run(const EpilogueArgs& args) {
  switch (args.epilogue.activation) {
    case Activation::none:
      if (args.epilogue.residual != nullptr) run_as<Activation::none, true>(args);
      return;
    case Activation::relu:
      return run_activation<Activation::relu>(args);
    case Activation::gelu:
      return run_activation<Activation::gelu>(args);
    case Activation::gelu_tanh:
      return run_activation<Activation::gelu_tanh>(args);
  }
}

constexpr EpilogueKernel kernel = {Isa::avx2, run};

}  // namespace

const EpilogueKernel* epilogue_avx2() { return &kernel; }

}  // namespace bantamweight

#else

namespace bantamweight {
const EpilogueKernel* epilogue_avx2() { return nullptr; }
}  // namespace bantamweight

#endif
