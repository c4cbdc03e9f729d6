// The layout of 3-bit codes; for the AVX-512 VNNI and AMX variants. Everything is static: each file
// that includes it keeps a copy with its own flags.
//
// Three rows of 64 bytes hold 8 k of 64 channels, two codes a byte in bits 0-2 and 3-5: row 0 channels
// lane and lane + 16 at the first 4 k, row 1 channels lane + 32 and lane + 48 there, row 2 channels
// lane and lane + 16 at the next 4 k. What is missing, channels lane + 32 and lane + 48 at the next
// 4 k, are the two top bits of the three, from row 0 up: a fourth row like the others.
#pragma once

#include <immintrin.h>

namespace bantamweight {

// Its own two top bits are not 0.
static inline __m512i fourth_row(__m512i x0, __m512i x1, __m512i x2) {
  constexpr int kSelect = 0xe4;  // third ? first : second
  const __m512i low2 = _mm512_set1_epi8(0x03), low4 = _mm512_set1_epi8(0x0f);
  const __m512i x01 = _mm512_ternarylogic_epi32(_mm512_srli_epi16(x0, 6), _mm512_srli_epi16(x1, 4), low2, kSelect);
  return _mm512_ternarylogic_epi32(x01, _mm512_srli_epi16(x2, 2), low4, kSelect);
}

}  // namespace bantamweight
