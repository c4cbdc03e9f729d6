// AVX-VNNI: vpdpbusd in 256-bit registers, for CPUs that have it and no AVX-512 (Alder Lake on), over
// the nested-mask layout of avx512_vnni.cc at half the width.
//
// A block is 32 channels. At 2 bits a 32-byte row holds 4 k of all of them: byte (lane, kk) is
// c0 | c1 << 2 | c2 << 4 | c3 << 6, c_j being the code of channel lane + 8 j. vpdpbusd on the masked
// row gives S0 from x & 03, S0 + 4 S1 from x & 0f, .. , exact in int32 and without a shift. 4 bits:
// two rows, x & 0f and x. 8 bits: four rows as they are. 3 bits use the 4-bit rows.
//
// Per 256 weights at 2 bits (64 bytes, a quarter of a byte a weight): 2 loads, 6 and, and for each row
// of activations 4 broadcasts from memory and 8 vpdpbusd; 4 bits: 4 loads, 4 and; 8 bits: 8 loads. One
// row is bound by the vector ports while the weights are in L2, by memory beyond it. Three rows share
// the masks and are bound by the two ports that multiply: 380 to 405 GOPS where vpdpbusd alone reaches
// 515 (Sapphire Rapids, 3.7 GHz) and vpmaddubsw with vpaddw 360.
//
// Tried and slower: without `volatile` on the products and broadcasts GCC 12 merges the broadcasts of
// the two halves and spills two sums for it (250 GOPS); two quads a turn of the loop (spills, 300).
#include "lowbit_linear/lowbit_linear.h"

#if defined(__AVXVNNI__) && defined(__AVX2__) && defined(__FMA__)
#include "lowbit_linear/finish_avx2.h"
#include "lowbit_linear/tiles.h"

namespace bantamweight {
namespace {

constexpr int64_t kBlockN = 32;

int layout_bits(int bits) { return bits == 3 ? 4 : bits; }

// Bytes of 4 k of a block.
int64_t quad_bytes(int bits) { return 16 * layout_bits(bits); }

int64_t quads_of(const KPiece& piece) { return (piece.k_size + 3) / 4; }

int64_t block_bytes(int bits, const KPiece* pieces, int64_t piece_count) {
  int64_t quads = 0;
  for (int64_t p = 0; p < piece_count; ++p) quads += quads_of(pieces[p]);
  return quads * quad_bytes(bits);
}

// Where the code of a channel lies among the bytes of its quad: `row` of 32 bytes and `shift`.
struct Place {
  int64_t row;
  int shift;
};

Place place_of(int bits, int64_t lane) {
  const auto j = static_cast<int>(lane / 8);
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
      uint8_t* to = block + at.row * 32 + lane % 8 * 4;
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
      const uint8_t* from = block + at.row * 32 + lane % 8 * 4;
      uint8_t* to = codes + lane * ldk + pieces[p].k_begin;
      for (int64_t k = 0; k < pieces[p].k_size; ++k) {
        to[k] = static_cast<uint8_t>(from[k / 4 * step + k % 4] >> at.shift & mask);
      }
    }
  }
}

// As assembly because GCC 12 copies the accumulator around the intrinsic. {vex}: the assembler's
// first choice is the AVX-512 encoding, which these CPUs lack.
inline void multiply_add(__m256i& sum, __m256i codes, __m256i activations) {
  __asm__ volatile("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(codes), "x"(activations));
}

// The address in two registers, so that one counter serves all rows.
inline __m256i broadcast(const int8_t* row, int64_t at) {
  __m256i out;
  __asm__ volatile("vpbroadcastd (%1,%2), %0" : "=x"(out) : "r"(row), "r"(at) : "memory");
  return out;
}

inline __m256i load(const uint8_t* from) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(from)); }

// Sums of `quads` quads of one piece into sums [kRows][32]; added to what is there unless `first`.
template <int kBits, int kRows>
inline void sum_piece(const uint8_t* weight, const int8_t* const* rows, int64_t row_offset, int64_t quads, bool first,
                      int32_t* sums) {
  constexpr int64_t kStep = 16 * kBits, kPrefetch = 1024;
  // vpdpbusd takes 5 cycles and two start a cycle: one row needs more than one set of sums.
  constexpr int kSets = kRows == 1 ? 3 : 1;
  const __m256i low2 = _mm256_set1_epi8(0x03), low4 = _mm256_set1_epi8(0x0f), low6 = _mm256_set1_epi8(0x3f);
  const int8_t* a[kRows];
  __m256i s[kSets][kRows][4];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    a[r] = rows[r] + row_offset;
#pragma GCC unroll 4
    for (int set = 0; set < kSets; ++set) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) s[set][r][j] = _mm256_setzero_si256();
    }
  }
  const auto quad = [&](__m256i(&into)[kRows][4], int64_t q) __attribute__((always_inline)) {
    const uint8_t* w = weight + q * kStep;
#pragma GCC unroll 4
    for (int64_t line = 0; line < kStep; line += 64) _mm_prefetch(w + kPrefetch + line, _MM_HINT_T0);
    // Two vectors of channels at a time, each with its own broadcasts: three rows of sums, the codes
    // of four vectors and a broadcast would be one register too many.
    __m256i x = load(w);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      __m256i low, high;
      if constexpr (kBits == 2) {
        low = _mm256_and_si256(x, half == 0 ? low2 : low6);
        high = half == 0 ? _mm256_and_si256(x, low4) : x;
      } else if constexpr (kBits == 4) {
        high = half == 0 ? x : load(w + 32);
        low = _mm256_and_si256(high, low4);
      } else {
        low = half == 0 ? x : load(w + 64);
        high = load(w + 64 * half + 32);
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const __m256i activations = broadcast(a[r], 4 * q);
        multiply_add(into[r][2 * half], low, activations);
        multiply_add(into[r][2 * half + 1], high, activations);
      }
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
      for (int set = 1; set < kSets; ++set) s[0][r][j] = _mm256_add_epi32(s[0][r][j], s[set][r][j]);
      auto* to = reinterpret_cast<__m256i*>(sums + r * kBlockN + 8 * j);
      if (!first) s[0][r][j] = _mm256_add_epi32(s[0][r][j], _mm256_load_si256(to));
      _mm256_store_si256(to, s[0][r][j]);
    }
  }
}

// kRows rows against the block. The sums go through memory once a group, as in avx512_vnni.cc.
template <int kBits, int kRows>
void run_rows(const TileTask& task, int64_t first_row) {
  alignas(32) int32_t sums[kRows * kBlockN];
  alignas(32) float partial[kRows * kBlockN] = {};
  const uint8_t* weight = task.weight;
  for (int64_t p = 0; p < task.piece_count;) {
    const int64_t group = task.pieces[p].group;
    bool first = true;
    do {
      const int64_t quads = quads_of(task.pieces[p]);
      sum_piece<kBits, kRows>(weight, task.rows + first_row, task.pieces[p].row_offset, quads, first, sums);
      weight += quads * 16 * kBits;
      first = false;
    } while (++p < task.piece_count && task.pieces[p].group == group);
    finish_group<kBits, 4>(task, group, first_row, kRows, sums, partial);
  }
}

template <int kBits>
void run_bits(const TileTask& task) {
  for_each_tile<3>(task.row_count,
                   [&](auto count, int64_t row) { run_rows<kBits, decltype(count)::value>(task, row); });
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

constexpr LinearKernel kernel = {Isa::avx_vnni, kBlockN, block_bytes, lane_factor, pack_block, unpack_block, run};

}  // namespace

const LinearKernel* linear_kernel_avx_vnni() { return &kernel; }

}  // namespace bantamweight

#else

namespace bantamweight {
const LinearKernel* linear_kernel_avx_vnni() { return nullptr; }
}  // namespace bantamweight

#endif
