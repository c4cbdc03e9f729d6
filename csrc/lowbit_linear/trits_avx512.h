// The layout of ternary codes in 5/3 bits each; for the AVX-512 VBMI and AMX variants. Everything is
// static: each file that includes it keeps a copy with its own flags.
//
// Five rows of 64 bytes hold 24 k of 64 channels. A triple is five bits, c0 + 3 c1 + 9 c2 of three codes.
// The low five bits of byte (lane, kk) of row i are the triple of channels lane, lane + 16 and lane + 32
// at k = 4 i + kk. The three top bits of the five rows make up three more such rows: row 5 like the
// others, row 6 with channel lane + 48 at k = kk, 4 + kk and 8 + kk, row 7 with it at the 12 k behind.
// vpermb looks at six bits of a byte and lets a table ignore any of them, so that the rows need not be
// cleared of what else is in them.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace bantamweight {

constexpr int64_t kTritRows = 5, kTritQuads = 6, kTritBytes = 64 * kTritRows, kTritK = 4 * kTritQuads;

// The three top bits of rows 0 .. 4 from the triples of rows 5 .. 7, and back.
static inline void spread_triples(const int (&triple)[8], int (&top)[5]) {
  top[0] = triple[5] >> 2;
  top[1] = (triple[5] & 3) << 1 | (triple[7] & 1);
  top[2] = triple[6] >> 2;
  top[3] = (triple[6] & 3) << 1 | (triple[7] >> 1 & 1);
  top[4] = triple[7] >> 2;
}
static inline void gather_triples(const int (&top)[5], int (&triple)[8]) {
  triple[5] = top[0] << 2 | top[1] >> 1;
  triple[6] = top[2] << 2 | top[3] >> 1;
  triple[7] = top[4] << 2 | (top[3] & 1) << 1 | (top[1] & 1);
}

// By the six low bits of a row's byte.
struct alignas(64) TritTables {
  uint8_t three[64] = {};      // rows 0 .. 4: c0 | c1 << 2 | c2 << 4
  uint8_t three_5[64] = {};    // row 5: the same
  uint8_t fourth[6][64] = {};  // c << 6 of the first, second and third code of row 6, then of row 7
};

constexpr TritTables make_trit_tables() {
  TritTables tables;
  for (int i = 0; i < 64; ++i) {
    const int triple[3] = {i & 31, i >> 1, (i & 3) | i >> 3 << 2};
    for (int row = 0; row < 3; ++row) {
      const int t = triple[row] < 27 ? triple[row] : 0, code[3] = {t % 3, t / 3 % 3, t / 9};
      const int nested = code[0] | code[1] << 2 | code[2] << 4;
      if (row == 0) tables.three[i] = static_cast<uint8_t>(nested);
      if (row == 1) tables.three_5[i] = static_cast<uint8_t>(nested);
      for (int c = 0; c < 3 && row > 0; ++c) tables.fourth[3 * (row - 1) + c][i] = static_cast<uint8_t>(code[c] << 6);
    }
  }
  return tables;
}

static constexpr TritTables trit_tables = make_trit_tables();

// The six quads of a step as they would be at 2 bits, in two parts.
struct TritStep {
  __m512i x[6], x6, x7;

  __attribute__((always_inline)) explicit TritStep(const uint8_t* step) {
    constexpr int kSelect = 0xe4;  // third ? first : second
    const __m512i low3 = _mm512_set1_epi8(0x07), second = _mm512_set1_epi8(0x02);
    for (int i = 0; i < 5; ++i) x[i] = _mm512_load_si512(step + 64 * i);
    const __m512i top1 = _mm512_srli_epi16(x[1], 5), top3 = _mm512_srli_epi16(x[3], 5);
    x[5] = _mm512_ternarylogic_epi32(top1, _mm512_srli_epi16(x[0], 2), low3, kSelect);  // bits 1 .. 5 count
    x6 = _mm512_ternarylogic_epi32(top3, _mm512_srli_epi16(x[2], 2), low3, kSelect);    // bits 1 .. 5
    x7 = _mm512_ternarylogic_epi32(top1, _mm512_srli_epi16(x[4], 2), low3, kSelect);
    x7 = _mm512_ternarylogic_epi32(_mm512_add_epi8(top3, top3), x7, second, kSelect);  // bits 0, 1, 3 .. 5
  }

  // Channels lane, lane + 16 and lane + 32 of quad q: c0 | c1 << 2 | c2 << 4.
  __attribute__((always_inline)) __m512i three(int q) const {
    return _mm512_permutexvar_epi8(x[q], _mm512_load_si512(q < 5 ? trit_tables.three : trit_tables.three_5));
  }
  // Channel lane + 48: c3 << 6.
  __attribute__((always_inline)) __m512i fourth(int q) const {
    return _mm512_permutexvar_epi8(q < 3 ? x6 : x7, _mm512_load_si512(trit_tables.fourth[q]));
  }
};

}  // namespace bantamweight
