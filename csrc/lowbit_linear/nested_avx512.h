// The loops over the nested-mask layout of avx512_vnni.cc; for that file and avx512_vbmi.cc. Everything is
// in an unnamed namespace: each file keeps a copy with its own flags, of what it uses.
#pragma once

#include "lowbit_linear/finish_avx512.h"
#include "lowbit_linear/three_bits_avx512.h"

namespace bantamweight {
namespace {

constexpr int64_t kBlockN = 64;

// k of a step, and its bytes: 4 k in 32 * bits bytes, 8 k at 3 bits, 24 k in five rows as trits.
constexpr int64_t step_k(int bits) { return bits == kTrits ? 24 : bits == 3 ? 8 : 4; }
constexpr int64_t step_bytes(int bits) { return bits == kTrits ? 5 * 64 : 8 * bits * step_k(bits); }

inline int64_t steps_of(int bits, const KPiece& piece) { return (piece.k_size + step_k(bits) - 1) / step_k(bits); }

inline int64_t bytes_of(int bits, const KPiece* pieces, int64_t piece_count) {
  int64_t steps = 0;
  for (int64_t p = 0; p < piece_count; ++p) steps += steps_of(bits, pieces[p]);
  return steps * step_bytes(bits);
}

// As assembly because GCC 12 copies the accumulator around the intrinsic.
inline void multiply_add(__m512i& sum, __m512i codes, __m512i activations) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(activations));
}

// Kept in a register: GCC 12 would rather load again for every row.
inline __m512i load_once(const uint8_t* from) {
  __m512i x = _mm512_load_si512(from);
  __asm__("" : "+v"(x));
  return x;
}

constexpr int64_t kPrefetch = 1024;

// 4 k of kRows rows, from column k on, times the codes of each 16 channels.
template <int kRows, int kTiles>
__attribute__((always_inline)) inline void multiply_quad(const __m512i (&x)[4], const int8_t* const (&a)[kRows],
                                                         int64_t k, __m512i (&into)[kRows][kTiles]) {
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    int32_t four;
    __builtin_memcpy(&four, a[r] + k, 4);
    const __m512i activations = _mm512_set1_epi32(four);
#pragma GCC unroll 4
    for (int j = 0; j < kTiles; ++j) multiply_add(into[r][j], x[j], activations);
  }
}

// How a step of kBits codes is multiplied: specialized for other codes by the files that have them.
template <int kBits>
struct Step {
  // The step against the next activations of kRows rows, from column k on.
  template <int kRows, int kTiles>
  __attribute__((always_inline)) static void multiply(const uint8_t* w, const int8_t* const (&a)[kRows], int64_t k,
                                                      __m512i (&into)[kRows][kTiles]) {
    const __m512i low2 = _mm512_set1_epi8(0x03), low3 = _mm512_set1_epi8(0x07), low4 = _mm512_set1_epi8(0x0f),
                  low6 = _mm512_set1_epi8(0x3f);
    __m512i x[4];
    if constexpr (kBits == 2) {
      x[3] = load_once(w);
      x[0] = _mm512_and_si512(x[3], low2);
      x[1] = _mm512_and_si512(x[3], low4);
      x[2] = _mm512_and_si512(x[3], low6);
    } else if constexpr (kBits == 3) {
      const __m512i x0 = load_once(w), x1 = load_once(w + 64), x2 = load_once(w + 128);
      const __m512i x3 = fourth_row(x0, x1, x2);
      const __m512i next[4] = {_mm512_and_si512(x2, low3), _mm512_and_si512(x2, low6), _mm512_and_si512(x3, low3),
                               _mm512_and_si512(x3, low6)};
      multiply_quad(next, a, k + 4, into);
      x[0] = _mm512_and_si512(x0, low3);
      x[1] = _mm512_and_si512(x0, low6);
      x[2] = _mm512_and_si512(x1, low3);
      x[3] = _mm512_and_si512(x1, low6);
    } else if constexpr (kBits == 4) {
      x[1] = load_once(w);
      x[3] = load_once(w + 64);
      x[0] = _mm512_and_si512(x[1], low4);
      x[2] = _mm512_and_si512(x[3], low4);
    } else {
#pragma GCC unroll 4
      for (int j = 0; j < kTiles; ++j) x[j] = load_once(w + 64 * j);
    }
    multiply_quad(x, a, k, into);
  }
};

template <int kBits, int kRows, int kTiles>
__attribute__((always_inline)) inline void multiply_step(const uint8_t* w, const int8_t* const (&a)[kRows], int64_t k,
                                                         __m512i (&into)[kRows][kTiles]) {
  for (int64_t line = 0; line < step_bytes(kBits); line += 64) _mm_prefetch(w + kPrefetch + line, _MM_HINT_T0);
  Step<kBits>::multiply(w, a, k, into);
}

// Adds the sums of `steps` steps of one piece to the sets of accumulators, a step a set in turn.
template <int kBits, int kRows, int kTiles, int kSets>
__attribute__((always_inline)) inline void multiply_piece(const uint8_t* weight, const int8_t* const (&a)[kRows],
                                                          int64_t steps, __m512i (&s)[kSets][kRows][kTiles]) {
  int64_t at = 0;
  for (; at + kSets <= steps; at += kSets) {
#pragma GCC unroll 4
    for (int set = 0; set < kSets; ++set) {
      multiply_step<kBits>(weight + (at + set) * step_bytes(kBits), a, (at + set) * step_k(kBits), s[set]);
    }
  }
  if constexpr (kSets > 1) {
    for (; at < steps; ++at) multiply_step<kBits>(weight + at * step_bytes(kBits), a, at * step_k(kBits), s[0]);
  }
}

// Sums of `steps` steps of one piece into sums [kRows][64]; added to what is there unless `first`.
template <int kBits, int kRows, int kTiles>
inline void sum_piece(const uint8_t* weight, const int8_t* const* rows, int64_t row_offset, int64_t steps, bool first,
                      int32_t* sums) {
  // vpdpbusd takes 5 cycles and two start a cycle: few sums need more than one set of them.
  constexpr int kSums = kRows * kTiles * (kBits == 3 ? 2 : 1);
  constexpr int kSets = kSums <= 4 ? 4 : kSums < 10 ? 2 : 1;
  const int8_t* a[kRows];
  __m512i s[kSets][kRows][kTiles];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    a[r] = rows[r] + row_offset;
#pragma GCC unroll 4
    for (int set = 0; set < kSets; ++set) {
#pragma GCC unroll 4
      for (int j = 0; j < kTiles; ++j) s[set][r][j] = _mm512_setzero_si512();
    }
  }
  multiply_piece<kBits>(weight, a, steps, s);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < kTiles; ++j) {
#pragma GCC unroll 4
      for (int set = 1; set < kSets; ++set) s[0][r][j] = _mm512_add_epi32(s[0][r][j], s[set][r][j]);
      int32_t* to = sums + r * 64 + 16 * j;
      if (!first) s[0][r][j] = _mm512_add_epi32(s[0][r][j], _mm512_load_si512(to));
      _mm512_store_si512(to, s[0][r][j]);
    }
  }
}

// kRows rows against the block. The sums go through memory once a group: held in registers across
// the loop over groups, the float outputs would push the integer sums out of them.
template <int kBits, int kRows, int kTiles>
void run_rows(const TileTask& task, int64_t first_row) {
  alignas(64) int32_t sums[kRows * 64];
  alignas(64) float partial[kRows * 64];
  const uint8_t* weight = task.weight;
  for (int64_t p = 0; p < task.piece_count;) {
    const int64_t group = task.pieces[p].group;
    for (bool first = true; p < task.piece_count && task.pieces[p].group == group; ++p, first = false) {
      const int64_t steps = steps_of(kBits, task.pieces[p]);
      sum_piece<kBits, kRows, kTiles>(weight, task.rows + first_row, task.pieces[p].row_offset, steps, first, sums);
      weight += steps * step_bytes(kBits);
    }
    finish_group<kBits, kTiles>(task, group, first_row, kRows, sums, partial);
  }
}

// True where the products of channels lane + 16 (j - 1) are in the sums of lane + 16 j, too.
constexpr bool nested(int bits, int j) {
  return bits == 2 ? j > 0 : bits == kTrits ? j == 1 || j == 2 : bits != 8 && j % 2 == 1;
}

// One row against the block, outputs in registers and zeros in the sums from the start: what a group
// adds to its products is some 20 operations (4 bits), which run beside the next group's.
template <int kBits, int kTiles, bool kUniformZero>
void run_row(const TileTask& task, int64_t row) {
  constexpr int kSets = kTiles == 4 || kBits == 3 ? 2 : 4;
  const uint8_t* weight = task.weight;
  const int32_t* row_sums = task.row_sums + row * task.groups;
  __m512 out[kTiles];
#pragma GCC unroll 4
  for (int j = 0; j < kTiles; ++j) out[j] = _mm512_setzero_ps();
  for (int64_t p = 0; p < task.piece_count;) {
    const int64_t group = task.pieces[p].group;
    __m512i s[kSets][1][kTiles];
    int32_t zero = 0;
#pragma GCC unroll 4
    for (int j = 0; j < kTiles; ++j) {
      if constexpr (kUniformZero) {
        const int32_t own =
            task.uniform_zero * row_sums[group] * (kBits == 3 ? 1 + 7 * (j % 2) : 1 << nested_shift<kBits>(j));
        zero = nested(kBits, j) ? zero - own : -own;
      }
      s[0][0][j] = _mm512_set1_epi32(zero);
#pragma GCC unroll 4
      for (int set = 1; set < kSets; ++set) s[set][0][j] = _mm512_setzero_si512();
    }
    do {
      const int64_t steps = steps_of(kBits, task.pieces[p]);
      const int8_t* const a[1] = {task.rows[row] + task.pieces[p].row_offset};
      multiply_piece<kBits>(weight, a, steps, s);
      weight += steps * step_bytes(kBits);
    } while (++p < task.piece_count && task.pieces[p].group == group);
    const float group_scale = task.group_scale == nullptr ? 1.0f : task.group_scale[row * task.groups + group];
    const __m512 row_sum = _mm512_set1_ps(static_cast<float>(row_sums[group]) * group_scale);
    const float* scale = task.scale + group * kBlockN;
    const float* zero_scale = kUniformZero ? nullptr : task.zero_scale + group * kBlockN;
#pragma GCC unroll 4
    for (int j = 0; j < kTiles; ++j) {
#pragma GCC unroll 4
      for (int set = 1; set < kSets; ++set) s[0][0][j] = _mm512_add_epi32(s[0][0][j], s[set][0][j]);
    }
#pragma GCC unroll 4
    for (int j = 0; j < kTiles; ++j) {
      __m512i sum = nested(kBits, j) ? _mm512_sub_epi32(s[0][0][j], s[0][0][j - 1]) : s[0][0][j];
      if (kBits == 3 && j % 2 == 1) sum = _mm512_slli_epi32(sum, 1);  // 16 S1, as at 4 bits: both have the same scales
      __m512 product = _mm512_cvtepi32_ps(sum);
      if (task.group_scale != nullptr) product = _mm512_mul_ps(product, _mm512_set1_ps(group_scale));
      out[j] = _mm512_fmadd_ps(product, _mm512_load_ps(scale + 16 * j), out[j]);
      if constexpr (!kUniformZero) out[j] = _mm512_fnmadd_ps(_mm512_load_ps(zero_scale + 16 * j), row_sum, out[j]);
    }
  }
  const __m512 row_scale = _mm512_set1_ps(task.row_scale[row]);
  __mmask16 valid[kTiles];
#pragma GCC unroll 4
  for (int j = 0; j < kTiles; ++j) {
    valid[j] = valid_lanes(task, j);
    const __m512 bias =
        task.bias == nullptr ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(valid[j], task.bias + 16 * j);
    out[j] = _mm512_fmadd_ps(out[j], row_scale, bias);
  }
  if (task.codes.rows != nullptr) {
    store_codes<kTiles>(task, row, valid, out);
    return;
  }
#pragma GCC unroll 4
  for (int j = 0; j < kTiles; ++j) _mm512_mask_storeu_ps(task.y + row * task.ldy + 16 * j, valid[j], out[j]);
}

template <int kBits, int kTiles>
void run_tiles(const TileTask& task) {
  constexpr int64_t kMaxRows = 6;
  // Tiles of nearly equal height: 8 rows as 4 + 4 rather than 6 + 2.
  const int64_t tiles = (task.row_count + kMaxRows - 1) / kMaxRows;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t row = task.row_count * t / tiles;
    switch (task.row_count * (t + 1) / tiles - row) {
      case 1:
        task.zero_scale == nullptr ? run_row<kBits, kTiles, true>(task, row) : run_row<kBits, kTiles, false>(task, row);
        break;
      case 2:
        run_rows<kBits, 2, kTiles>(task, row);
        break;
      case 3:
        run_rows<kBits, 3, kTiles>(task, row);
        break;
      case 4:
        run_rows<kBits, 4, kTiles>(task, row);
        break;
      case 5:
        run_rows<kBits, 5, kTiles>(task, row);
        break;
      default:
        run_rows<kBits, 6, kTiles>(task, row);
    }
  }
}

// The products of channels that are not there are left out.
template <int kBits>
void run_bits(const TileTask& task) {
  if (task.block_n_valid <= 16) {
    run_tiles<kBits, 1>(task);
  } else if (task.block_n_valid <= 32) {
    run_tiles<kBits, 2>(task);
  } else {
    run_tiles<kBits, 4>(task);
  }
}

}  // namespace
}  // namespace bantamweight
