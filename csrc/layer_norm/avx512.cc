// AVX-512: three passes over a row, which stays in L1: the sum (and the residual's addition), the
// squares, the outputs.
//
// Per 32 elements: 2 loads and additions, 2 loads, subtractions and multiply-adds, and 6 loads, 2
// subtractions, 2 multiplications, 2 multiply-adds and 2 stores: about 12 cycles; two folds, a square
// root and two divisions a row, some 80 cycles, come on top.
#include "layer_norm/layer_norm.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#include "runtime/floats_avx512.h"

namespace bantamweight {
namespace {

void run(const LayerNormArgs& args) {
  const int64_t n = args.n;
  const auto size = static_cast<float>(n);
  const float *weight = args.norm.weight, *bias = args.norm.bias;
  for (int64_t r = 0; r < args.m; ++r) {
    const float* x = args.x + r * args.ldx;
    const float* residual = args.residual == nullptr ? nullptr : args.residual + r * args.ldr;
    float* y = args.y + r * args.ldy;
    __m512 sums[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    __m512 squares[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int64_t i = 0; i < n; i += 32) {
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        const int64_t at = i + 16 * j;
        const __mmask16 valid = Floats::part(n - at);
        __m512 z = _mm512_maskz_loadu_ps(valid, x + at);
        if (residual != nullptr) z = _mm512_add_ps(z, _mm512_maskz_loadu_ps(valid, residual + at));
        if (residual != nullptr || x != y) _mm512_mask_storeu_ps(y + at, valid, z);
        sums[j] = _mm512_add_ps(sums[j], z);
      }
    }
    const float mean = Floats::sum(_mm512_add_ps(sums[0], sums[1])) / size;
    const __m512 means = _mm512_set1_ps(mean);
    for (int64_t i = 0; i < n; i += 32) {
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        const __mmask16 valid = Floats::part(n - i - 16 * j);
        const __m512 d = _mm512_maskz_sub_ps(valid, _mm512_maskz_loadu_ps(valid, y + i + 16 * j), means);
        squares[j] = _mm512_fmadd_ps(d, d, squares[j]);
      }
    }
    const __m128 variance = _mm_set_ss(Floats::sum(_mm512_add_ps(squares[0], squares[1])) / size + args.norm.eps);
    const __m512 inverse = _mm512_set1_ps(1.0f / _mm_cvtss_f32(_mm_sqrt_ss(variance)));
    for (int64_t i = 0; i < n; i += 16) {
      const __mmask16 valid = Floats::part(n - i);
      const __m512 w = weight == nullptr ? _mm512_set1_ps(1.0f) : _mm512_maskz_loadu_ps(valid, weight + i);
      const __m512 b = bias == nullptr ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(valid, bias + i);
      const __m512 d = _mm512_sub_ps(_mm512_maskz_loadu_ps(valid, y + i), means);
      _mm512_mask_storeu_ps(y + i, valid, _mm512_fmadd_ps(_mm512_mul_ps(d, inverse), w, b));
    }
  }
}

constexpr LayerNormKernel kernel = {Isa::avx512, run};

}  // namespace

const LayerNormKernel* layer_norm_avx512() { return &kernel; }

}  // namespace bantamweight

#else

namespace bantamweight {
const LayerNormKernel* layer_norm_avx512() { return nullptr; }
}  // namespace bantamweight

#endif
