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

// The line that the next chunk reads here, into the second level: a chunk of every row is more than the first holds.
void fetch_ahead(const float* p) { _mm_prefetch(reinterpret_cast<const char*>(p + kVectorChunk), _MM_HINT_T1); }

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
      fetch_ahead(row);
      fetch_ahead(row + 16);
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

// kRows multiples removed from scale * x in one reading of x and writing of w.
template <int kRows>
void combine_of(const float* x, float scale, const float* const* rows, const float* coefficients, int64_t at, float* w,
                int64_t n) {
  __m512 c[kRows + 1];
  for (int r = 0; r < kRows; ++r) c[r] = _mm512_set1_ps(coefficients[r]);
  const __m512 factor = _mm512_set1_ps(scale);
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    fetch_ahead(x + i);
    __m512 sum = _mm512_mul_ps(factor, _mm512_loadu_ps(x + i));
    for (int r = 0; r < kRows; ++r) {
      const float* row = rows[r] + at + i;
      fetch_ahead(row);
      sum = _mm512_fnmadd_ps(c[r], _mm512_loadu_ps(row), sum);
    }
    _mm512_storeu_ps(w + i, sum);
  }
  if (i < n) {
    const __mmask16 m = tail_mask(n - i);
    __m512 sum = _mm512_mul_ps(factor, _mm512_maskz_loadu_ps(m, x + i));
    for (int r = 0; r < kRows; ++r) sum = _mm512_fnmadd_ps(c[r], _mm512_maskz_loadu_ps(m, rows[r] + at + i), sum);
    _mm512_mask_storeu_ps(w + i, m, sum);
  }
}

void combine(const float* x, float scale, const float* const* rows, const float* coefficients, int64_t k, int64_t at,
             float* w, int64_t n) {
  if (k == 0) return combine_of<0>(x, scale, rows, coefficients, at, w, n);
  for (int64_t r = 0; r < k;) {  // each group goes on from what the one before it left in w
    if (r + 4 <= k) {
      combine_of<4>(x, scale, rows + r, coefficients + r, at, w, n);
      r += 4;
    } else if (r + 2 <= k) {
      combine_of<2>(x, scale, rows + r, coefficients + r, at, w, n);
      r += 2;
    } else {
      combine_of<1>(x, scale, rows + r, coefficients + r, at, w, n);
      r += 1;
    }
    x = w;
    scale = 1.0f;
  }
}

void stream(const float* from, float* to, int64_t n) {
  int64_t i = 0;
  if (reinterpret_cast<uintptr_t>(to) % 64 == 0) {
    for (; i + 16 <= n; i += 16) _mm512_stream_ps(to + i, _mm512_loadu_ps(from + i));
    _mm_sfence();  // before another thread may read it
  }
  for (; i < n; i += 16) {
    const __mmask16 m = tail_mask(n - i);
    _mm512_mask_storeu_ps(to + i, m, _mm512_maskz_loadu_ps(m, from + i));
  }
}

const VectorKernel kKernel = {Isa::avx512, dots, combine, stream};

}  // namespace

const VectorKernel* vector_kernel_avx512() { return &kKernel; }

}  // namespace bantamweight
#else
namespace bantamweight {
const VectorKernel* vector_kernel_avx512() { return nullptr; }
}  // namespace bantamweight
#endif
