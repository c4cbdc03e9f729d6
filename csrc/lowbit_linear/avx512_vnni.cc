// AVX-512 VNNI over the nested-mask layout.
//
// A block is 64 channels. At 2 bits a 64-byte row holds 4 k of all of them: byte (lane, kk) is
// c0 | c1 << 2 | c2 << 4 | c3 << 6, c_j being the code of channel lane + 16 j. vpdpbusd on the
// masked row gives S0 from x & 03, S0 + 4 S1 from x & 0f, .. , and S0 + .. + 64 S3 from x itself:
// exact in int32, without a shift. One subtraction a channel and group takes the sums apart and
// the powers of four are divided out of the scales. 4 bits: two rows, x & 0f and x. 8 bits: four
// rows as they are. 3 bits use the 4-bit rows.
//
// Per 256 weights at 2 bits (64 bytes, a quarter of a byte a weight): 1 load, 3 and, and for each
// row of activations 1 broadcast from memory and 4 vpdpbusd; 4 bits: 2 loads, 2 and. One row is
// bound by ports 0 and 5 (3.5 cycles for 64 bytes) while the weights are in L2, by memory beyond
// it. Six rows share the masks: 24 of 27 operations are products, which reached 690 to 730 GOPS
// where vpdpbusd alone reaches 830 (Sapphire Rapids, 3.2 GHz).
//
// Tried and slower: activations as embedded broadcasts (one load for every product instead of one
// for four: 717 GOPS at best); float outputs in registers across the groups (GCC 12 spills the
// integer sums: 250 GOPS).
#include "lowbit_linear/lowbit_linear.h"

#if defined(__AVX512VNNI__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#include "lowbit_linear/finish_avx512.h"

namespace bantamweight {
namespace {

constexpr int64_t kBlockN = 64;

int layout_bits(int bits) { return bits == 3 ? 4 : bits; }

// Bytes of 4 k of a block.
int64_t quad_bytes(int bits) { return 32 * layout_bits(bits); }

int64_t quads_of(const KPiece& piece) { return (piece.k_size + 3) / 4; }

int64_t block_bytes(int bits, const KPiece* pieces, int64_t piece_count) {
  int64_t quads = 0;
  for (int64_t p = 0; p < piece_count; ++p) quads += quads_of(pieces[p]);
  return quads * quad_bytes(bits);
}

// Where the code of a channel lies among the bytes of its quad: `row` of 64 bytes and `shift`.
struct Place {
  int64_t row;
  int shift;
};

Place place_of(int bits, int64_t lane) {
  const auto j = static_cast<int>(lane / 16);
  if (bits == 2) return {0, 2 * j};
  if (bits == 8) return {j, 0};
  return {j / 2, 4 * (j % 2)};
}

float lane_factor(int bits, int64_t lane) { return static_cast<float>(1 << place_of(bits, lane).shift); }

void pack_block(int bits, const KPiece* pieces, int64_t piece_count, const uint8_t* codes, int64_t ldk, int64_t valid_n,
                uint8_t* block) {
  const int64_t step = quad_bytes(bits), bytes = block_bytes(bits, pieces, piece_count);
  for (int64_t i = 0; i < bytes; ++i) block[i] = 0;
  for (int64_t p = 0; p < piece_count; block += quads_of(pieces[p]) * step, ++p) {
    for (int64_t lane = 0; lane < valid_n; ++lane) {
      const Place at = place_of(bits, lane);
      const uint8_t* from = codes + lane * ldk + pieces[p].k_begin;
      uint8_t* to = block + at.row * 64 + lane % 16 * 4;
      for (int64_t k = 0; k < pieces[p].k_size; ++k) {
        uint8_t& byte = to[k / 4 * step + k % 4];
        byte = static_cast<uint8_t>(byte | from[k] << at.shift);
      }
    }
  }
}

void unpack_block(int bits, const KPiece* pieces, int64_t piece_count, const uint8_t* block, int64_t ldk,
                  int64_t valid_n, uint8_t* codes) {
  const int64_t step = quad_bytes(bits);
  const int mask = (1 << layout_bits(bits)) - 1;
  for (int64_t p = 0; p < piece_count; block += quads_of(pieces[p]) * step, ++p) {
    for (int64_t lane = 0; lane < valid_n; ++lane) {
      const Place at = place_of(bits, lane);
      const uint8_t* from = block + at.row * 64 + lane % 16 * 4;
      uint8_t* to = codes + lane * ldk + pieces[p].k_begin;
      for (int64_t k = 0; k < pieces[p].k_size; ++k) {
        to[k] = static_cast<uint8_t>(from[k / 4 * step + k % 4] >> at.shift & mask);
      }
    }
  }
}

// As assembly because GCC 12 copies the accumulator around the intrinsic.
inline void multiply_add(__m512i& sum, __m512i codes, __m512i activations) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(activations));
}

// Sums of `quads` quads of one piece into sums [kRows][64]; added to what is there unless `first`.
template <int kBits, int kRows>
inline void sum_piece(const uint8_t* weight, const int8_t* const* rows, int64_t row_offset, int64_t quads, bool first,
                      int32_t* sums) {
  constexpr int64_t kStep = 32 * kBits, kPrefetch = 1024;
  // vpdpbusd takes 5 cycles and two start a cycle: few rows need more than one set of sums.
  constexpr int kSets = kRows == 1 ? 4 : kRows == 2 ? 2 : 1;
  const __m512i low2 = _mm512_set1_epi8(0x03), low4 = _mm512_set1_epi8(0x0f), low6 = _mm512_set1_epi8(0x3f);
  const int8_t* a[kRows];
  __m512i s[kSets][kRows][4];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    a[r] = rows[r] + row_offset;
#pragma GCC unroll 4
    for (int set = 0; set < kSets; ++set) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) s[set][r][j] = _mm512_setzero_si512();
    }
  }
  const auto quad = [&](__m512i(&into)[kRows][4], int64_t q) __attribute__((always_inline)) {
    const uint8_t* w = weight + q * kStep;
    __m512i x[4];
    if constexpr (kBits == 2) {
      x[3] = _mm512_load_si512(w);
      x[0] = _mm512_and_si512(x[3], low2);
      x[1] = _mm512_and_si512(x[3], low4);
      x[2] = _mm512_and_si512(x[3], low6);
    } else if constexpr (kBits == 4) {
      x[1] = _mm512_load_si512(w);
      x[3] = _mm512_load_si512(w + 64);
      x[0] = _mm512_and_si512(x[1], low4);
      x[2] = _mm512_and_si512(x[3], low4);
    } else {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) x[j] = _mm512_load_si512(w + 64 * j);
    }
#pragma GCC unroll 4
    for (int64_t line = 0; line < kStep; line += 64) _mm_prefetch(w + kPrefetch + line, _MM_HINT_T0);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      int32_t four;
      __builtin_memcpy(&four, a[r] + 4 * q, 4);
      const __m512i activations = _mm512_set1_epi32(four);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) multiply_add(into[r][j], x[j], activations);
    }
  };
  int64_t q = 0;
  for (; q + kSets <= quads; q += kSets) {
#pragma GCC unroll 4
    for (int set = 0; set < kSets; ++set) quad(s[set], q + set);
  }
  if constexpr (kSets > 1) {
    for (; q < quads; ++q) quad(s[0], q);
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
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
template <int kBits, int kRows>
void run_rows(const TileTask& task, int64_t first_row) {
  alignas(64) int32_t sums[kRows * 64];
  alignas(64) float partial[kRows * 64];
  const uint8_t* weight = task.weight;
  for (int64_t p = 0; p < task.piece_count;) {
    const int64_t group = task.pieces[p].group;
    for (bool first = true; p < task.piece_count && task.pieces[p].group == group; ++p, first = false) {
      const int64_t quads = quads_of(task.pieces[p]);
      sum_piece<kBits, kRows>(weight, task.rows + first_row, task.pieces[p].row_offset, quads, first, sums);
      weight += quads * 32 * kBits;
    }
    finish_group<kBits>(task, group, first_row, kRows, sums, partial);
  }
}

template <int kBits>
void run_bits(const TileTask& task) {
  constexpr int64_t kMaxRows = 6;
  // Tiles of nearly equal height: 8 rows as 4 + 4 rather than 6 + 2.
  const int64_t tiles = (task.row_count + kMaxRows - 1) / kMaxRows;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t row = task.row_count * t / tiles;
    switch (task.row_count * (t + 1) / tiles - row) {
      case 1:
        run_rows<kBits, 1>(task, row);
        break;
      case 2:
        run_rows<kBits, 2>(task, row);
        break;
      case 3:
        run_rows<kBits, 3>(task, row);
        break;
      case 4:
        run_rows<kBits, 4>(task, row);
        break;
      case 5:
        run_rows<kBits, 5>(task, row);
        break;
      default:
        run_rows<kBits, 6>(task, row);
    }
  }
}

void run(int bits, const TileTask& task) {
  if (task.piece_count == 0) {
    write_bias(task);
  } else if (bits == 2) {
    run_bits<2>(task);
  } else if (bits == 8) {
    run_bits<8>(task);
  } else {
    run_bits<4>(task);
  }
}

constexpr LinearKernel kernel = {Isa::avx512_vnni, kBlockN, block_bytes, lane_factor, pack_block, unpack_block, run};

}  // namespace

const LinearKernel* linear_kernel_avx512_vnni() { return &kernel; }

}  // namespace bantamweight

#else

namespace bantamweight {
const LinearKernel* linear_kernel_avx512_vnni() { return nullptr; }
}  // namespace bantamweight

#endif
