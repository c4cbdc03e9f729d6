#include "vector_ops/vector_ops.h"

#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>

namespace bantamweight {
namespace {

// The 32 lanes of a sum are four registers.
constexpr int kRegisters = 4;

// The line that the next chunk reads here, into the second level: a chunk of every row is more than the first holds.
void fetch_ahead(const float* p) { _mm_prefetch(reinterpret_cast<const char*>(p + kVectorChunk), _MM_HINT_T1); }

// The last, incomplete 32 elements, followed by zeros.
void read_tail(const float* from, int64_t count, float* to) {
  for (int64_t i = 0; i < 8 * kRegisters; ++i) to[i] = i < count ? from[i] : 0.0f;
}

float fold(const __m256* lanes) {
  // 32 lanes to 16 to 8: lane i meets i + 16, then i + 8.
  const __m256 eight = _mm256_add_ps(_mm256_add_ps(lanes[0], lanes[2]), _mm256_add_ps(lanes[1], lanes[3]));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

// kRows dot products against one reading of w.
template <int kRows>
void dots_of(const float* const* rows, int64_t at, const float* w, int64_t n, float* sums) {
  __m256 lanes[kRows][kRegisters];
  for (int r = 0; r < kRows; ++r) {
    for (int j = 0; j < kRegisters; ++j) lanes[r][j] = _mm256_setzero_ps();
  }
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    for (int j = 0; j < kRegisters; ++j) {
      const __m256 wj = _mm256_loadu_ps(w + i + 8 * j);
      for (int r = 0; r < kRows; ++r) {
        const float* row = rows[r] + at + i + 8 * j;
        if (j % 2 == 0) fetch_ahead(row);  // two registers are a line
        lanes[r][j] = _mm256_fmadd_ps(_mm256_loadu_ps(row), wj, lanes[r][j]);
      }
    }
  }
  if (i < n) {
    float w_tail[32], row_tail[32];
    read_tail(w + i, n - i, w_tail);
    for (int r = 0; r < kRows; ++r) {
      read_tail(rows[r] + at + i, n - i, row_tail);
      for (int j = 0; j < kRegisters; ++j) {
        lanes[r][j] = _mm256_fmadd_ps(_mm256_loadu_ps(row_tail + 8 * j), _mm256_loadu_ps(w_tail + 8 * j), lanes[r][j]);
      }
    }
  }
  for (int r = 0; r < kRows; ++r) sums[r] = fold(lanes[r]);
}

void dots(const float* const* rows, int64_t k, int64_t at, const float* w, int64_t n, float* sums) {
  int64_t r = 0;
  for (; r + 2 <= k; r += 2) dots_of<2>(rows + r, at, w, n, sums + r);
  for (; r < k; ++r) dots_of<1>(rows + r, at, w, n, sums + r);
}

__m256i tail_mask(int64_t left) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(left)), lane);
}

// kRows multiples removed from scale * x in one reading of x and writing of w.
template <int kRows>
void combine_of(const float* x, float scale, const float* const* rows, const float* coefficients, int64_t at, float* w,
                int64_t n) {
  __m256 c[kRows + 1];
  for (int r = 0; r < kRows; ++r) c[r] = _mm256_set1_ps(coefficients[r]);
  const __m256 factor = _mm256_set1_ps(scale);
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    fetch_ahead(x + i);
    __m256 sum = _mm256_mul_ps(factor, _mm256_loadu_ps(x + i));
    for (int r = 0; r < kRows; ++r) {
      const float* row = rows[r] + at + i;
      fetch_ahead(row);
      sum = _mm256_fnmadd_ps(c[r], _mm256_loadu_ps(row), sum);
    }
    _mm256_storeu_ps(w + i, sum);
  }
  if (i < n) {
    const __m256i m = tail_mask(n - i);
    __m256 sum = _mm256_mul_ps(factor, _mm256_maskload_ps(x + i, m));
    for (int r = 0; r < kRows; ++r) sum = _mm256_fnmadd_ps(c[r], _mm256_maskload_ps(rows[r] + at + i, m), sum);
    _mm256_maskstore_ps(w + i, m, sum);
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
  if (reinterpret_cast<uintptr_t>(to) % 32 == 0) {
    for (; i + 8 <= n; i += 8) _mm256_stream_ps(to + i, _mm256_loadu_ps(from + i));
    _mm_sfence();  // before another thread may read it
  }
  for (; i < n; ++i) to[i] = from[i];
}

const VectorKernel kKernel = {Isa::avx2, dots, combine, stream};

}  // namespace

const VectorKernel* vector_kernel_avx2() { return &kKernel; }

}  // namespace bantamweight
#else
namespace bantamweight {
const VectorKernel* vector_kernel_avx2() { return nullptr; }
}  // namespace bantamweight
#endif
