// AVX-512: 16 channels and two taps at a time. The bytes of both taps are interleaved, widened to
// 16 bits and multiplied and added in pairs: 6 instructions for 32 multiply-adds.
#include "depthwise_conv/depthwise_conv.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#include <immintrin.h>

namespace bantamweight {
namespace {

// Pixels whose sums stay in registers while a pair's weights are loaded once.
constexpr int kRows = 8;

// (a[c], b[c]) as 16-bit pairs for 16 channels.
__m512i pair_up(const int8_t* a, const int8_t* b) {
  const __m128i first = _mm_loadu_si128(reinterpret_cast<const __m128i*>(a));
  const __m128i second = _mm_loadu_si128(reinterpret_cast<const __m128i*>(b));
  const __m256i low = _mm256_castsi128_si256(_mm_unpacklo_epi8(first, second));
  return _mm512_cvtepi8_epi16(_mm256_inserti128_si256(low, _mm_unpackhi_epi8(first, second), 1));
}

// Counts both taps of a pair, or only the first where the second pads an odd group.
__m512i count_taps(const TapPair& pair) {
  return _mm512_set1_epi32(pair.offset[0] == pair.offset[1] ? 0x00000001 : 0x00010001);
}

template <int rows, bool zeros>
void run_rows(const DepthwiseTask& task, int64_t row, int64_t c, int64_t lanes, __mmask16 valid) {
  __m512 sum[rows];
  for (int r = 0; r < rows; ++r) sum[r] = _mm512_setzero_ps();
  int64_t p = 0;
  for (int64_t g = 0; g < task.groups; ++g) {
    __m512i dot[rows], activations[rows];
    for (int r = 0; r < rows; ++r) dot[r] = activations[r] = _mm512_setzero_si512();
    for (; p < task.pair_count && task.pairs[p].group == g; ++p) {
      const TapPair& pair = task.pairs[p];
      const __m512i weight = _mm512_loadu_si512(task.weight + (p * lanes + c) * 2);
      for (int r = 0; r < rows; ++r) {
        const int8_t* a = task.rows[row + r] + c;
        const __m512i taps = pair_up(a + pair.offset[0], a + pair.offset[1]);
        dot[r] = _mm512_add_epi32(dot[r], _mm512_madd_epi16(taps, weight));
        if (zeros) activations[r] = _mm512_add_epi32(activations[r], _mm512_madd_epi16(taps, count_taps(pair)));
      }
    }
    const __m512 scale = _mm512_loadu_ps(task.scale + g * lanes + c);
    for (int r = 0; r < rows; ++r) {
      sum[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[r]), scale, sum[r]);
      if (zeros) {
        const __m512 zero_scale = _mm512_loadu_ps(task.zero_scale + g * lanes + c);
        sum[r] = _mm512_fnmadd_ps(zero_scale, _mm512_cvtepi32_ps(activations[r]), sum[r]);
      }
    }
  }
  const __m512 bias = task.bias == nullptr ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(valid, task.bias + c);
  for (int r = 0; r < rows; ++r) {
    const __m512 y = _mm512_fmadd_ps(sum[r], _mm512_set1_ps(task.row_scale[row + r]), bias);
    _mm512_mask_storeu_ps(task.y + (row + r) * task.ldy + c, valid, y);
  }
}

template <bool zeros>
void run_all(const DepthwiseTask& task) {
  const int64_t lanes = depthwise_lanes(task.channels);
  int64_t row = 0;
  for (; row + kRows <= task.row_count; row += kRows) {
    for (int64_t c = 0; c < lanes; c += 16) {
      const int64_t left = task.channels - c;
      run_rows<kRows, zeros>(task, row, c, lanes, left >= 16 ? 0xffff : static_cast<__mmask16>((1u << left) - 1));
    }
  }
  for (; row < task.row_count; ++row) {
    for (int64_t c = 0; c < lanes; c += 16) {
      const int64_t left = task.channels - c;
      run_rows<1, zeros>(task, row, c, lanes, left >= 16 ? 0xffff : static_cast<__mmask16>((1u << left) - 1));
    }
  }
}

void run(const DepthwiseTask& task) {
  if (task.zero_scale != nullptr) {
    run_all<true>(task);
  } else {
    run_all<false>(task);
  }
}

constexpr DepthwiseKernel kernel = {Isa::avx512, run};

}  // namespace

const DepthwiseKernel* depthwise_avx512() { return &kernel; }

}  // namespace bantamweight

#else
namespace bantamweight {
const DepthwiseKernel* depthwise_avx512() { return nullptr; }
}  // namespace bantamweight
#endif
