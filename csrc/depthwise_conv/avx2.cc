// AVX2: 8 channels and two taps at a time. The bytes of both taps are interleaved, widened to 16
// bits and multiplied and added in pairs: 5 instructions for 16 multiply-adds.
#include "depthwise_conv/depthwise_conv.h"

#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>

namespace bantamweight {
namespace {

// Pixels whose sums stay in registers while a pair's weights are loaded once.
constexpr int kRows = 4;

// (a[c], b[c]) as 16-bit pairs for 8 channels.
__m256i pair_up(const int8_t* a, const int8_t* b) {
  const __m128i first = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(a));
  const __m128i second = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(b));
  return _mm256_cvtepi8_epi16(_mm_unpacklo_epi8(first, second));
}

// Counts both taps of a pair, or only the first where the second pads an odd group.
__m256i count_taps(const TapPair& pair) {
  return _mm256_set1_epi32(pair.offset[0] == pair.offset[1] ? 0x00000001 : 0x00010001);
}

template <int rows, bool zeros>
void run_rows(const DepthwiseTask& task, int64_t row, int64_t c, int64_t lanes) {
  __m256 sum[rows];
  for (int r = 0; r < rows; ++r) sum[r] = _mm256_setzero_ps();
  int64_t p = 0;
  for (int64_t g = 0; g < task.groups; ++g) {
    __m256i dot[rows], activations[rows];
    for (int r = 0; r < rows; ++r) dot[r] = activations[r] = _mm256_setzero_si256();
    for (; p < task.pair_count && task.pairs[p].group == g; ++p) {
      const TapPair& pair = task.pairs[p];
      const __m256i weight = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(task.weight + (p * lanes + c) * 2));
      for (int r = 0; r < rows; ++r) {
        const int8_t* a = task.rows[row + r] + c;
        const __m256i taps = pair_up(a + pair.offset[0], a + pair.offset[1]);
        dot[r] = _mm256_add_epi32(dot[r], _mm256_madd_epi16(taps, weight));
        if (zeros) activations[r] = _mm256_add_epi32(activations[r], _mm256_madd_epi16(taps, count_taps(pair)));
      }
    }
    const __m256 scale = _mm256_loadu_ps(task.scale + g * lanes + c);
    for (int r = 0; r < rows; ++r) {
      sum[r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot[r]), scale, sum[r]);
      if (zeros) {
        const __m256 zero_scale = _mm256_loadu_ps(task.zero_scale + g * lanes + c);
        sum[r] = _mm256_fnmadd_ps(zero_scale, _mm256_cvtepi32_ps(activations[r]), sum[r]);
      }
    }
  }
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const int64_t left = task.channels - c;
  const __m256i valid = _mm256_cmpgt_epi32(_mm256_set1_epi32(left > 8 ? 8 : static_cast<int>(left)), lane);
  const __m256 bias = task.bias == nullptr ? _mm256_setzero_ps() : _mm256_maskload_ps(task.bias + c, valid);
  for (int r = 0; r < rows; ++r) {
    const __m256 y = _mm256_fmadd_ps(sum[r], _mm256_set1_ps(task.row_scale[row + r]), bias);
    _mm256_maskstore_ps(task.y + (row + r) * task.ldy + c, valid, y);
  }
}

template <bool zeros>
void run_all(const DepthwiseTask& task) {
  const int64_t lanes = depthwise_lanes(task.channels);
  int64_t row = 0;
  for (; row + kRows <= task.row_count; row += kRows) {
    for (int64_t c = 0; c < task.channels; c += 8) run_rows<kRows, zeros>(task, row, c, lanes);
  }
  for (; row < task.row_count; ++row) {
    for (int64_t c = 0; c < task.channels; c += 8) run_rows<1, zeros>(task, row, c, lanes);
  }
}

void run(const DepthwiseTask& task) {
  if (task.zero_scale != nullptr) {
    run_all<true>(task);
  } else {
    run_all<false>(task);
  }
}

constexpr DepthwiseKernel kernel = {Isa::avx2, run};

}  // namespace

const DepthwiseKernel* depthwise_avx2() { return &kernel; }

}  // namespace bantamweight

#else
namespace bantamweight {
const DepthwiseKernel* depthwise_avx2() { return nullptr; }
}  // namespace bantamweight
#endif
