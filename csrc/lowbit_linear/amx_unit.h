// Units of 32 channels, whose codes are unpacked once for many rows: what amx_panel.h and
// amx_long_groups.h share. For amx.cc only: everything is in an unnamed namespace.
//
// Unpacked, codes are signed bytes, codes minus their zero, so that the zero costs nothing. Two tiles of
// them against two of activations go into four tiles of sums, 32 rows x 32 channels: a product costs one
// tile load.
#pragma once

#include "lowbit_linear/amx_chunks.h"
#include "lowbit_linear/finish_avx512.h"
#include "lowbit_linear/trits_avx512.h"

namespace bantamweight {
namespace {

constexpr int64_t kUnitN = 32, kPairRows = 2 * kTileRows, kPairTiles = 4;
constexpr int64_t kPairBytes = kPairTiles * kTileBytes;  // of sums or outputs of 32 rows x 32 channels
constexpr int64_t kUnitTileBytes = 2 * kTileBytes;       // a chunk of a unit, or of a pair of row tiles

// 32 channels: the lower or the upper half of a block.
struct Unit {
  const uint8_t* weight;  // the codes of their block
  int64_t channel;        // the first one
  int half;
  __mmask16 valid[2];  // channels that there are
  float factor[2];     // what the layout divides their scales by
  const float* scale;  // [groups][64], from that channel on
  const float* zero_scale;
  __m512 bias[2];
};

template <int kBits>
Unit unit_at(const TileTask& task, int64_t block_bytes, int64_t channels, int64_t index) {
  Unit unit;
  unit.channel = index * kUnitN;
  unit.half = static_cast<int>(index % 2);
  const int64_t block = index / 2, lane = unit.half * kUnitN, at = block * task.groups * kBlockN + lane;
  unit.weight = task.weight + block * block_bytes;
  unit.scale = task.scale + at;
  unit.zero_scale = task.zero_scale == nullptr ? nullptr : task.zero_scale + at;
  for (int j = 0; j < 2; ++j) {
    const int64_t channel = unit.channel + 16 * j;
    unit.valid[j] = Floats::part(channels - channel);
    unit.factor[j] = static_cast<float>(1 << nested_shift<kBits>(2 * unit.half + j));
    unit.bias[j] =
        task.bias == nullptr ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(unit.valid[j], task.bias + channel);
  }
  return unit;
}

// Signed bytes by four bits of a packed byte, codes minus their zero: at 2 bits of the lower and of the
// upper code in them. At 8 bits the zero itself, 128.
struct SignedCodes {
  __m512i lower, upper;
};

template <int kBits>
SignedCodes signed_bits(int32_t zero) {
  if (kBits == 8) return {_mm512_set1_epi8(static_cast<char>(zero)), _mm512_setzero_si512()};
  alignas(16) int8_t lower[16], upper[16];
  for (int i = 0; i < 16; ++i) {
    lower[i] = static_cast<int8_t>((kBits == 2 ? i % 4 : i) - zero);
    upper[i] = static_cast<int8_t>((kBits == 2 ? i / 4 : i) - zero);
  }
  return {_mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(lower))),
          _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(upper)))};
}

// Signed bytes by a triple's low six bits, for each half of a block and quad of a step.
struct SignedTrits {
  __m512i lower[2][kTritQuads], upper[2][kTritQuads];
};

SignedTrits signed_trits(int32_t zero) {
  const __m512i low2 = _mm512_set1_epi8(3), zeros = _mm512_set1_epi8(static_cast<char>(zero));
  const auto code = [&](const uint8_t* table, unsigned shift) {
    const __m512i x = _mm512_srli_epi16(_mm512_load_si512(table), shift);
    return _mm512_sub_epi8(_mm512_and_si512(x, low2), zeros);
  };
  SignedTrits codes;
  for (int q = 0; q < kTritQuads; ++q) {
    const uint8_t* three = q < 5 ? trit_tables.three : trit_tables.three_5;
    codes.lower[0][q] = code(three, 0);
    codes.upper[0][q] = code(three, 2);
    codes.lower[1][q] = code(three, 4);
    codes.upper[1][q] = code(trit_tables.fourth[q], 6);
  }
  return codes;
}

template <int kBits>
auto signed_codes(int32_t zero) {
  if constexpr (kBits == kTrits) {
    return signed_trits(zero);
  } else {
    return signed_bits<kBits>(zero);
  }
}

// `count` quads of a half block.
template <int kBits, bool kUpperHalf>
inline void unpack_quads(const uint8_t* from, const SignedCodes& codes, int64_t count, uint8_t* to) {
  const __m512i mask = _mm512_set1_epi8(0x0f);
#pragma GCC unroll 4
  for (int64_t q = 0; q < count; ++q, from += 32 * kBits, to += 64) {
    __m512i x = _mm512_load_si512(from);
    if constexpr (kBits == 8) {
      _mm512_store_si512(to, _mm512_sub_epi8(x, codes.lower));
      _mm512_store_si512(to + kTileBytes, _mm512_sub_epi8(_mm512_load_si512(from + 64), codes.lower));
    } else if constexpr (kBits == 4) {
      _mm512_store_si512(to, _mm512_shuffle_epi8(codes.lower, _mm512_and_si512(x, mask)));
      x = _mm512_and_si512(_mm512_srli_epi16(x, 4), mask);
      _mm512_store_si512(to + kTileBytes, _mm512_shuffle_epi8(codes.upper, x));
    } else {
      if constexpr (kUpperHalf) x = _mm512_srli_epi16(x, 4);
      x = _mm512_and_si512(x, mask);
      _mm512_store_si512(to, _mm512_shuffle_epi8(codes.lower, x));
      _mm512_store_si512(to + kTileBytes, _mm512_shuffle_epi8(codes.upper, x));
    }
  }
}

// Where the packed codes of a chunk begin.
template <int kBits>
inline const uint8_t* packed_codes(const Unit& unit, const Chunk& chunk) {
  return unit.weight + chunk.weight_offset + (kBits == 2 ? 0 : unit.half * 16 * kBits);
}

// What is behind the codes of a chunk, [2][16][64] signed bytes: codes of nothing.
inline __attribute__((always_inline)) void clear_behind(const Chunk& chunk, uint8_t* to) {
  int64_t q = chunk.quads;
  to += 64 * q;
  if (chunk.spare != 0) {  // what is multiplied by them belongs to something else
    const __mmask64 there = 0x1111111111111111ull * (0xfull >> chunk.spare);
    _mm512_store_si512(to - 64, _mm512_maskz_loadu_epi8(there, to - 64));
    _mm512_store_si512(to - 64 + kTileBytes, _mm512_maskz_loadu_epi8(there, to - 64 + kTileBytes));
  }
  for (; q < kChunkQuads; ++q, to += 64) {
    _mm512_store_si512(to, _mm512_setzero_si512());
    _mm512_store_si512(to + kTileBytes, _mm512_setzero_si512());
  }
}

// A chunk of a unit from packed codes to [2][16][64] signed bytes.
template <int kBits>
inline void unpack_signed(const Unit& unit, const Chunk& chunk, const SignedCodes& codes, uint8_t* to) {
  const uint8_t* from = packed_codes<kBits>(unit, chunk);
  int64_t q = chunk.quads;
  if (kBits == 2 && unit.half == 1) {
    unpack_quads<kBits, true>(from, codes, q, to);
  } else {
    unpack_quads<kBits, false>(from, codes, q, to);
  }
  clear_behind(chunk, to);
}

// `count` chunks of a unit, in a row.
template <int kBits>
inline void unpack_chunks(const Unit& unit, const Chunk* chunks, int64_t count, const SignedCodes& codes, uint8_t* to) {
  for (int64_t c = 0; c < count; ++c) unpack_signed<kBits>(unit, chunks[c], codes, to + c * kUnitTileBytes);
}

// `quads` quads of a half block from quad `first` on, whichever steps they lie in. Looking a triple up twice takes
// as many operations as a byte of 2-bit codes does.
template <bool kUpperHalf>
inline void unpack_trits(const uint8_t* block, const SignedTrits& codes, int64_t first, int64_t quads, uint8_t* to) {
  const int64_t end = first + quads;
  for (int64_t s = first / kTritQuads; s * kTritQuads < end; ++s) {
    const TritStep step(block + s * kTritBytes);
    const int64_t begin = s * kTritQuads - first;
    const auto unpack = [&](int q) __attribute__((always_inline)) {
      const int64_t at = begin + q;
      uint8_t* quad = to + at / kChunkQuads * kUnitTileBytes + at % kChunkQuads * 64;
      const __m512i upper = !kUpperHalf ? step.x[q] : q < 3 ? step.x6 : step.x7;
      _mm512_store_si512(quad, _mm512_permutexvar_epi8(step.x[q], codes.lower[kUpperHalf][q]));
      _mm512_store_si512(quad + kTileBytes, _mm512_permutexvar_epi8(upper, codes.upper[kUpperHalf][q]));
    };
    if (begin >= 0 && begin + kTritQuads <= quads) {
#pragma GCC unroll 6
      for (int q = 0; q < kTritQuads; ++q) unpack(q);
    } else {
#pragma GCC unroll 6
      for (int q = 0; q < kTritQuads; ++q) {
        if (begin + q >= 0 && begin + q < quads) unpack(q);
      }
    }
  }
}

// The quad of its block that a chunk of trits begins with: list_chunks counts 32 bytes a quad and bit.
inline int64_t first_quad(const Chunk& chunk) { return chunk.weight_offset / 32; }

template <int kBits>
inline void unpack_chunks(const Unit& unit, const Chunk* chunks, int64_t count, const SignedTrits& codes, uint8_t* to) {
  const Chunk& last = chunks[count - 1];
  const int64_t first = first_quad(chunks[0]), quads = first_quad(last) + last.quads - first;
  if (unit.half == 1) {
    unpack_trits<true>(unit.weight, codes, first, quads, to);
  } else {
    unpack_trits<false>(unit.weight, codes, first, quads, to);
  }
  clear_behind(last, to + (count - 1) * kUnitTileBytes);
}

// Into L1, the lines of a chunk that quads [begin, end) of a unit lie in.
template <int kBits>
inline void fetch_codes(const Unit& unit, const Chunk& chunk, int64_t begin, int64_t end) {
  if constexpr (kBits == kTrits) {
    const int64_t first = first_quad(chunk), last = (first + end) * kTritBytes / kTritQuads;
    int64_t line = (first + begin) * kTritBytes / kTritQuads / 64 * 64;
    for (; line < last; line += 64) _mm_prefetch(unit.weight + line, _MM_HINT_T0);
    return;
  }
  constexpr int64_t kStep = 32 * kBits;
  const uint8_t* from = packed_codes<kBits>(unit, chunk);
  for (int64_t q = begin; q < end; ++q) {
    _mm_prefetch(from + q * kStep, _MM_HINT_T0);
    if (kBits == 8) _mm_prefetch(from + q * kStep + 64, _MM_HINT_T0);
  }
}

}  // namespace
}  // namespace bantamweight
