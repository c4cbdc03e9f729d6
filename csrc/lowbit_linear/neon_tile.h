// What the AArch64 variants share: the nested bytes of a block of 16 channels, the walk over rows,
// groups and pieces, and the float epilogue. Each variant supplies the integer sums of a piece.
//
// Included by ISA files only. Everything is in an unnamed namespace, so that no function compiled
// with one file's instructions can stand in for another's at link time.
//
// Nesting. A byte holds the codes of several channels at one k, the first in the low bits. Masking
// off all above the j-th code and summing byte * activation gives S0 + F S1 + .. + F^j Sj, where
// F = 2^bits and Sj is channel j's sum; the one before it is subtracted once a group, and F^j is
// divided out of the scale (lane_factor). So no code is ever shifted into place:
//   2 bits  channels c, c+4, c+8, c+12     masks 03 0F 3F none
//   4 bits  channels c, c+4                masks 0F none
//   3 bits  channels c, c+4                masks 07 3F; the two spare bits of three bytes are a
//                                          fourth byte, put together by two SRI and a shift
//   8 bits  one code
#pragma once

#include <arm_neon.h>

#include <cstring>

#include "lowbit_linear/lowbit_linear.h"

#define BANTAMWEIGHT_INLINE __attribute__((always_inline)) inline

namespace bantamweight {
namespace {

constexpr int64_t kBlockN = 16;
constexpr int64_t kVector = 16;  // bytes

constexpr int nests_of(int bits) { return bits == 2 ? 4 : bits == 8 ? 1 : 2; }

// What channel `lane`'s sum comes multiplied by. Channels are in quads; a quad shares its nest.
constexpr int32_t factor_of(int bits, int64_t lane) {
  return 1 << (bits * static_cast<int>(lane / 4 % nests_of(bits)));
}

float lane_factor(int bits, int64_t lane) { return static_cast<float>(factor_of(bits, lane)); }

// ---- Packing -----------------------------------------------------------------------------------

// Where a code stands in a piece, before 3 bits are squeezed: which vector, byte and nest.
struct Place {
  int64_t vector;
  int byte, nest;
};

// 3 bits: of every four vectors only three are stored, the fourth in their spare bits.
BANTAMWEIGHT_INLINE bool in_spare_bits(int bits, const Place& at) { return bits == 3 && at.vector % 4 == 3; }

BANTAMWEIGHT_INLINE int64_t byte_offset(int bits, const Place& at) {
  const int64_t vector = bits == 3 ? at.vector / 4 * 3 + at.vector % 4 : at.vector;
  return vector * kVector + at.byte;
}

// A signed dot product reads the top bit of an unmasked byte as -128: the top code is stored with
// that bit flipped, which makes the byte 128 less than it should be, on every real k; the sum of
// the activations times 128 makes up for it exactly.
template <class Variant>
BANTAMWEIGHT_INLINE int flip_of(int bits, const Place& at) {
  return Variant::kSigned && bits != 3 && at.nest == nests_of(bits) - 1 ? 1 << (bits - 1) : 0;
}

template <class Variant>
int64_t piece_bytes(int bits, int64_t k_size) {
  const int64_t align = Variant::k_align(bits);
  return (k_size + align - 1) / align * align * bits / 8 * kBlockN;
}

template <class Variant>
int64_t block_bytes(int bits, const KPiece* pieces, int64_t piece_count) {
  int64_t bytes = 0;
  for (int64_t p = 0; p < piece_count; ++p) bytes += piece_bytes<Variant>(bits, pieces[p].k_size);
  return bytes;
}

// k past the end of a piece is a stored 0, which adds nothing whatever the activation there is.
template <class Variant>
void pack_block(int bits, const KPiece* pieces, int64_t piece_count, const uint8_t* codes, int64_t ldk, int64_t valid_n,
                uint8_t* block) {
  std::memset(block, 0, static_cast<size_t>(block_bytes<Variant>(bits, pieces, piece_count)));
  for (int64_t p = 0; p < piece_count; ++p) {
    for (int64_t n = 0; n < valid_n; ++n) {
      const uint8_t* row = codes + n * ldk + pieces[p].k_begin;
      for (int64_t k = 0; k < pieces[p].k_size; ++k) {
        const Place at = Variant::place(bits, n, k);
        const int code = (row[k] ^ flip_of<Variant>(bits, at)) << (bits * at.nest);
        if (in_spare_bits(bits, at)) {
          for (int part = 0; part < 3; ++part) {
            uint8_t& byte = block[byte_offset(bits, {at.vector - 3 + part, at.byte, 0})];
            byte = static_cast<uint8_t>(byte | (code >> (2 * part) & 3) << 6);
          }
        } else {
          uint8_t& byte = block[byte_offset(bits, at)];
          byte = static_cast<uint8_t>(byte | code);
        }
      }
    }
    block += piece_bytes<Variant>(bits, pieces[p].k_size);
  }
}

template <class Variant>
void unpack_block(int bits, const KPiece* pieces, int64_t piece_count, const uint8_t* block, int64_t ldk,
                  int64_t valid_n, uint8_t* codes) {
  for (int64_t p = 0; p < piece_count; ++p) {
    for (int64_t n = 0; n < valid_n; ++n) {
      uint8_t* row = codes + n * ldk + pieces[p].k_begin;
      for (int64_t k = 0; k < pieces[p].k_size; ++k) {
        const Place at = Variant::place(bits, n, k);
        int byte = 0;
        if (in_spare_bits(bits, at)) {
          for (int part = 0; part < 3; ++part) {
            byte |= block[byte_offset(bits, {at.vector - 3 + part, at.byte, 0})] >> 6 << (2 * part);
          }
        } else {
          byte = block[byte_offset(bits, at)];
        }
        const int code = byte >> (bits * at.nest) & ((1 << bits) - 1);
        row[k] = static_cast<uint8_t>(code ^ flip_of<Variant>(bits, at));
      }
    }
    block += piece_bytes<Variant>(bits, pieces[p].k_size);
  }
}

// ---- Running -----------------------------------------------------------------------------------

// The fourth vector of a 3-bit step: two bits each from the tops of x0, x1 and x2.
BANTAMWEIGHT_INLINE uint8x16_t spare_bits(uint8x16_t x0, uint8x16_t x1, uint8x16_t x2) {
  return vshrq_n_u8(vsriq_n_u8(x2, vsriq_n_u8(x1, x0, 2), 2), 2);
}

// Nested sums of four quads of channels to factor_of() times each channel's own sum.
template <int kBits>
BANTAMWEIGHT_INLINE void unnest(int32x4_t (&dot)[4]) {
  if (kBits == 2) {
    dot[3] = vsubq_s32(dot[3], dot[2]);
    dot[2] = vsubq_s32(dot[2], dot[1]);
    dot[1] = vsubq_s32(dot[1], dot[0]);
  } else if (kBits != 8) {
    dot[1] = vsubq_s32(dot[1], dot[0]);
    dot[3] = vsubq_s32(dot[3], dot[2]);
  }
}

// What an activation adds to the sum of quad j beyond code * activation, in lane j: the flipped bit,
// less the zero that all channels share.
template <class Variant, int kBits>
BANTAMWEIGHT_INLINE int32x4_t row_sum_factors(const TileTask& task) {
  int32_t factor[4];
  for (int j = 0; j < 4; ++j) {
    factor[j] = Variant::kSigned && kBits != 3 && j % nests_of(kBits) == nests_of(kBits) - 1 ? 128 : 0;
    if (task.zero_scale == nullptr) factor[j] -= task.uniform_zero * factor_of(kBits, 4 * j);
  }
  return vld1q_s32(factor);
}

// One group of one row into its float sums, in the order of reference.cc.
template <int kBits>
BANTAMWEIGHT_INLINE void add_group(const TileTask& task, int64_t group, int64_t row, int32x4_t factor,
                                   int32x4_t (&dot)[4], float32x4_t (&sum)[4]) {
  const int64_t at = row * task.groups + group;
  const int32x4_t row_sum = vld1q_dup_s32(task.row_sums + at);
  const float group_scale = task.group_scale == nullptr ? 1.0f : task.group_scale[at];
  unnest<kBits>(dot);
  const float* scale = task.scale + group * kBlockN;
  dot[0] = vmlaq_laneq_s32(dot[0], row_sum, factor, 0);
  dot[1] = vmlaq_laneq_s32(dot[1], row_sum, factor, 1);
  dot[2] = vmlaq_laneq_s32(dot[2], row_sum, factor, 2);
  dot[3] = vmlaq_laneq_s32(dot[3], row_sum, factor, 3);
  for (int j = 0; j < 4; ++j) {
    sum[j] = vfmaq_f32(sum[j], vmulq_n_f32(vcvtq_f32_s32(dot[j]), group_scale), vld1q_f32(scale + 4 * j));
  }
  if (task.zero_scale != nullptr) {
    const float32x4_t zero = vmulq_n_f32(vcvtq_f32_s32(row_sum), group_scale);
    const float* zero_scale = task.zero_scale + group * kBlockN;
    for (int j = 0; j < 4; ++j) sum[j] = vfmsq_f32(sum[j], vld1q_f32(zero_scale + 4 * j), zero);
  }
}

// kRows rows from `first` on against the block. Not inlined: on its own its accumulators stay in
// registers, which they did not inside run(). Six rows spill on either variant.
template <class Variant, int kBits, int kRows>
__attribute__((noinline)) void tile(const TileTask& task, int64_t first, const float (&bias)[kBlockN]) {
  const uint8_t* weight = task.weight;
  float32x4_t sum[kRows][4];
  for (int r = 0; r < kRows; ++r) {
    for (int j = 0; j < 4; ++j) sum[r][j] = vdupq_n_f32(0.0f);
  }
  const int32x4_t factor = row_sum_factors<Variant, kBits>(task);
  int64_t p = 0;
  for (int64_t g = 0; g < task.groups; ++g) {
    typename Variant::template Sums<kBits, kRows> sums;
    for (; p < task.piece_count && task.pieces[p].group == g; ++p) {
      const KPiece& piece = task.pieces[p];
      const int8_t* rows[kRows];
      for (int r = 0; r < kRows; ++r) rows[r] = task.rows[first + r] + piece.row_offset;
      weight = sums.add_piece(weight, rows, piece.k_size);
    }
    // Read anew: addresses kept for every row over the loop above leave it too few registers.
    const TileTask* again = &task;
    if (kRows > 1) asm("" : "+r"(again));
    for (int r = 0; r < kRows; ++r) {
      int32x4_t dot[4];
      sums.of_row(r, dot);
      add_group<kBits>(*again, g, first + r, factor, dot, sum[r]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    const float32x4_t row_scale = vdupq_n_f32(task.row_scale[first + r]);
    float* y = task.y + (first + r) * task.ldy;
    float part[kBlockN];
    float* to = task.block_n_valid == kBlockN ? y : part;
    for (int j = 0; j < 4; ++j) vst1q_f32(to + 4 * j, vfmaq_f32(vld1q_f32(bias + 4 * j), sum[r][j], row_scale));
    if (to == part) std::memcpy(y, part, static_cast<size_t>(task.block_n_valid) * sizeof(float));
  }
}

template <class Variant, int kBits>
void run_bits(const TileTask& task) {
  float bias[kBlockN] = {};
  if (task.bias != nullptr) std::memcpy(bias, task.bias, static_cast<size_t>(task.block_n_valid) * sizeof(float));
  int64_t r = 0;
  for (; r + 4 <= task.row_count; r += 4) tile<Variant, kBits, 4>(task, r, bias);
  if (r + 2 <= task.row_count) {
    tile<Variant, kBits, 2>(task, r, bias);
    r += 2;
  }
  if (r < task.row_count) tile<Variant, kBits, 1>(task, r, bias);
}

template <class Variant>
void run(int bits, const TileTask& task) {
  switch (bits) {
    case 2:
      return run_bits<Variant, 2>(task);
    case 3:
      return run_bits<Variant, 3>(task);
    case 4:
      return run_bits<Variant, 4>(task);
    default:
      return run_bits<Variant, 8>(task);
  }
}

}  // namespace
}  // namespace bantamweight
