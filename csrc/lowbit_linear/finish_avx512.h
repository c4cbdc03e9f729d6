// From the int32 sums of the nested-mask layout to float outputs; for the AVX-512 VNNI and AMX
// variants. Everything is static: each file that includes it keeps a copy with its own flags.
#pragma once

#include <immintrin.h>

#include "lowbit_linear/lowbit_linear.h"
#include "runtime/floats_avx512.h"

namespace bantamweight {

// What the layout multiplies channels lane + 16 j by, as a shift: byte = c0 | c1 << 2 | .. at 2 bits.
template <int kBits>
static constexpr int nested_shift(int j) {
  return kBits == 2 || kBits == kTrits ? 2 * j : kBits == 8 ? 0 : 4 * (j & 1);
}

// Lanes 16 j .. 16 j + 15 of a block that are channels.
static inline __mmask16 valid_lanes(const TileTask& task, int j) { return Floats::part(task.block_n_valid - 16 * j); }

// Outputs of one row to codes (CodeOutputs). The lower bound is applied to the bytes.
template <int kTiles>
static inline void store_codes(const TileTask& task, int64_t row, const __mmask16* valid, const __m512* y) {
  int8_t* to = task.codes.rows[row] + task.first_channel;
  const __m512 factor = _mm512_set1_ps(task.codes.factor), most = _mm512_set1_ps(127.0f);
  __m512i codes[kTiles];
  for (int j = 0; j < kTiles; ++j) {
    __m512 sum = y[j];
    if (task.codes.added != nullptr) {
      const int8_t* added = task.codes.added[row] + task.first_channel;
      const __m128i bytes = _mm_maskz_loadu_epi8(valid[j], added + 16 * j);
      sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)), factor, sum);
    }
    codes[j] = _mm512_cvtps_epi32(_mm512_min_ps(sum, most));
  }
  if constexpr (kTiles == 4) {
    if (task.block_n_valid >= 64) {
      // Packing works within 128-bit lanes; this puts the dwords back in order.
      const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
      const __m512i packed =
          _mm512_packs_epi16(_mm512_packs_epi32(codes[0], codes[1]), _mm512_packs_epi32(codes[2], codes[3]));
      _mm512_storeu_si512(to, _mm512_max_epi8(_mm512_permutexvar_epi32(order, packed), _mm512_set1_epi8(-127)));
      return;
    }
  }
  for (int j = 0; j < kTiles; ++j) {
    const __m128i bytes = _mm_max_epi8(_mm512_cvtsepi32_epi8(codes[j]), _mm_set1_epi8(-127));
    _mm_mask_storeu_epi8(to + 16 * j, valid[j], bytes);
  }
}

template <int kBits, int kTiles, bool kUniformZero, bool kFirst, bool kLast>
static inline void finish_rows(const TileTask& task, int64_t group, int64_t first_row, int64_t row_count,
                               const int32_t* sums, float* partial) {
  const float* scale = task.scale + group * 64;
  const int32_t* row_sums = task.row_sums + first_row * task.groups + group;
  __mmask16 valid[kTiles];
  __m512 bias[kTiles];
  if constexpr (kLast) {
    for (int j = 0; j < kTiles; ++j) {
      valid[j] = valid_lanes(task, j);
      bias[j] = task.bias == nullptr ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(valid[j], task.bias + 16 * j);
    }
  }
#pragma GCC unroll 1
  for (int64_t r = 0; r < row_count; ++r, sums += 64, partial += 64, row_sums += task.groups) {
    __m512i s[kTiles];
    for (int j = 0; j < kTiles; ++j) s[j] = _mm512_load_si512(sums + 16 * j);
    if constexpr (kBits == 2 || kBits == kTrits) {
      for (int j = kTiles - 1; j > 0; --j) {
        if (kBits == 2 || j < 3) s[j] = _mm512_sub_epi32(s[j], s[j - 1]);
      }
    } else if constexpr (kBits == 4) {
      for (int j = 1; j < kTiles; j += 2) s[j] = _mm512_sub_epi32(s[j], s[j - 1]);
    } else if constexpr (kBits == 3) {  // 16 S1, as at 4 bits: both have the same scales
      for (int j = 1; j < kTiles; j += 2) s[j] = _mm512_slli_epi32(_mm512_sub_epi32(s[j], s[j - 1]), 1);
    }
    if constexpr (kUniformZero) {
      const __m512i zero = _mm512_set1_epi32(task.uniform_zero * *row_sums);
      for (int j = 0; j < kTiles; ++j) s[j] = _mm512_sub_epi32(s[j], _mm512_slli_epi32(zero, nested_shift<kBits>(j)));
    }
    __m512 out[kTiles];
    float row_sum = static_cast<float>(*row_sums);
    for (int j = 0; j < kTiles; ++j) out[j] = _mm512_cvtepi32_ps(s[j]);
    if (task.group_scale != nullptr) {  // one well predicted branch, where a product by one would cost a cycle or two
      const float group_scale = task.group_scale[(first_row + r) * task.groups + group];
      row_sum *= group_scale;
      for (int j = 0; j < kTiles; ++j) out[j] = _mm512_mul_ps(out[j], _mm512_set1_ps(group_scale));
    }
    for (int j = 0; j < kTiles; ++j) {
      const __m512 before = kFirst ? _mm512_setzero_ps() : _mm512_load_ps(partial + 16 * j);
      out[j] = _mm512_fmadd_ps(out[j], _mm512_load_ps(scale + 16 * j), before);
      if constexpr (!kUniformZero) {
        out[j] =
            _mm512_fnmadd_ps(_mm512_load_ps(task.zero_scale + group * 64 + 16 * j), _mm512_set1_ps(row_sum), out[j]);
      }
    }
    if constexpr (kLast) {
      const __m512 row_scale = _mm512_set1_ps(task.row_scale[first_row + r]);
      for (int j = 0; j < kTiles; ++j) out[j] = _mm512_fmadd_ps(out[j], row_scale, bias[j]);
      if (task.codes.rows != nullptr) {
        store_codes<kTiles>(task, first_row + r, valid, out);
        continue;
      }
      float* y = task.y + (first_row + r) * task.ldy;
      if (task.stream_outputs && task.block_n_valid >= 64) {
        for (int j = 0; j < kTiles; ++j) _mm512_stream_ps(y + 16 * j, out[j]);
      } else {
        for (int j = 0; j < kTiles; ++j) _mm512_mask_storeu_ps(y + 16 * j, valid[j], out[j]);
      }
    } else {
      for (int j = 0; j < kTiles; ++j) _mm512_store_ps(partial + 16 * j, out[j]);
    }
  }
}

// Adds group `group` of `row_count` rows to their outputs.
//   sums     [row_count][64] int32, S_j being those of channels 16 j .. 16 j + 15: for 2 bits S0, S0 + 4 S1,
//            S0 + 4 S1 + 16 S2, ..; for trits the same, but 64 S3 alone; for 4 bits S0, S0 + 16 S1, S2,
//            S2 + 16 S3; for 3 bits with 8 for 16; for 8 bits S0 .. S3
//   partial  [row_count][64] float outputs of the groups so far; read unless group is the first,
//            written unless it is the last, when y is
// Only the first kTiles of the S_j and their channels are read and written.
template <int kBits, int kTiles = 4>
static inline void finish_group(const TileTask& task, int64_t group, int64_t first_row, int64_t row_count,
                                const int32_t* sums, float* partial) {
  const bool first = group == 0, last = group == task.groups - 1;
  auto* finish = &finish_rows<kBits, kTiles, true, false, false>;
  if (task.zero_scale == nullptr) {
    if (first && last)
      finish = &finish_rows<kBits, kTiles, true, true, true>;
    else if (first)
      finish = &finish_rows<kBits, kTiles, true, true, false>;
    else if (last)
      finish = &finish_rows<kBits, kTiles, true, false, true>;
  } else {
    if (first && last)
      finish = &finish_rows<kBits, kTiles, false, true, true>;
    else if (first)
      finish = &finish_rows<kBits, kTiles, false, true, false>;
    else if (last)
      finish = &finish_rows<kBits, kTiles, false, false, true>;
    else
      finish = &finish_rows<kBits, kTiles, false, false, false>;
  }
  finish(task, group, first_row, row_count, sums, partial);
}

// Outputs of a layer without inputs: the bias alone.
static inline void write_bias(const TileTask& task) {
  for (int64_t r = 0; r < task.row_count; ++r) {
    for (int64_t n = 0; n < task.block_n_valid; ++n) {
      task.y[r * task.ldy + n] = task.bias == nullptr ? 0.0f : task.bias[n];
    }
  }
}

}  // namespace bantamweight
