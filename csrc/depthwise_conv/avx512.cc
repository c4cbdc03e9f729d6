// AVX-512: 32 channels and two taps at a time. Both taps are widened to 16 bits, interleaved, and
// multiplied and added in pairs: 8 instructions for 64 multiply-adds, of which the 4 that move bytes
// share one port and bound it. (Interleaving bytes before widening took 8 of those.) Weights of up to
// 4 bits have sums of 16 bits, for which a widening, a multiplication and an addition do 32.
#include "depthwise_conv/depthwise_conv.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#include <immintrin.h>

namespace bantamweight {
namespace {

// Pixels whose sums stay in registers while a pair's weights are loaded once.
constexpr int kRows = 4, kRowsInt16 = 8;

struct Halves {
  __m512i low, high;
};

// (a[c], b[c]) as 16-bit pairs for 32 channels. `low` holds the first four of every eight channels.
Halves pair_up(const int8_t* a, const int8_t* b) {
  const __m512i first = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(a)));
  const __m512i second = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(b)));
  return {_mm512_unpacklo_epi16(first, second), _mm512_unpackhi_epi16(first, second)};
}

// 32 dwords in the order of channels to halves as above, and back.
Halves split(__m512i front, __m512i back) {
  const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
  return {_mm512_permutex2var_epi32(front, low, back),
          _mm512_permutex2var_epi32(front, _mm512_add_epi32(low, _mm512_set1_epi32(4)), back)};
}

Halves join(Halves halves) {
  const __m512i front = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  return {_mm512_permutex2var_epi32(halves.low, front, halves.high),
          _mm512_permutex2var_epi32(halves.low, _mm512_add_epi32(front, _mm512_set1_epi32(8)), halves.high)};
}

// Counts both taps of a pair, or only the first where the second pads an odd group.
__m512i count_taps(const TapPair& pair) {
  return _mm512_set1_epi32(pair.offset[0] == pair.offset[1] ? 0x00000001 : 0x00010001);
}

inline void multiply_add(Halves* sum, Halves taps, Halves weight) {
  sum->low = _mm512_add_epi32(sum->low, _mm512_madd_epi16(taps.low, weight.low));
  sum->high = _mm512_add_epi32(sum->high, _mm512_madd_epi16(taps.high, weight.high));
}

__mmask16 first_lanes(int64_t count) {
  return count >= 16 ? 0xffff : count <= 0 ? 0 : static_cast<__mmask16>((1u << count) - 1);
}

// y = sum * row_scale + bias for 32 channels.
template <int rows>
void write(const DepthwiseTask& task, int64_t row, int64_t c, const __m512 (*sum)[2]) {
  for (int half = 0; half < 2; ++half) {
    const int64_t first = c + 16 * half;
    const __mmask16 valid = first_lanes(task.channels - first);
    const __m512 bias = task.bias == nullptr ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(valid, task.bias + first);
    for (int r = 0; r < rows; ++r) {
      const __m512 y = _mm512_fmadd_ps(sum[r][half], _mm512_set1_ps(task.row_scale[row + r]), bias);
      _mm512_mask_storeu_ps(task.y + (row + r) * task.ldy + first, valid, y);
    }
  }
}

template <int rows, bool zeros>
void run_rows(const DepthwiseTask& task, int64_t row, int64_t c, int64_t lanes) {
  __m512 sum[rows][2];
  for (int r = 0; r < rows; ++r) sum[r][0] = sum[r][1] = _mm512_setzero_ps();
  int64_t p = 0;
  for (int64_t g = 0; g < task.groups; ++g) {
    Halves dot[rows], activations[rows];
    for (int r = 0; r < rows; ++r) {
      dot[r] = activations[r] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
    }
    for (; p < task.pair_count && task.pairs[p].group == g; ++p) {
      const TapPair& pair = task.pairs[p];
      const int16_t* w = task.weight + (p * lanes + c) * 2;
      const Halves weight = split(_mm512_loadu_si512(w), _mm512_loadu_si512(w + 32));
      for (int r = 0; r < rows; ++r) {
        const int8_t* a = task.rows[row + r] + c;
        const Halves taps = pair_up(a + pair.offset[0], a + pair.offset[1]);
        multiply_add(&dot[r], taps, weight);
        if (zeros) multiply_add(&activations[r], taps, {count_taps(pair), count_taps(pair)});
      }
    }
    const float* scale = task.scale + g * lanes + c;
    for (int r = 0; r < rows; ++r) {
      const Halves ordered = join(dot[r]);
      sum[r][0] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(ordered.low), _mm512_loadu_ps(scale), sum[r][0]);
      sum[r][1] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(ordered.high), _mm512_loadu_ps(scale + 16), sum[r][1]);
      if (zeros) {
        const float* zero_scale = task.zero_scale + g * lanes + c;
        const Halves counted = join(activations[r]);
        sum[r][0] = _mm512_fnmadd_ps(_mm512_loadu_ps(zero_scale), _mm512_cvtepi32_ps(counted.low), sum[r][0]);
        sum[r][1] = _mm512_fnmadd_ps(_mm512_loadu_ps(zero_scale + 16), _mm512_cvtepi32_ps(counted.high), sum[r][1]);
      }
    }
  }
  write<rows>(task, row, c, sum);
}

// 32 weights of a tap (0 or 1) of a pair.
__m512i weights_of(__m512i front, __m512i back, int tap) {
  alignas(64) static constexpr int16_t kEven[32] = {0,  2,  4,  6,  8,  10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30,
                                                    32, 34, 36, 38, 40, 42, 44, 46, 48, 50, 52, 54, 56, 58, 60, 62};
  const __m512i at = _mm512_add_epi16(_mm512_load_si512(kEven), _mm512_set1_epi16(static_cast<int16_t>(tap)));
  return _mm512_permutex2var_epi16(front, at, back);
}

// One scale group of small weights and integer zeros: 16-bit sums need no pairs.
template <int rows>
void run_rows_int16(const DepthwiseTask& task, int64_t row, int64_t c, int64_t lanes) {
  __m512i dot[rows];
  for (int r = 0; r < rows; ++r) dot[r] = _mm512_setzero_si512();
  for (int64_t p = 0; p < task.pair_count; ++p) {
    const int64_t* offset = task.pairs[p].offset;
    const int16_t* w = task.weight + (p * lanes + c) * 2;
    const __m512i front = _mm512_loadu_si512(w), back = _mm512_loadu_si512(w + 32);
    for (int tap = 0; tap < (offset[0] == offset[1] ? 1 : 2); ++tap) {
      const __m512i weight = weights_of(front, back, tap);
      for (int r = 0; r < rows; ++r) {
        const auto* a = reinterpret_cast<const __m256i*>(task.rows[row + r] + c + offset[tap]);
        const __m512i product = _mm512_mullo_epi16(_mm512_cvtepi8_epi16(_mm256_loadu_si256(a)), weight);
        dot[r] = _mm512_add_epi16(dot[r], product);
      }
    }
  }
  __m512 sum[rows][2];
  for (int r = 0; r < rows; ++r) {
    const __m512i low = _mm512_cvtepi16_epi32(_mm512_castsi512_si256(dot[r]));
    const __m512i high = _mm512_cvtepi16_epi32(_mm512_extracti64x4_epi64(dot[r], 1));
    sum[r][0] = _mm512_mul_ps(_mm512_cvtepi32_ps(low), _mm512_loadu_ps(task.scale + c));
    sum[r][1] = _mm512_mul_ps(_mm512_cvtepi32_ps(high), _mm512_loadu_ps(task.scale + c + 16));
  }
  write<rows>(task, row, c, sum);
}

using RunRows = void (*)(const DepthwiseTask& task, int64_t row, int64_t c, int64_t lanes);

void run_all(const DepthwiseTask& task, int64_t at_once, RunRows run_many, RunRows run_one) {
  const int64_t lanes = depthwise_lanes(task.channels);
  int64_t row = 0;
  for (; row + at_once <= task.row_count; row += at_once) {
    for (int64_t c = 0; c < task.channels; c += 32) run_many(task, row, c, lanes);
  }
  for (; row < task.row_count; ++row) {
    for (int64_t c = 0; c < task.channels; c += 32) run_one(task, row, c, lanes);
  }
}

void run(const DepthwiseTask& task) {
  if (task.zero_scale != nullptr) {
    run_all(task, kRows, run_rows<kRows, true>, run_rows<1, true>);
  } else if (task.int16_sums && task.groups == 1) {
    run_all(task, kRowsInt16, run_rows_int16<kRowsInt16>, run_rows_int16<1>);
  } else {
    run_all(task, kRows, run_rows<kRows, false>, run_rows<1, false>);
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
