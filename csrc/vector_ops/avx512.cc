#include "vector_ops/vector_ops.h"

#if defined(__AVX512F__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#include <immintrin.h>

namespace bantamweight {
namespace {

// The 32 lanes of a sum are two registers; tails are read as zeros.
__mmask16 tail_mask(int64_t left) {
  return left >= 16  ? static_cast<__mmask16>(0xffff)
         : left <= 0 ? static_cast<__mmask16>(0)
                     : static_cast<__mmask16>((1u << left) - 1);
}

float fold(__m512 low, __m512 high) {
  const __m512 sixteen = _mm512_add_ps(low, high);
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(sixteen), _mm512_extractf32x8_ps(sixteen, 1));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

// kRows dot products against one reading of w.
template <int kRows>
void dots_of(const float* const* rows, int64_t at, const float* w, int64_t n, float* sums) {
  __m512 low[kRows], high[kRows];
  for (int r = 0; r < kRows; ++r) low[r] = high[r] = _mm512_setzero_ps();
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    const __m512 w0 = _mm512_loadu_ps(w + i), w1 = _mm512_loadu_ps(w + i + 16);
    for (int r = 0; r < kRows; ++r) {
      const float* row = rows[r] + at + i;
      low[r] = _mm512_fmadd_ps(_mm512_loadu_ps(row), w0, low[r]);
      high[r] = _mm512_fmadd_ps(_mm512_loadu_ps(row + 16), w1, high[r]);
    }
  }
  if (i < n) {
    const __mmask16 m0 = tail_mask(n - i), m1 = tail_mask(n - i - 16);
    const __m512 w0 = _mm512_maskz_loadu_ps(m0, w + i), w1 = _mm512_maskz_loadu_ps(m1, w + i + 16);
    for (int r = 0; r < kRows; ++r) {
      const float* row = rows[r] + at + i;
      low[r] = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(m0, row), w0, low[r]);
      high[r] = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(m1, row + 16), w1, high[r]);
    }
  }
  for (int r = 0; r < kRows; ++r) sums[r] = fold(low[r], high[r]);
}

void dots(const float* const* rows, int64_t k, int64_t at, const float* w, int64_t n, float* sums) {
  int64_t r = 0;
  for (; r + 8 <= k; r += 8) dots_of<8>(rows + r, at, w, n, sums + r);
  for (; r + 4 <= k; r += 4) dots_of<4>(rows + r, at, w, n, sums + r);
  for (; r < k; ++r) dots_of<1>(rows + r, at, w, n, sums + r);
}

// kRows multiples removed in one reading and writing of w.
template <int kRows>
void subtract_of(const float* const* rows, const float* coefficients, int64_t at, float* w, int64_t n) {
  __m512 c[kRows];
  for (int r = 0; r < kRows; ++r) c[r] = _mm512_set1_ps(coefficients[r]);
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    __m512 sum = _mm512_loadu_ps(w + i);
    for (int r = 0; r < kRows; ++r) sum = _mm512_fnmadd_ps(c[r], _mm512_loadu_ps(rows[r] + at + i), sum);
    _mm512_storeu_ps(w + i, sum);
  }
  if (i < n) {
    const __mmask16 m = tail_mask(n - i);
    __m512 sum = _mm512_maskz_loadu_ps(m, w + i);
    for (int r = 0; r < kRows; ++r) sum = _mm512_fnmadd_ps(c[r], _mm512_maskz_loadu_ps(m, rows[r] + at + i), sum);
    _mm512_mask_storeu_ps(w + i, m, sum);
  }
}

void subtract(const float* const* rows, const float* coefficients, int64_t k, int64_t at, float* w, int64_t n) {
  int64_t r = 0;
  for (; r + 8 <= k; r += 8) subtract_of<8>(rows + r, coefficients + r, at, w, n);
  for (; r + 4 <= k; r += 4) subtract_of<4>(rows + r, coefficients + r, at, w, n);
  for (; r < k; ++r) subtract_of<1>(rows + r, coefficients + r, at, w, n);
}

void axpy(float a, const float* x, float* y, int64_t n) {
  const __m512 factor = _mm512_set1_ps(a);
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 m = tail_mask(n - i);
    const __m512 sum = _mm512_fmadd_ps(factor, _mm512_maskz_loadu_ps(m, x + i), _mm512_maskz_loadu_ps(m, y + i));
    _mm512_mask_storeu_ps(y + i, m, sum);
  }
}

void scale(float a, const float* x, float* y, int64_t n) {
  const __m512 factor = _mm512_set1_ps(a);
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 m = tail_mask(n - i);
    _mm512_mask_storeu_ps(y + i, m, _mm512_mul_ps(factor, _mm512_maskz_loadu_ps(m, x + i)));
  }
}

const VectorKernel kKernel = {Isa::avx512, dots, subtract, axpy, scale};

}  // namespace

const VectorKernel* vector_kernel_avx512() { return &kKernel; }

}  // namespace bantamweight
#else
namespace bantamweight {
const VectorKernel* vector_kernel_avx512() { return nullptr; }
}  // namespace bantamweight
#endif
