// Ternary codes against many rows on AVX2, by tables over the batch.
//
// A byte of the layout holds the codes of one channel at four k. For 16 or 32 rows at once a table
// holds, for each of its 81 values, the sums (c0 - 1) a0 + .. + (c3 - 1) a3 of every row in int16. Then
// 64 products are one vpaddw from memory, where vpmaddubsw and vpaddw are two for 32, and building a
// table is shared by all channels.
//
// Per 256 weights and 32 rows: 64 offsets made by 4 vpshufb, and 128 vpaddw from memory, of which a
// core starts 2.1 a cycle. 400 to 420 GOPS, 1.1 times what vpmaddubsw with vpaddw alone reaches.
//
// Tried and slower: tables of one step at a time (376 to 402 GOPS: the narrow sums are read and written
// twice as often); offsets taken out of one 64-bit load by shifts (no change); tables of 256 entries
// for four levels (150 GOPS at 32 rows: 64 KB of tables do not fit L1, and building them takes longest;
// 242 at 16 rows, no better than vpmaddubsw).
#pragma once

#include <immintrin.h>

#include "lowbit_linear/lowbit_linear.h"

namespace bantamweight {
namespace {

constexpr int64_t kTableStepK = 16, kTableStepBytes = 64;  // a step is 4 bytes of each of 16 channels
constexpr int64_t kTableChannels = 1024;                   // at most so many at a time
constexpr int64_t kTableEntries = 81;
constexpr int64_t kTableSteps = 2;  // steps whose tables stand in L1 together
constexpr int64_t kTables = 4 * kTableSteps;

// What one run over some rows and channels works on.
template <int kVectors>
struct TableRun {
  static constexpr int64_t kRows = 16 * kVectors;
  // int16 sums hold 16 steps of 4 x 4 x 127.
  static constexpr int64_t kSafeSteps = 16;

  int64_t channels;  // a multiple of 16
  alignas(64) int16_t table[kTables][kTableEntries][kRows];
  alignas(64) int16_t narrow[kTableChannels][kRows];  // sums since the last widening
  alignas(64) int32_t wide[kTableChannels][kRows];    // sums of the group so far
  alignas(64) float out[kTableChannels][kRows];       // outputs of the groups so far
};

// x[i] byte j becomes x[j] byte i.
inline void transpose_bytes(__m128i x[16]) {
  for (int stage = 0; stage < 4; ++stage) {
    __m128i y[16];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      y[2 * i] = _mm_unpacklo_epi8(x[i], x[i + 8]);
      y[2 * i + 1] = _mm_unpackhi_epi8(x[i], x[i + 8]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) x[i] = y[i];
  }
}

// The four tables of one step: the q-th has the k of q, q + 4, q + 8, q + 12, of which only those below
// valid_k count.
template <int kVectors>
void build_tables(TableRun<kVectors>& run, int64_t step, const int8_t* const* rows, int64_t offset, int64_t valid_k) {
  const __m128i index = _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m128i valid = _mm_cmpgt_epi8(_mm_set1_epi8(static_cast<char>(valid_k < 16 ? valid_k : 16)), index);
  // (c - 1) a + (d - 1) b at [c + 3 d].
  const auto pair_sums = [](__m128i first, __m128i second, __m256i* sums) __attribute__((always_inline)) {
    const __m256i a = _mm256_cvtepi8_epi16(first), b = _mm256_cvtepi8_epi16(second), none = _mm256_setzero_si256();
    const __m256i of_a[3] = {_mm256_sub_epi16(none, a), none, a}, of_b[3] = {_mm256_sub_epi16(none, b), none, b};
#pragma GCC unroll 9
    for (int i = 0; i < 9; ++i) sums[i] = _mm256_add_epi16(of_a[i % 3], of_b[i / 3]);
  };
  for (int v = 0; v < kVectors; ++v) {
    __m128i x[16];
    for (int r = 0; r < 16; ++r) {
      const auto* from = reinterpret_cast<const __m128i*>(rows[16 * v + r] + offset);
      x[r] = _mm_and_si128(_mm_loadu_si128(from), valid);
    }
    transpose_bytes(x);
    for (int q = 0; q < 4; ++q) {
      __m256i low[9], high[9];
      pair_sums(x[q], x[q + 4], low);
      pair_sums(x[q + 8], x[q + 12], high);
      int16_t* to = &run.table[4 * step + q][0][16 * v];
      for (int j = 0; j < 9; ++j) {
#pragma GCC unroll 9
        for (int i = 0; i < 9; ++i, to += TableRun<kVectors>::kRows) {
          _mm256_store_si256(reinterpret_cast<__m256i*>(to), _mm256_add_epi16(low[i], high[j]));
        }
      }
    }
  }
}

// Byte offsets into a table for the 64 bytes of a step.
template <int kVectors>
inline void table_offsets(const uint8_t* step, uint16_t* offsets) {
  // Two codes a nibble: c + 3 d, and 9 times that. The code 3 does not occur.
  const __m256i pair = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 2, 0, 3, 4, 5, 0, 6, 7, 8, 0, 0, 0, 0, 0));
  const __m256i nine_pairs =
      _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 9, 18, 0, 27, 36, 45, 0, 54, 63, 72, 0, 0, 0, 0, 0));
  const __m256i nibble = _mm256_set1_epi8(0x0f);
  for (int half = 0; half < 2; ++half) {
    const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(step + 32 * half));
    const __m256i index =
        _mm256_add_epi8(_mm256_shuffle_epi8(pair, _mm256_and_si256(codes, nibble)),
                        _mm256_shuffle_epi8(nine_pairs, _mm256_and_si256(_mm256_srli_epi16(codes, 4), nibble)));
    for (int part = 0; part < 2; ++part) {
      const __m128i bytes = part == 0 ? _mm256_castsi256_si128(index) : _mm256_extracti128_si256(index, 1);
      _mm256_store_si256(reinterpret_cast<__m256i*>(offsets + 32 * half + 16 * part),
                         _mm256_slli_epi16(_mm256_cvtepu8_epi16(bytes), kVectors == 2 ? 6 : 5));
    }
  }
}

// Adds kSteps steps of every channel to the narrow sums, which start at zero if kFirst.
template <int kVectors, int kSteps, bool kFirst>
void add_steps(TableRun<kVectors>& run, const uint8_t* weight, int64_t block_bytes) {
  for (int64_t channel = 0; channel < run.channels; channel += 16, weight += block_bytes) {
    _mm_prefetch(reinterpret_cast<const char*>(weight + 4 * block_bytes), _MM_HINT_T0);
    alignas(32) uint16_t offsets[kSteps][16][4];
    for (int step = 0; step < kSteps; ++step) {
      table_offsets<kVectors>(weight + step * kTableStepBytes, offsets[step][0]);
    }
#pragma GCC unroll 2
    for (int lane = 0; lane < 16; ++lane) {
      auto* sums = reinterpret_cast<__m256i*>(run.narrow[channel + lane]);
      __m256i s[kVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) s[v] = kFirst ? _mm256_setzero_si256() : _mm256_load_si256(sums + v);
#pragma GCC unroll 2
      for (int step = 0; step < kSteps; ++step) {
#pragma GCC unroll 4
        for (int q = 0; q < 4; ++q) {
          const auto* table = reinterpret_cast<const uint8_t*>(run.table[4 * step + q]);
          const auto* entry = reinterpret_cast<const __m256i*>(table + offsets[step][lane][q]);
#pragma GCC unroll 2
          for (int v = 0; v < kVectors; ++v) s[v] = _mm256_add_epi16(s[v], _mm256_load_si256(entry + v));
        }
      }
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) _mm256_store_si256(sums + v, s[v]);
    }
  }
}

template <int kVectors>
void add_steps(TableRun<kVectors>& run, int64_t steps, const uint8_t* weight, int64_t block_bytes, bool first) {
  if (steps == kTableSteps) {
    first ? add_steps<kVectors, kTableSteps, true>(run, weight, block_bytes)
          : add_steps<kVectors, kTableSteps, false>(run, weight, block_bytes);
  } else {
    first ? add_steps<kVectors, 1, true>(run, weight, block_bytes)
          : add_steps<kVectors, 1, false>(run, weight, block_bytes);
  }
}

// Moves the narrow sums to the wide ones (`first` of the group: there are none yet), or where the
// group ends on to the outputs.
template <int kVectors>
void widen(TableRun<kVectors>& run, const TileTask& task, int64_t group, int64_t first_row, int64_t row_count,
           bool first, bool last) {
  constexpr int64_t kRows = TableRun<kVectors>::kRows;
  alignas(32) int32_t correction[kRows] = {};  // what the sums of (code - 1) a lack of those of (code - zero) a
  alignas(32) float row_sums[kRows] = {}, group_scale[kRows] = {};
  for (int64_t r = 0; last && r < row_count; ++r) {
    const int32_t row_sum = task.row_sums[(first_row + r) * task.groups + group];
    correction[r] = row_sum * (task.zero_scale == nullptr ? 1 - task.uniform_zero : 1);
    group_scale[r] = task.group_scale == nullptr ? 1.0f : task.group_scale[(first_row + r) * task.groups + group];
    row_sums[r] = static_cast<float>(row_sum) * group_scale[r];
  }
  for (int64_t channel = 0; channel < run.channels; ++channel) {
    const int64_t at = (channel / 16 * task.groups + group) * 16 + channel % 16;
    for (int64_t r = 0; r < kRows; r += 8) {
      const auto* narrow = reinterpret_cast<const __m128i*>(&run.narrow[channel][r]);
      auto* wide = reinterpret_cast<__m256i*>(&run.wide[channel][r]);
      __m256i s = _mm256_cvtepi16_epi32(_mm_load_si128(narrow));
      if (!first) s = _mm256_add_epi32(s, _mm256_load_si256(wide));
      if (!last) {
        _mm256_store_si256(wide, s);
        continue;
      }
      s = _mm256_add_epi32(s, _mm256_load_si256(reinterpret_cast<const __m256i*>(correction + r)));
      __m256 out = group == 0 ? _mm256_setzero_ps() : _mm256_load_ps(&run.out[channel][r]);
      const __m256 scaled = _mm256_mul_ps(_mm256_cvtepi32_ps(s), _mm256_load_ps(group_scale + r));
      out = _mm256_fmadd_ps(scaled, _mm256_set1_ps(task.scale[at]), out);
      if (task.zero_scale != nullptr) {
        out = _mm256_fnmadd_ps(_mm256_set1_ps(task.zero_scale[at]), _mm256_load_ps(row_sums + r), out);
      }
      _mm256_store_ps(&run.out[channel][r], out);
    }
  }
}

// x[i] lane j becomes x[j] lane i.
inline void transpose_floats(__m256 x[8]) {
  __m256 y[8];
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    const __m256 a = _mm256_unpacklo_ps(x[i], x[i + 1]), b = _mm256_unpackhi_ps(x[i], x[i + 1]);
    const __m256 c = _mm256_unpacklo_ps(x[i + 2], x[i + 3]), d = _mm256_unpackhi_ps(x[i + 2], x[i + 3]);
    y[i] = _mm256_shuffle_ps(a, c, 0x44);
    y[i + 1] = _mm256_shuffle_ps(a, c, 0xee);
    y[i + 2] = _mm256_shuffle_ps(b, d, 0x44);
    y[i + 3] = _mm256_shuffle_ps(b, d, 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    x[i] = _mm256_permute2f128_ps(y[i], y[i + 4], 0x20);
    x[i + 4] = _mm256_permute2f128_ps(y[i], y[i + 4], 0x31);
  }
}

// The last step of the formula, and from rows side by side to channels side by side.
template <int kVectors>
void write_rows(const TableRun<kVectors>& run, const TileTask& task, int64_t first_row, int64_t row_count,
                int64_t valid_channels) {
  for (int64_t r = 0; r < row_count; r += 8) {
    const int64_t rows = row_count - r < 8 ? row_count - r : 8;
    alignas(32) float row_scale[8] = {};
    for (int64_t i = 0; i < rows; ++i) row_scale[i] = task.row_scale[first_row + r + i];
    for (int64_t n = 0; n < valid_channels; n += 8) {
      const int64_t channels = valid_channels - n < 8 ? valid_channels - n : 8;
      __m256 x[8];
      for (int64_t i = 0; i < 8; ++i) {
        const __m256 bias =
            task.bias == nullptr || i >= channels ? _mm256_setzero_ps() : _mm256_set1_ps(task.bias[n + i]);
        x[i] = _mm256_fmadd_ps(_mm256_load_ps(&run.out[n + i][r]), _mm256_load_ps(row_scale), bias);
      }
      transpose_floats(x);
      const __m256i mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int32_t>(channels)),
                                              _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
      float* y = task.y + (first_row + r) * task.ldy + n;
      for (int64_t i = 0; i < rows; ++i) _mm256_maskstore_ps(y + i * task.ldy, mask, x[i]);
    }
  }
}

// Rows first_row .. + row_count - 1 (at most 16 kVectors) against `valid_channels` channels (at most
// kTableChannels) of blocks `block_bytes` apart, of which `task` is the first.
template <int kVectors>
void run_tables(const TileTask& task, int64_t first_row, int64_t row_count, int64_t valid_channels,
                int64_t block_bytes) {
  using Run = TableRun<kVectors>;
  Run run;
  run.channels = (valid_channels + 15) / 16 * 16;
  const int8_t* rows[Run::kRows];  // past row_count any row will do: its sums are dropped
  for (int64_t r = 0; r < Run::kRows; ++r) rows[r] = task.rows[first_row + (r < row_count ? r : 0)];
  const uint8_t* weight = task.weight;
  for (int64_t p = 0; p < task.piece_count;) {
    const int64_t group = task.pieces[p].group;
    bool none_wide = true;
    int64_t narrow_steps = 0;
    for (; p < task.piece_count && task.pieces[p].group == group; ++p) {
      const KPiece& piece = task.pieces[p];
      for (int64_t k = 0; k < piece.k_size;) {
        if (narrow_steps + kTableSteps > Run::kSafeSteps) {
          widen(run, task, group, first_row, row_count, none_wide, false);
          none_wide = false;
          narrow_steps = 0;
        }
        const int64_t steps = piece.k_size - k > kTableStepK ? kTableSteps : 1;
        for (int64_t step = 0; step < steps; ++step) {
          const int64_t at = k + step * kTableStepK;
          build_tables(run, step, rows, piece.row_offset + at, piece.k_size - at);
        }
        add_steps(run, steps, weight, block_bytes, narrow_steps == 0);
        narrow_steps += steps;
        weight += steps * kTableStepBytes;
        k += steps * kTableStepK;
      }
    }
    widen(run, task, group, first_row, row_count, none_wide, true);
  }
  write_rows(run, task, first_row, row_count, valid_channels);
}

}  // namespace
}  // namespace bantamweight
