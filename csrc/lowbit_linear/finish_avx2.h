// From the int32 sums of a group to float outputs, 8 channels a vector; for the AVX2 and AVX-VNNI
// variants. Everything is static: each file that includes it keeps a copy with its own flags.
#pragma once

#include <immintrin.h>

#include "lowbit_linear/lowbit_linear.h"

namespace bantamweight {

// Lanes 8 j .. 8 j + 7 of a block that are channels.
static inline __m256i valid_lanes(const TileTask& task, int j) {
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int32_t>(task.block_n_valid - 8 * j)), lanes);
}

// Adds group `group` of `row_count` rows to partial [row_count][8 kVectors], which starts at zero, or
// after the last group writes y.
//   sums   [row_count][8 kVectors] int32
//   bits   how the sums are nested: 2 for S0, S0 + 4 S1, S0 + 4 S1 + 16 S2, .. by vectors; 4 for S0,
//          S0 + 16 S1, S2, S2 + 16 S3; 8 for sums that stand alone
//   centre what the codes in the sums are lower by than they are
template <int kBits, int kVectors>
static inline void finish_group(const TileTask& task, int64_t group, int64_t first_row, int64_t row_count,
                                const int32_t* sums, float* partial, int32_t centre = 0) {
  constexpr int64_t kBlock = 8 * kVectors;
  const float* scale = task.scale + group * kBlock;
  const int32_t zero = (task.zero_scale == nullptr ? task.uniform_zero : 0) - centre;
  const bool last = group == task.groups - 1;
  for (int64_t r = 0; r < row_count; ++r, sums += kBlock, partial += kBlock) {
    const int32_t row_sum = task.row_sums[(first_row + r) * task.groups + group];
    const float group_scale =
        task.group_scale == nullptr ? 1.0f : task.group_scale[(first_row + r) * task.groups + group];
    __m256i s[kVectors];
    for (int j = 0; j < kVectors; ++j) s[j] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(sums + 8 * j));
    if constexpr (kBits == 2) {
      for (int j = kVectors - 1; j > 0; --j) s[j] = _mm256_sub_epi32(s[j], s[j - 1]);
    } else if constexpr (kBits == 4) {
      for (int j = 1; j < kVectors; j += 2) s[j] = _mm256_sub_epi32(s[j], s[j - 1]);
    }
    for (int j = 0; j < kVectors; ++j) {
      const int factor = kBits == 2 ? 1 << 2 * j : kBits == 4 && j % 2 == 1 ? 16 : 1;
      s[j] = _mm256_sub_epi32(s[j], _mm256_set1_epi32(zero * row_sum * factor));
      __m256 out = _mm256_loadu_ps(partial + 8 * j);
      const __m256 sum = _mm256_mul_ps(_mm256_cvtepi32_ps(s[j]), _mm256_set1_ps(group_scale));
      out = _mm256_fmadd_ps(sum, _mm256_loadu_ps(scale + 8 * j), out);
      if (task.zero_scale != nullptr) {
        const __m256 zero_scale = _mm256_loadu_ps(task.zero_scale + group * kBlock + 8 * j);
        out = _mm256_fnmadd_ps(zero_scale, _mm256_set1_ps(static_cast<float>(row_sum) * group_scale), out);
      }
      if (!last) {
        _mm256_storeu_ps(partial + 8 * j, out);
        continue;
      }
      const __m256 row_scale = _mm256_set1_ps(task.row_scale[first_row + r]);
      float* y = task.y + (first_row + r) * task.ldy + 8 * j;
      if (task.block_n_valid >= 8 * (j + 1)) {  // masked stores are slow on some CPUs
        const __m256 bias = task.bias == nullptr ? _mm256_setzero_ps() : _mm256_loadu_ps(task.bias + 8 * j);
        _mm256_storeu_ps(y, _mm256_fmadd_ps(out, row_scale, bias));
        continue;
      }
      const __m256i mask = valid_lanes(task, j);
      const __m256 bias = task.bias == nullptr ? _mm256_setzero_ps() : _mm256_maskload_ps(task.bias + 8 * j, mask);
      _mm256_maskstore_ps(y, mask, _mm256_fmadd_ps(out, row_scale, bias));
    }
  }
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
