// Units of 32 channels, whose codes are unpacked once for many rows: what amx_panel.h and
// amx_long_groups.h share. For amx.cc only: everything is in an unnamed namespace.
//
// Unpacked, codes are signed bytes, codes minus their zero, so that the zero costs nothing. Two tiles of
// them against two of activations go into four tiles of sums, 32 rows x 32 channels: a product costs one
// tile load.
#pragma once

#include "lowbit_linear/amx_chunks.h"
#include "lowbit_linear/finish_avx512.h"

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
SignedCodes signed_codes(int32_t zero) {
  if (kBits == 8) return {_mm512_set1_epi8(static_cast<char>(zero)), _mm512_setzero_si512()};
  alignas(16) int8_t lower[16], upper[16];
  for (int i = 0; i < 16; ++i) {
    lower[i] = static_cast<int8_t>((kBits == 2 ? i % 4 : i) - zero);
    upper[i] = static_cast<int8_t>((kBits == 2 ? i / 4 : i) - zero);
  }
  return {_mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(lower))),
          _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(upper)))};
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
  to += 64 * q;
  if (chunk.spare != 0) {  // what is multiplied by them belongs to something else
    const __mmask64 there = 0x1111111111111111ull * (0xfull >> chunk.spare);
    _mm512_store_si512(to - 64, _mm512_maskz_loadu_epi8(there, to - 64));
    _mm512_store_si512(to - 64 + kTileBytes, _mm512_maskz_loadu_epi8(there, to - 64 + kTileBytes));
  }
  for (; q < kChunkQuads; ++q, to += 64) {  // behind the end of a piece: codes of nothing
    _mm512_store_si512(to, _mm512_setzero_si512());
    _mm512_store_si512(to + kTileBytes, _mm512_setzero_si512());
  }
}

// Into L1, the lines of a chunk that quads [begin, end) of a unit lie in.
template <int kBits>
inline void fetch_codes(const Unit& unit, const Chunk& chunk, int64_t begin, int64_t end) {
  constexpr int64_t kStep = 32 * kBits;
  const uint8_t* from = packed_codes<kBits>(unit, chunk);
  for (int64_t q = begin; q < end; ++q) {
    _mm_prefetch(from + q * kStep, _MM_HINT_T0);
    if (kBits == 8) _mm_prefetch(from + q * kStep + 64, _MM_HINT_T0);
  }
}

}  // namespace
}  // namespace bantamweight
