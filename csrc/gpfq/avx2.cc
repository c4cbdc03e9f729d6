// Four rows by two registers of columns at a time: the rows above the block are applied to its
// eight accumulators as in a matrix product, then the block's own triangle is solved in registers.
#include "gpfq/gpfq.h"

#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>

namespace bantamweight {
namespace {

constexpr int kRows = 4;
constexpr int kVectors = 2;
constexpr int kLanes = 8;
constexpr int64_t kWidth = kVectors * kLanes;  // a slice is taken in runs of this many columns
static_assert(kGpfqSlice % kWidth == 0, "a slice is whole runs");

struct Run {
  const GpfqPanel<float>* panel;
  int64_t problem, begin;
  __m256i mask[kVectors];
  int64_t lanes[kVectors];
};

__m256i mix(__m256i x) {
  x = _mm256_mullo_epi32(_mm256_xor_si256(x, _mm256_srli_epi32(x, 16)),
                         _mm256_set1_epi32(static_cast<int>(0x85ebca6bu)));
  x = _mm256_mullo_epi32(_mm256_xor_si256(x, _mm256_srli_epi32(x, 13)),
                         _mm256_set1_epi32(static_cast<int>(0xc2b2ae35u)));
  return _mm256_xor_si256(x, _mm256_srli_epi32(x, 16));
}

// How an argument becomes a code, and what is fed back; writes the row's codes.
__m256 quantize(const Run& run, int64_t row, int v, __m256 z) {
  const GpfqPanel<float>& p = *run.panel;
  const __m256i mask = run.mask[v];
  const int64_t column = run.begin + v * kLanes;
  const int64_t grid = (run.problem * p.groups + p.group_of_row[row]) * p.columns + column;
  const int64_t at = (run.problem * p.rows + row) * p.columns + column;
  const __m256 none = _mm256_setzero_ps();
  const __m256 sign = _mm256_set1_ps(-0.0f);
  const __m256 zero = _mm256_maskload_ps(p.zero + grid, mask);

  __m256 offset = _mm256_set1_ps(0.5f);
  if (p.rounding == GpfqRounding::stochastic) {
    const __m256i counter =
        _mm256_add_epi32(_mm256_set1_epi32(static_cast<int>(column)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    const uint32_t key = gpfq_row_key(p.seed, run.problem, p.first_row + row);
    const __m256i bits =
        mix(_mm256_add_epi32(_mm256_set1_epi32(static_cast<int>(key)),
                             _mm256_mullo_epi32(counter, _mm256_set1_epi32(static_cast<int>(kGpfqColumnStride)))));
    offset = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_srli_epi32(bits, 8)), _mm256_set1_ps(1.0f / 16777216.0f));
  }
  __m256 steps = _mm256_mul_ps(z, _mm256_maskload_ps(p.inverse_scale + grid, mask));
  const __m256 size = _mm256_andnot_ps(sign, steps);
  const __m256 threshold = _mm256_set1_ps(p.threshold);
  if (p.shrink == GpfqShrink::soft) {
    const __m256 left = _mm256_max_ps(_mm256_sub_ps(size, threshold), none);
    steps = _mm256_or_ps(left, _mm256_and_ps(steps, sign));
  } else if (p.shrink == GpfqShrink::hard) {
    steps = _mm256_and_ps(_mm256_cmp_ps(size, threshold, _CMP_GT_OQ), steps);
  }
  __m256 code = _mm256_floor_ps(_mm256_add_ps(steps, _mm256_add_ps(zero, offset)));
  // max and min give their second operand when the first is NaN.
  code = _mm256_min_ps(_mm256_max_ps(code, none), _mm256_set1_ps(static_cast<float>(p.levels - 1)));
  alignas(32) int32_t words[kLanes];
  _mm256_store_si256(reinterpret_cast<__m256i*>(words), _mm256_cvttps_epi32(code));
  for (int64_t i = 0; i < run.lanes[v]; ++i) p.codes[at + i] = static_cast<uint8_t>(words[i]);

  const __m256 q = _mm256_mul_ps(_mm256_maskload_ps(p.scale + grid, mask), _mm256_sub_ps(code, zero));
  if (p.feedback == GpfqFeedback::change) return _mm256_sub_ps(q, _mm256_maskload_ps(p.previous + at, mask));
  if (p.feedback == GpfqFeedback::error) return _mm256_sub_ps(q, z);
  return q;
}

void run_columns(const Run& run) {
  const GpfqPanel<float>& p = *run.panel;
  float* panel = p.panel + run.problem * p.rows * p.columns + run.begin;
  const float* lower = p.lower + run.problem * p.rows * p.rows;
  alignas(32) float done[kGpfqMaxRows][kWidth];  // the amounts so far; the panel's rows may share cache sets

  for (int64_t top = 0; top < p.rows; top += kRows) {
    const int64_t rows = p.rows - top < kRows ? p.rows - top : kRows;
    const float* l[kRows];
    __m256 acc[kRows][kVectors];
    for (int i = 0; i < kRows; ++i) {
      // Rows past the end repeat the last one; their results are dropped.
      const int64_t row = top + (i < rows ? i : rows - 1);
      l[i] = lower + row * p.rows;
      for (int v = 0; v < kVectors; ++v) {
        acc[i][v] = _mm256_maskload_ps(panel + row * p.columns + v * kLanes, run.mask[v]);
      }
    }
    for (int64_t k = 0; k < top; ++k) {
      const __m256 a0 = _mm256_load_ps(done[k]);
      const __m256 a1 = _mm256_load_ps(done[k] + kLanes);
      for (int i = 0; i < kRows; ++i) {
        const __m256 factor = _mm256_set1_ps(l[i][k]);
        acc[i][0] = _mm256_fnmadd_ps(factor, a0, acc[i][0]);
        acc[i][1] = _mm256_fnmadd_ps(factor, a1, acc[i][1]);
      }
    }
    for (int i = 0; i < kRows; ++i) {
      if (i >= rows) break;
      __m256 amount[kVectors];
      for (int v = 0; v < kVectors; ++v) {
        amount[v] = quantize(run, top + i, v, acc[i][v]);
        _mm256_store_ps(done[top + i] + v * kLanes, amount[v]);
        _mm256_maskstore_ps(panel + (top + i) * p.columns + v * kLanes, run.mask[v], amount[v]);
      }
      for (int below = i + 1; below < kRows; ++below) {
        const __m256 factor = _mm256_set1_ps(l[below][top + i]);
        for (int v = 0; v < kVectors; ++v) acc[below][v] = _mm256_fnmadd_ps(factor, amount[v], acc[below][v]);
      }
    }
  }
}

void run(const GpfqPanel<float>& p, int64_t problem, int64_t begin, int64_t end) {
  for (int64_t at = begin; at < end; at += kWidth) {
    Run columns = {&p, problem, at, {}, {}};
    for (int v = 0; v < kVectors; ++v) {
      const int64_t left = end - at - v * kLanes;
      columns.lanes[v] = left >= kLanes ? kLanes : left > 0 ? left : 0;
      columns.mask[v] = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(columns.lanes[v])),
                                           _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    }
    run_columns(columns);
  }
}

constexpr GpfqKernel kernel = {Isa::avx2, run};

}  // namespace

const GpfqKernel* gpfq_kernel_avx2() { return &kernel; }

}  // namespace bantamweight

#else

namespace bantamweight {

const GpfqKernel* gpfq_kernel_avx2() { return nullptr; }

}  // namespace bantamweight

#endif
