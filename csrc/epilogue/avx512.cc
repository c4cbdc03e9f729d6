// AVX-512: 16 elements a vector, the tail under a mask.
//
// GELU, per vector: 1 load, and, min, 7 fused multiply-adds (8 for tanh), 3 multiplications, max, 1
// fused multiply-add, 1 store: 14 operations on ports 0 and 5, 7 cycles, as long as several vectors
// are in flight (the chain of one is 45 cycles).
#include "epilogue/epilogue.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#include <immintrin.h>

namespace bantamweight {
namespace {

template <int kDegree>
inline __m512 gelu(__m512 y, const float* coefficients, float end) {
  const __m512 a = _mm512_min_ps(_mm512_abs_ps(y), _mm512_set1_ps(end));
  __m512 p = _mm512_set1_ps(coefficients[kDegree]);
#pragma GCC unroll 8
  for (int i = kDegree - 1; i >= 0; --i) p = _mm512_fmadd_ps(p, a, _mm512_set1_ps(coefficients[i]));
  const __m512 p2 = _mm512_mul_ps(p, p), p4 = _mm512_mul_ps(p2, p2);
  return _mm512_fnmadd_ps(_mm512_mul_ps(p4, p4), a, _mm512_max_ps(y, _mm512_setzero_ps()));
}

template <Activation kActivation>
inline __m512 activate(__m512 y) {
  if constexpr (kActivation == Activation::relu) return _mm512_max_ps(y, _mm512_setzero_ps());
  if constexpr (kActivation == Activation::gelu) return gelu<kGeluDegree>(y, kGelu, kGeluEnd);
  if constexpr (kActivation == Activation::gelu_tanh) return gelu<kGeluTanhDegree>(y, kGeluTanh, kGeluTanhEnd);
  return y;
}

template <Activation kActivation, bool kResidual>
void run_as(const EpilogueArgs& args) {
  for (int64_t r = 0; r < args.m; ++r) {
    float* y = args.y + r * args.ldy;
    const float* residual = kResidual ? args.epilogue.residual + r * args.epilogue.ldr : y;
    const auto step = [&](int64_t i, __mmask16 valid) __attribute__((always_inline)) {
      __m512 out = activate<kActivation>(_mm512_maskz_loadu_ps(valid, y + i));
      if constexpr (kResidual) out = _mm512_add_ps(out, _mm512_maskz_loadu_ps(valid, residual + i));
      _mm512_mask_storeu_ps(y + i, valid, out);
    };
    int64_t i = 0;
    for (; i + 64 <= args.n; i += 64) {
#pragma GCC unroll 4
      for (int64_t j = 0; j < 64; j += 16) step(i + j, 0xffff);
    }
    for (; i < args.n; i += 16) {
      step(i, args.n - i >= 16 ? 0xffff : static_cast<__mmask16>((1u << (args.n - i)) - 1));
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

constexpr EpilogueKernel kernel = {Isa::avx512, run};

}  // namespace

const EpilogueKernel* epilogue_avx512() { return &kernel; }

}  // namespace bantamweight

#else

namespace bantamweight {
const EpilogueKernel* epilogue_avx512() { return nullptr; }
}  // namespace bantamweight

#endif
