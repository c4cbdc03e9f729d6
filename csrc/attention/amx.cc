// AMX-BF16: sixteen queries at a time, q, k, v and the probabilities rounded to bfloat16, sums and softmax in float32.
//
// A product of tiles, 16 x 32 by 32 x 16 bfloat16, takes 16 cycles. Keys and values are brought into the order of its
// right operand once a head: pairs of a key's elements, one key behind the other, which is a transposition of 16 x 16
// pairs; and pairs of keys of each of a value's elements. Scores and probabilities pass through L1.
//
// 128 keys of 32 elements: 64 + 64 products a head are 2,000 cycles, the exponentials of heads.h 10,000: they bound it.
#include "attention/attention.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__AVX512DQ__)
#include "attention/heads.h"
#include "runtime/floats_avx512.h"
#include "runtime/tiles_amx.h"

namespace bantamweight {
namespace {

constexpr int64_t kTileFloats = 16, kDepth = 32, kTile = kTileBytes / 2;  // columns of sums; bfloat16 in a row, a tile
constexpr int64_t kSums = 4;                                              // tiles at a time

#define TILE_MULTIPLY_BF16(sum, left, right) \
  __asm__ volatile("tdpbf16ps %%tmm" #right ", %%tmm" #left ", %%tmm" #sum::: "memory")

constexpr int64_t round_up(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

struct Sizes {
  int64_t keys, depth, width;  // padded: keys to 32, elements to 32 as depth and to 16 as width
  Sizes(int64_t keys_, int64_t head_size)
      : keys(round_up(keys_, kDepth)), depth(round_up(head_size, kDepth)), width(attention_padded(head_size)) {}
  int64_t key_tiles() const { return keys / 16 * (depth / kDepth); }
  int64_t value_tiles() const { return keys / kDepth * (width / kTileFloats); }
};

int64_t scratch_floats(int64_t keys, int64_t head_size) {
  const Sizes sizes(keys, head_size);
  const int64_t tiles = sizes.key_tiles() + sizes.value_tiles() + sizes.depth / kDepth + kSums;
  return tiles * (kTile / 2) + (16 + 8 + 1) * sizes.keys;
}

// 16 floats of a row, zeros behind `count` of them, as bfloat16 in the low halves of 32 bits.
inline __m512i rounded(const float* from, int64_t count) {
  const __m256bh sixteen = _mm512_cvtneps_pbh(Floats::load(from, Floats::part(count)));
  __m256i bits;
  __builtin_memcpy(&bits, &sixteen, sizeof bits);
  return _mm512_cvtepu16_epi32(bits);
}

// 32 floats of a row, zeros behind `count` of them, as bfloat16.
inline __m512i rounded_pairs(const float* from, int64_t count) {
  const __m512bh both =
      _mm512_cvtne2ps_pbh(Floats::load(from + 16, Floats::part(count - 16)), Floats::load(from, Floats::part(count)));
  __m512i bits;
  __builtin_memcpy(&bits, &both, sizeof bits);
  return bits;
}

// Sixteen rows of sixteen 32-bit elements.
inline void transpose(__m512i (&row)[16]) {
  __m512i x[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    x[i] = _mm512_unpacklo_epi32(row[i], row[i + 1]);
    x[i + 1] = _mm512_unpackhi_epi32(row[i], row[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    row[i] = _mm512_unpacklo_epi64(x[i], x[i + 2]);
    row[i + 1] = _mm512_unpackhi_epi64(x[i], x[i + 2]);
    row[i + 2] = _mm512_unpacklo_epi64(x[i + 1], x[i + 3]);
    row[i + 3] = _mm512_unpackhi_epi64(x[i + 1], x[i + 3]);
  }
  // Lane l of row 4 g + c now holds column 4 l + c of rows 4 g .. 4 g + 3.
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512i low = _mm512_shuffle_i32x4(row[c], row[4 + c], 0x88);
    const __m512i high = _mm512_shuffle_i32x4(row[c], row[4 + c], 0xdd);
    const __m512i low2 = _mm512_shuffle_i32x4(row[8 + c], row[12 + c], 0x88);
    const __m512i high2 = _mm512_shuffle_i32x4(row[8 + c], row[12 + c], 0xdd);
    x[c] = _mm512_shuffle_i32x4(low, low2, 0x88);
    x[4 + c] = _mm512_shuffle_i32x4(high, high2, 0x88);
    x[8 + c] = _mm512_shuffle_i32x4(low, low2, 0xdd);
    x[12 + c] = _mm512_shuffle_i32x4(high, high2, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) row[i] = x[i];
}

// Keys as tiles [keys / 16][depth / 32] of pairs of elements [16][16 keys].
void order_keys(const AttentionTask& task, const Sizes& sizes, uint16_t* to) {
  for (int64_t first = 0; first < sizes.keys; first += 16) {
    for (int64_t e = 0; e < sizes.depth; e += kDepth, to += kTile) {
      __m512i row[16];
      for (int64_t j = 0; j < 16; ++j) {
        const bool there = first + j < task.keys;
        const float* from = task.k + (first + j) * task.ldk + e;
        if (there) __builtin_prefetch(from + task.head_size);
        if (there) __builtin_prefetch(from + task.head_size + 16);
        row[j] = there ? rounded_pairs(from, task.head_size - e) : _mm512_setzero_si512();
      }
      transpose(row);
      for (int64_t j = 0; j < 16; ++j) _mm512_store_si512(to + 32 * j, row[j]);
    }
  }
}

// Values as tiles [keys / 32][width / 16] of pairs of keys [16][16 elements].
void order_values(const AttentionTask& task, const Sizes& sizes, uint16_t* to) {
  for (int64_t first = 0; first < sizes.keys; first += kDepth) {
    for (int64_t e = 0; e < sizes.width; e += kTileFloats) {
      for (int64_t j = first; j < first + kDepth; j += 2, to += 32) {
        __m512i pair[2];
        for (int64_t i = 0; i < 2; ++i) {
          const float* from = task.v + (j + i) * task.ldv + e;
          const bool there = j + i < task.keys;
          if (there) __builtin_prefetch(from + task.head_size);
          pair[i] = there ? rounded(from, task.head_size - e) : _mm512_setzero_si512();
        }
        _mm512_store_si512(to, _mm512_or_si512(pair[0], _mm512_slli_epi32(pair[1], 16)));
      }
    }
  }
}

// sums [16][ldc] = left [16][depth] times up to four tiles side by side of `right`, whose tiles of the next 32 of the
// depth stand `step` tiles on.
void multiply(const uint16_t* left, int64_t left_bytes, int64_t depth, const uint16_t* right, int64_t between,
              int64_t step, int64_t tiles, float* sums, int64_t ldc) {
  TILE_ZERO(0);
  TILE_ZERO(1);
  TILE_ZERO(2);
  TILE_ZERO(3);
  for (int64_t d = 0; d < depth; d += kDepth, right += step * kTile) {
    TILE_LOAD(4, left + d, left_bytes);
    TILE_LOAD(5, right, 64);
    TILE_MULTIPLY_BF16(0, 4, 5);
    if (tiles < 2) continue;
    TILE_LOAD(6, right + between * kTile, 64);
    TILE_MULTIPLY_BF16(1, 4, 6);
    if (tiles < 3) continue;
    TILE_LOAD(7, right + 2 * between * kTile, 64);
    TILE_MULTIPLY_BF16(2, 4, 7);
    if (tiles < 4) continue;
    TILE_LOAD(5, right + 3 * between * kTile, 64);
    TILE_MULTIPLY_BF16(3, 4, 5);
  }
  TILE_STORE(0, sums, 4 * ldc);
  if (tiles > 1) TILE_STORE(1, sums + 16, 4 * ldc);
  if (tiles > 2) TILE_STORE(2, sums + 32, 4 * ldc);
  if (tiles > 3) TILE_STORE(3, sums + 48, 4 * ldc);
}

bool run(const AttentionTask& task) {
  const Sizes sizes(task.keys, task.head_size);
  const int64_t depths = sizes.depth / kDepth, widths = sizes.width / kTileFloats, key_tiles = sizes.keys / 16;
  auto* keys = reinterpret_cast<uint16_t*>(task.scratch);
  uint16_t* values = keys + sizes.key_tiles() * kTile;
  uint16_t* queries = values + sizes.value_tiles() * kTile;  // [16][depth]
  auto* outputs = reinterpret_cast<float*>(queries + depths * kTile);
  float* scores = outputs + kSums * kTile / 2;                                  // [16][keys]
  auto* probabilities = reinterpret_cast<uint16_t*>(scores + 16 * sizes.keys);  // [16][keys]
  float* mask = scores + (16 + 8) * sizes.keys;
  order_keys(task, sizes, keys);
  order_values(task, sizes, values);
  const bool one_mask = task.mask == nullptr || task.ldm == 0;
  if (one_mask && !pad_mask(task.mask, task.keys, sizes.keys, mask)) return false;
  auto poison = Floats::all(0.0f);
  configure(kTileRows);
  for (int64_t first = 0; first < task.queries; first += kTileRows) {
    const int64_t rows = task.queries - first < kTileRows ? task.queries - first : kTileRows;
    for (int64_t r = 0; r < kTileRows; ++r) {
      const float* q = task.q + (first + r) * task.ldq;
      for (int64_t e = 0; e < sizes.depth; e += kDepth) {
        if (r < rows) __builtin_prefetch(q + task.head_size + e);
        _mm512_store_si512(queries + r * sizes.depth + e,
                           r < rows ? rounded_pairs(q + e, task.head_size - e) : _mm512_setzero_si512());
      }
    }
    for (int64_t j = 0; j < key_tiles; j += kSums) {
      multiply(queries, 2 * sizes.depth, sizes.depth, keys + j * depths * kTile, depths, 1,
               key_tiles - j < kSums ? key_tiles - j : kSums, scores + 16 * j, sizes.keys);
    }
    float inverse[kTileRows];
    for (int64_t r = 0; r < rows; ++r) {
      if (!one_mask && !pad_mask(task.mask + (first + r) * task.ldm, task.keys, sizes.keys, mask)) {
        release_tiles();
        return false;
      }
      float* score = scores + r * sizes.keys;
      inverse[r] = exponentials<Floats>(score, mask, sizes.keys, task.scale, &poison);
      for (int64_t j = 0; j < sizes.keys; j += kDepth) {
        _mm512_store_si512(probabilities + r * sizes.keys + j, rounded_pairs(score + j, kDepth));
      }
    }
    for (int64_t c = 0; c < widths; c += kSums) {
      multiply(probabilities, 2 * sizes.keys, sizes.keys, values + c * kTile, 1, widths,
               widths - c < kSums ? widths - c : kSums, outputs, 16 * kSums);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t from = c * kTileFloats;
        for (int64_t i = 0; i < kSums && from + 16 * i < task.head_size; ++i) {
          const auto y = Floats::multiply(Floats::load(outputs + (r * kSums + i) * 16), Floats::all(inverse[r]));
          Floats::store(task.out + (first + r) * task.ldo + from + 16 * i, y,
                        Floats::part(task.head_size - from - 16 * i));
        }
      }
    }
  }
  release_tiles();
  return Floats::sum(poison) == 0.0f;
}

constexpr AttentionKernel kernel = {Isa::amx, scratch_floats, run};

}  // namespace

const AttentionKernel* attention_amx() { return &kernel; }

}  // namespace bantamweight

#else

namespace bantamweight {
const AttentionKernel* attention_amx() { return nullptr; }
}  // namespace bantamweight

#endif
