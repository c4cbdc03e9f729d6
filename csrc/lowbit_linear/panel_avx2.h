// From five rows on AVX2 (three at 8 bits): the codes of 16 channels and up to 512 k are unpacked once,
// into a panel in L1 that all rows share.
//
// At 2, 3 and 4 bits the panel holds bytes, 4 k of a channel side by side. A tile is 6 rows of 16
// channels: per 64 weights 2 loads, 6 broadcasts, 12 vpmaddubsw and 12 vpaddw, in just the 16 registers
// and 8 cycles of the three vector ports. At 8 bits the panel and the rows hold int16, and that much
// vpmaddwd and vpaddd take 32 weights.
//
// At K = 768 and 32 rows or more 2 and 3 bits reach 85% of what vpmaddubsw with vpaddw alone does (335 to
// 370 GOPS on Sapphire Rapids, by its clock), 4 bits 78%, 8 bits 88% of vpmaddwd with vpaddd (half of
// that). The tiles take 82% of the time at full rate; the rest is in equal parts writing outputs, rounding
// the rows, unpacking and widening.
//
// Not better: tables over the batch for four levels. One of 64 entries for 3 k makes 48 products a vpaddw
// from memory, of which 2.1 start a cycle with nothing else to do and 1.6 with the loads of the offsets;
// the ternary tables, 64 products a vpaddw, lose a third of that to L1, which would leave these
// where vpmaddubsw is. Windows of 32 quads at 2 bits for 40, four turns of the loop in one or one: no
// change.
#pragma once

#include <immintrin.h>

#include "lowbit_linear/finish_avx2.h"
#include "lowbit_linear/tiles.h"

namespace bantamweight {
namespace {

constexpr int64_t kPanelBytes = 8192;
constexpr int64_t kPanelRows = 96;  // whose sums stand beside the panel
constexpr int kPanelTileRows = 6;
// Blocks that share what is done to the activations: as many of several groups' sums as stay in L1.
constexpr int64_t kPanelBlocks = 16, kPanelBlocksOfGroups = 4;

// k of a panel, of 16 channels' codes in a byte or in an int16.
constexpr int64_t panel_k(int bits) { return bits == 8 ? 256 : 512; }

// Quads until int16 sums have to be widened. Codes of 4 bits would need that after 8 of 2 x 15 x 127, but
// their sums are those of code - 8: they start at -8 times the activations' sum, which int16 holds modulo
// 2^16 whatever comes between.
constexpr int64_t panel_window(int bits) { return bits == 2 ? 40 : 16; }

struct PanelRun {
  alignas(64) uint8_t codes[kPanelBytes];
  alignas(64) int16_t wide[kPanelRows][panel_k(8) + 32];   // activations at 8 bits
  alignas(64) int32_t start[kPanelRows][panel_k(4) / 64];  // where 4-bit sums start, two int16
  alignas(64) int32_t sums[kPanelBlocks][kPanelRows * 16];
  alignas(64) float partial[kPanelBlocksOfGroups][kPanelRows * 16];
};

// Loops over quads take so many a turn.
constexpr int64_t kQuadsAtOnce = 4;

constexpr int64_t padded_quads(int64_t k) { return (k + 4 * kQuadsAtOnce - 1) / (4 * kQuadsAtOnce) * kQuadsAtOnce; }

// Codes of k_size k from `from` on, with zeros up to padded_quads(k_size). At 8 bits (k0, k2) of every
// quad, then (k1, k3) of every quad.
template <int kBits>
void unpack_panel(const uint8_t* from, int64_t k_size, uint8_t* panel) {
  const auto put = [](uint8_t* to, __m256i v) { _mm256_store_si256(reinterpret_cast<__m256i*>(to), v); };
  constexpr int kFieldBits = kBits == 3 ? 4 : kBits, kFields = 8 / kFieldBits;
  constexpr int64_t kParts = kBits == 8 ? 2 : 1;
  const int64_t steps = (k_size + 4 * kFields - 1) / (4 * kFields), part_bytes = 64 * padded_quads(k_size);
  for (int64_t q = steps * kFields; q < part_bytes / 64; ++q) {
    for (int64_t at = 64 * q; at < kParts * part_bytes; at += part_bytes) {
      put(panel + at, _mm256_setzero_si256());
      put(panel + at + 32, _mm256_setzero_si256());
    }
  }
  const __m256i mask = kBits == 8 ? _mm256_set1_epi16(0xff) : _mm256_set1_epi8((1 << kFieldBits) - 1);
  for (int64_t step = 0; step < steps; ++step, from += 64, panel += 64 * kFields) {
    _mm_prefetch(reinterpret_cast<const char*>(from) + 1024, _MM_HINT_T0);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + 32 * half));
      if constexpr (kBits == 8) {
        put(panel + 32 * half, _mm256_and_si256(raw, mask));
        put(panel + part_bytes + 32 * half, _mm256_srli_epi16(raw, 8));
      } else {
#pragma GCC unroll 4
        for (int f = 0; f < kFields; ++f) {
          put(panel + 64 * f + 32 * half, _mm256_and_si256(_mm256_srli_epi16(raw, f * kFieldBits), mask));
        }
      }
    }
  }
}

// 4 activations against 16 channels. As assembly because GCC 12 spills the sums otherwise.
inline void add_quad(__m256i& low, __m256i& high, const int8_t* row, int64_t byte, __m256i low_codes,
                     __m256i high_codes) {
  __m256i a, b;
  __asm__ volatile(
      "vpbroadcastd (%4,%5), %2\n\t"
      "vpmaddubsw %2, %6, %3\n\t"
      "vpmaddubsw %2, %7, %2\n\t"
      "vpaddw %3, %0, %0\n\t"
      "vpaddw %2, %1, %1"
      : "+x"(low), "+x"(high), "=&x"(a), "=&x"(b)
      : "r"(row), "r"(byte), "x"(low_codes), "x"(high_codes)
      : "memory");
}

inline void add_pair(__m256i& low, __m256i& high, const int16_t* row, int64_t byte, __m256i low_codes,
                     __m256i high_codes) {
  __m256i a, b;
  __asm__ volatile(
      "vpbroadcastd (%4,%5), %2\n\t"
      "vpmaddwd %2, %6, %3\n\t"
      "vpmaddwd %2, %7, %2\n\t"
      "vpaddd %3, %0, %0\n\t"
      "vpaddd %2, %1, %1"
      : "+x"(low), "+x"(high), "=&x"(a), "=&x"(b)
      : "r"(row), "r"(byte), "x"(low_codes), "x"(high_codes)
      : "memory");
}

inline __m256i load_codes(const uint8_t* panel) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(panel)); }

// Adds kRows rows against the panel to sums [kRows][16], which start at zero if `first`. Not inlined: where
// it was, GCC 12 kept the sums in memory.
template <int kBits, int kRows>
__attribute__((noinline)) void add_tile(const PanelRun& run, const int8_t* const* rows, int64_t row_offset,
                                        int64_t first_row, int64_t quads, bool first, int32_t* sums) {
  __m256i s[kRows][2];
  const auto add_to_sums = [&](bool store) __attribute__((always_inline)) {
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        auto* to = reinterpret_cast<__m256i*>(sums + 16 * r + 8 * half);
        __m256i wide = s[r][half];
        if constexpr (kBits != 8) wide = _mm256_madd_epi16(wide, _mm256_set1_epi16(1));
        if (!store) wide = _mm256_add_epi32(wide, _mm256_load_si256(to));
        _mm256_store_si256(to, wide);
      }
    }
  };
  if constexpr (kBits == 8) {
    const int16_t* a[kRows];
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      a[r] = run.wide[first_row + r];
      s[r][0] = s[r][1] = _mm256_setzero_si256();
    }
    const uint8_t* panel = run.codes;
    for (int64_t k = 0; k < 8 * quads; panel += 64 * kQuadsAtOnce) {
#pragma GCC unroll 4
      for (int64_t i = 0; i < kQuadsAtOnce; ++i, k += 4) {
        const __m256i low = load_codes(panel + 64 * i), high = load_codes(panel + 64 * i + 32);
#pragma GCC unroll 6
        for (int r = 0; r < kRows; ++r) add_pair(s[r][0], s[r][1], a[r], k, low, high);
      }
    }
    add_to_sums(first);
  } else {
    const int8_t* a[kRows];
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) a[r] = rows[r] + row_offset;
    const uint8_t* panel = run.codes;
    for (int64_t begin = 0; begin < quads; begin += panel_window(kBits)) {
      const int64_t end = quads - begin < panel_window(kBits) ? quads : begin + panel_window(kBits);
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r) {
        s[r][0] = s[r][1] =
            kBits == 4 ? _mm256_set1_epi32(run.start[first_row + r][begin / 16]) : _mm256_setzero_si256();
      }
      for (int64_t k = 4 * begin; k < 4 * end; panel += 64 * kQuadsAtOnce) {
#pragma GCC unroll 4
        for (int64_t i = 0; i < kQuadsAtOnce; ++i, k += 4) {
          const __m256i low = load_codes(panel + 64 * i), high = load_codes(panel + 64 * i + 32);
#pragma GCC unroll 6
          for (int r = 0; r < kRows; ++r) add_quad(s[r][0], s[r][1], a[r], k, low, high);
        }
      }
      add_to_sums(first && begin == 0);
    }
  }
}

// Bytes 0 .. count - 1 of 32 all ones, the others zero.
inline __m256i first_bytes(int64_t count) {
  alignas(32) int8_t index[32];
  for (int i = 0; i < 32; ++i) index[i] = static_cast<int8_t>(i);
  return _mm256_cmpgt_epi8(_mm256_set1_epi8(static_cast<char>(count)),
                           _mm256_load_si256(reinterpret_cast<const __m256i*>(index)));
}

// What is done to the activations of a chunk of k once for several blocks.
template <int kBits>
void prepare_rows(PanelRun& run, const int8_t* const* rows, int64_t row_count, int64_t offset, int64_t k_size) {
  if constexpr (kBits == 8) {
    const int64_t quads = padded_quads(k_size);
    for (int64_t r = 0; r < row_count; ++r) {
      const int8_t* a = rows[r] + offset;
      int16_t* to = run.wide[r];
      for (int odd = 0; odd < 2; ++odd, to += 2 * quads) {
        for (int64_t k = 0; k < 4 * quads; k += 32) {
          const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(a + k));
          const __m256i at_top = odd ? raw : _mm256_slli_epi16(raw, 8);
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + k / 2), _mm256_srai_epi16(at_top, 8));
        }
      }
    }
  }
  if constexpr (kBits == 4) {
    const __m256i ones = _mm256_set1_epi8(1);
    for (int64_t r = 0; r < row_count; ++r) {
      for (int64_t k = 0; k < k_size; k += 64) {
        __m256i sum = _mm256_setzero_si256();
        for (int64_t i = k; i < k + 64 && i < k_size; i += 32) {
          __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows[r] + offset + i));
          if (k_size - i < 32) a = _mm256_and_si256(a, first_bytes(k_size - i));
          sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(ones, a));
        }
        __m128i half = _mm_add_epi16(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
        half = _mm_add_epi16(half, _mm_shuffle_epi32(half, 0x4e));
        half = _mm_add_epi16(half, _mm_shuffle_epi32(half, 0xb1));
        half = _mm_sub_epi16(_mm_setzero_si128(), _mm_slli_epi16(half, 3));
        run.start[r][k / 64] = _mm_cvtsi128_si32(half);
      }
    }
  }
}

// Rows first_row .. + row_count - 1 (at most kPanelRows) against blocks that stand side by side (at most
// kPanelBlocks), each with its task.
template <int kBits>
void run_panels(const TileTask* tasks, int64_t block_count, int64_t first_row, int64_t row_count) {
  constexpr int64_t kStepK = kBits == 2 ? 16 : kBits == 8 ? 4 : 8;
  PanelRun run;
  for (int64_t b = 0; b < block_count && b < kPanelBlocksOfGroups; ++b) {
    for (int64_t i = 0; i < 16 * row_count; ++i) run.partial[b][i] = 0.0f;
  }
  const TileTask& task = tasks[0];
  const int8_t* const* rows = task.rows + first_row;
  int64_t at = 0;  // bytes into the codes
  for (int64_t p = 0; p < task.piece_count;) {
    const int64_t group = task.pieces[p].group;
    bool first = true;
    for (; p < task.piece_count && task.pieces[p].group == group; ++p) {
      const KPiece& piece = task.pieces[p];
      for (int64_t k = 0; k < piece.k_size; k += panel_k(kBits), first = false) {
        const int64_t k_size = piece.k_size - k < panel_k(kBits) ? piece.k_size - k : panel_k(kBits);
        const int64_t quads = padded_quads(k_size), offset = piece.row_offset + k;
        prepare_rows<kBits>(run, rows, row_count, offset, k_size);
        for (int64_t b = 0; b < block_count; ++b) {
          unpack_panel<kBits>(tasks[b].weight + at, k_size, run.codes);
          for_each_tile<kPanelTileRows>(row_count, [&](auto count, int64_t row) {
            add_tile<kBits, decltype(count)::value>(run, rows + row, offset, row, quads, first, run.sums[b] + 16 * row);
          });
        }
        at += (k_size + kStepK - 1) / kStepK * 64;
      }
    }
    for (int64_t b = 0; b < block_count; ++b) {
      finish_group<8, 2>(tasks[b], group, first_row, row_count, run.sums[b], run.partial[b % kPanelBlocksOfGroups],
                         kBits == 4 ? 8 : 0);
    }
  }
}

}  // namespace
}  // namespace bantamweight
