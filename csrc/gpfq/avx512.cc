// Eight rows by two registers of columns at a time: the rows above the block are applied to its 16
// accumulators as in a matrix product, then the block's own triangle is solved in registers.
#include "gpfq/gpfq.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__)
#include <immintrin.h>

namespace bantamweight {
namespace {

constexpr int kRows = 8;
constexpr int kVectors = 2;
constexpr int kLanes = 16;
static_assert(kVectors * kLanes == kGpfqSlice, "one task is one slice");

struct Slice {
  const GpfqPanel<float>* panel;
  int64_t problem, begin;
  __mmask16 mask[kVectors];
};

// How an argument becomes a code, and what is fed back; writes the row's codes.
__m512 quantize(const Slice& slice, int64_t row, int v, __m512 z) {
  const GpfqPanel<float>& p = *slice.panel;
  const __mmask16 mask = slice.mask[v];
  const int64_t column = slice.begin + v * kLanes;
  const int64_t grid = (slice.problem * p.groups + p.group_of_row[row]) * p.columns + column;
  const int64_t at = (slice.problem * p.rows + row) * p.columns + column;
  const __m512 none = _mm512_setzero_ps();
  const __m512 zero = _mm512_maskz_loadu_ps(mask, p.zero + grid);

  __m512 offset = _mm512_set1_ps(0.5f);
  if (p.rounding == GpfqRounding::stochastic) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i counter = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(column)), lane);
    const uint32_t key = gpfq_row_key(p.seed, slice.problem, p.first_row + row);
    __m512i x = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(key)),
                                 _mm512_mullo_epi32(counter, _mm512_set1_epi32(static_cast<int>(kGpfqColumnStride))));
    x = _mm512_mullo_epi32(_mm512_xor_si512(x, _mm512_srli_epi32(x, 16)),
                           _mm512_set1_epi32(static_cast<int>(0x85ebca6bu)));
    x = _mm512_mullo_epi32(_mm512_xor_si512(x, _mm512_srli_epi32(x, 13)),
                           _mm512_set1_epi32(static_cast<int>(0xc2b2ae35u)));
    x = _mm512_xor_si512(x, _mm512_srli_epi32(x, 16));
    offset = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_srli_epi32(x, 8)), _mm512_set1_ps(1.0f / 16777216.0f));
  }
  __m512 steps = _mm512_mul_ps(z, _mm512_maskz_loadu_ps(mask, p.inverse_scale + grid));
  const __m512 threshold = _mm512_set1_ps(p.threshold);
  if (p.shrink == GpfqShrink::soft) {
    const __m512 left = _mm512_max_ps(_mm512_sub_ps(_mm512_abs_ps(steps), threshold), none);
    steps = _mm512_or_ps(left, _mm512_and_ps(steps, _mm512_set1_ps(-0.0f)));
  } else if (p.shrink == GpfqShrink::hard) {
    steps = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(_mm512_abs_ps(steps), threshold, _CMP_GT_OQ), steps);
  }
  __m512 code = _mm512_roundscale_ps(_mm512_add_ps(steps, _mm512_add_ps(zero, offset)),
                                     _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  // max and min give their second operand when the first is NaN.
  code = _mm512_min_ps(_mm512_max_ps(code, none), _mm512_set1_ps(static_cast<float>(p.levels - 1)));
  _mm512_mask_cvtepi32_storeu_epi8(p.codes + at, mask, _mm512_cvttps_epi32(code));

  const __m512 q = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, p.scale + grid), _mm512_sub_ps(code, zero));
  if (p.feedback == GpfqFeedback::change) return _mm512_sub_ps(q, _mm512_maskz_loadu_ps(mask, p.previous + at));
  if (p.feedback == GpfqFeedback::error) return _mm512_sub_ps(q, z);
  return q;
}

void run(const GpfqPanel<float>& p, int64_t problem, int64_t begin, int64_t end) {
  Slice slice = {&p, problem, begin, {}};
  for (int v = 0; v < kVectors; ++v) {
    const int64_t left = end - begin - v * kLanes;
    slice.mask[v] = left >= kLanes ? 0xffff : left > 0 ? static_cast<__mmask16>((1u << left) - 1) : 0;
  }
  float* panel = p.panel + problem * p.rows * p.columns + begin;
  const float* lower = p.lower + problem * p.rows * p.rows;
  alignas(64) float done[kGpfqMaxRows][kGpfqSlice];  // the amounts so far; the panel's rows may share cache sets

  for (int64_t top = 0; top < p.rows; top += kRows) {
    const int64_t rows = p.rows - top < kRows ? p.rows - top : kRows;
    const float* l[kRows];
    __m512 acc[kRows][kVectors];
    for (int i = 0; i < kRows; ++i) {
      // Rows past the end repeat the last one; their results are dropped.
      const int64_t row = top + (i < rows ? i : rows - 1);
      l[i] = lower + row * p.rows;
      for (int v = 0; v < kVectors; ++v) {
        acc[i][v] = _mm512_maskz_loadu_ps(slice.mask[v], panel + row * p.columns + v * kLanes);
      }
    }
    for (int64_t k = 0; k < top; ++k) {
      const __m512 a0 = _mm512_load_ps(done[k]);
      const __m512 a1 = _mm512_load_ps(done[k] + kLanes);
      for (int i = 0; i < kRows; ++i) {
        const __m512 factor = _mm512_set1_ps(l[i][k]);
        acc[i][0] = _mm512_fnmadd_ps(factor, a0, acc[i][0]);
        acc[i][1] = _mm512_fnmadd_ps(factor, a1, acc[i][1]);
      }
    }
    for (int i = 0; i < kRows; ++i) {
      if (i >= rows) break;
      __m512 amount[kVectors];
      for (int v = 0; v < kVectors; ++v) {
        amount[v] = quantize(slice, top + i, v, acc[i][v]);
        _mm512_store_ps(done[top + i] + v * kLanes, amount[v]);
        _mm512_mask_storeu_ps(panel + (top + i) * p.columns + v * kLanes, slice.mask[v], amount[v]);
      }
      for (int below = i + 1; below < kRows; ++below) {
        const __m512 factor = _mm512_set1_ps(l[below][top + i]);
        for (int v = 0; v < kVectors; ++v) acc[below][v] = _mm512_fnmadd_ps(factor, amount[v], acc[below][v]);
      }
    }
  }
}

constexpr GpfqKernel kernel = {Isa::avx512, run};

}  // namespace

const GpfqKernel* gpfq_kernel_avx512() { return &kernel; }

}  // namespace bantamweight

#else

namespace bantamweight {

const GpfqKernel* gpfq_kernel_avx512() { return nullptr; }

}  // namespace bantamweight

#endif
