// AVX-512 VNNI over the nested-mask layout.
//
// A block is 64 channels. At 2 bits a 64-byte row holds 4 k of all of them: byte (lane, kk) is
// c0 | c1 << 2 | c2 << 4 | c3 << 6, c_j being the code of channel lane + 16 j. vpdpbusd on the
// masked row gives S0 from x & 03, S0 + 4 S1 from x & 0f, .. , and S0 + .. + 64 S3 from x itself:
// exact in int32, without a shift. One subtraction a channel and group takes the sums apart and
// the powers of four are divided out of the scales. 4 bits: two rows, x & 0f and x. 8 bits: four
// rows as they are. 3 bits: see three_bits_avx512.h; the rest is as at 4 bits with 8 for 16.
//
// Per 256 weights at 2 bits (64 bytes, a quarter of a byte a weight): 1 load, 3 and, and for each
// row of activations 1 broadcast from memory and 4 vpdpbusd; 4 bits: 2 loads, 2 and; 3 bits: 1.5
// loads, 1.5 shifts, 1 vpternlogd, 4 and. One row is bound by ports 0 and 5 (3.5 cycles for 64 bytes
// at 2 bits) while the weights are in L2, and by memory beyond it: 28.5 to 30 GB/s where a plain
// AVX-512 sum over the same bytes reads 29 to 30 (4096 x 4096 and 4096 x 14336 at 2, 3, 4 and 8 bits).
// There only bytes count: 3 bits take 3/4 of the time of 4, but 1.37 of it in L2 (768 x 3072), so they
// are stored as 4 where they fit (stored_bits). Six rows share the masks: 24 of 27 operations are
// products, which reached 690 to 730 GOPS where vpdpbusd alone reaches 830 (Sapphire Rapids, 3.2 GHz).
//
// Fewer bytes for ternary: avx512_vbmi.cc.
//
// One row keeps its outputs in registers across the groups; scales along K in groups of 128 cost it 10 %
// (6 % more bytes), groups of 32 45 %.
//
// Beyond the caches huge pages under the layout (huge_pages.h) take 10 to 20 % off one row.
//
// No gain from L3: huge pages, fetching 2, 4 or 8 KB ahead instead of 1, reading two to eight streams at once. In it:
// huge pages, fetching 0.5 or 2 KB ahead, fetching scales, the 32 steps of a group of 128 unrolled. Expanding 3 bits to
// 4 for few rows: the stores into L2 cost more than the unpacking that they save until 64 rows.
//
// Tried and slower: activations as embedded broadcasts (one load for every product instead of one
// for four: 717 GOPS at best); for several rows, float outputs in registers across the groups (GCC 12
// spills the integer sums: 250 GOPS).
#include "lowbit_linear/lowbit_linear.h"

#if defined(__AVX512VNNI__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#include "lowbit_linear/nested_avx512.h"

namespace bantamweight {
namespace {

int64_t block_bytes(int bits, const KPiece* pieces, int64_t piece_count) { return bytes_of(bits, pieces, piece_count); }

// Some bits of the code of a channel: `mask` says which, the lowest of them at `shift` in their byte
// of row `row` of 64 bytes of the step.
struct Place {
  int64_t row;
  int shift;
  int mask, low;  // of the code
};

// Where the code of channel `lane` at the step's k-th column lies; returns the number of places.
int places_of(int bits, int64_t lane, int64_t k, Place* place) {
  const auto j = static_cast<int>(lane / 16);
  place[0] = {0, 0, (1 << bits) - 1, 0};
  if (bits == 2) place[0].shift = 2 * j;
  if (bits == 4) place[0] = {j / 2, 4 * (j % 2), 15, 0};
  if (bits == 8) place[0].row = j;
  if (bits != 3) return 1;
  if (k < 4 || j < 2) {
    place[0] = {k < 4 ? j / 2 : 2, 3 * (j % 2), 7, 0};
    return 1;
  }
  // In the fourth row, whose bits 0, 1 are the top bits of row 0, 2, 3 those of row 1, 4, 5 of row 2.
  place[0] = j == 2 ? Place{0, 6, 3, 0} : Place{1, 7, 1, 0};
  place[1] = j == 2 ? Place{1, 6, 1, 2} : Place{2, 6, 3, 1};
  return 2;
}

float lane_factor(int bits, int64_t lane) {
  const auto j = static_cast<int>(lane / 16);
  return static_cast<float>(bits == 8 ? 1 : bits == 2 ? 1 << 2 * j : 1 << 4 * (j % 2));
}

void pack_block(int bits, const KPiece* pieces, int64_t piece_count, const uint8_t* codes, int64_t ldk, int64_t valid_n,
                uint8_t* block) {
  const int64_t span = step_k(bits), bytes = block_bytes(bits, pieces, piece_count);
  for (int64_t i = 0; i < bytes; ++i) block[i] = 0;
  for (int64_t p = 0; p < piece_count; block += steps_of(bits, pieces[p]) * step_bytes(bits), ++p) {
    for (int64_t lane = 0; lane < valid_n; ++lane) {
      const uint8_t* from = codes + lane * ldk + pieces[p].k_begin;
      for (int64_t phase = 0; phase < span; ++phase) {
        Place place[2];
        const int count = places_of(bits, lane, phase, place);
        for (int i = 0; i < count; ++i) {
          uint8_t* to = block + place[i].row * 64 + lane % 16 * 4 + phase % 4;
          for (int64_t k = phase; k < pieces[p].k_size; k += span, to += step_bytes(bits)) {
            *to = static_cast<uint8_t>(*to | (from[k] >> place[i].low & place[i].mask) << place[i].shift);
          }
        }
      }
    }
  }
}

void unpack_block(int bits, const KPiece* pieces, int64_t piece_count, const uint8_t* block, int64_t ldk,
                  int64_t valid_n, uint8_t* codes) {
  const int64_t span = step_k(bits);
  for (int64_t p = 0; p < piece_count; block += steps_of(bits, pieces[p]) * step_bytes(bits), ++p) {
    for (int64_t lane = 0; lane < valid_n; ++lane) {
      uint8_t* to = codes + lane * ldk + pieces[p].k_begin;
      for (int64_t k = 0; k < pieces[p].k_size; ++k) {
        Place place[2];
        const int count = places_of(bits, lane, k % span, place);
        const uint8_t* from = block + k / span * step_bytes(bits) + lane % 16 * 4 + k % 4;
        to[k] = 0;
        for (int i = 0; i < count; ++i) {
          to[k] =
              static_cast<uint8_t>(to[k] | (from[place[i].row * 64] >> place[i].shift & place[i].mask) << place[i].low);
        }
      }
    }
  }
}

// A block of 3-bit codes as the block of 4-bit codes that it stands for.
void expand_block(int, const KPiece* pieces, int64_t piece_count, const uint8_t* block, uint8_t* expanded) {
  const __m512i low3 = _mm512_set1_epi8(0x07), high3 = _mm512_set1_epi8(0x70);
  const auto spread = [&](__m512i x) __attribute__((always_inline)) {
    return _mm512_or_si512(_mm512_and_si512(x, low3), _mm512_and_si512(_mm512_slli_epi16(x, 1), high3));
  };
  for (int64_t p = 0; p < piece_count; ++p) {
    for (int64_t quads = steps_of(4, pieces[p]); quads > 0; quads -= 2, block += step_bytes(3)) {
      __m512i x[4];
      for (int i = 0; i < 3; ++i) x[i] = _mm512_load_si512(block + 64 * i);
      x[3] = fourth_row(x[0], x[1], x[2]);
      const int rows = quads == 1 ? 2 : 4;
      for (int i = 0; i < rows; ++i, expanded += 64) _mm512_store_si512(expanded, spread(x[i]));
    }
  }
}

int64_t expand_rows(int) { return 64; }

void run(int bits, const TileTask& task) {
  if (task.piece_count == 0) {
    write_bias(task);
  } else if (bits == 2) {
    run_bits<2>(task);
  } else if (bits == 3) {
    run_bits<3>(task);
  } else if (bits == 8) {
    run_bits<8>(task);
  } else {
    run_bits<4>(task);
  }
}

constexpr LinearKernel kernel = [] {
  LinearKernel all = {Isa::avx512_vnni, kBlockN, block_bytes, lane_factor, pack_block, unpack_block, run};
  all.expand_block = expand_block;
  all.expand_rows = expand_rows;
  all.writes_codes = true;
  return all;
}();

}  // namespace

const LinearKernel* linear_kernel_avx512_vnni() { return &kernel; }

}  // namespace bantamweight

#else

namespace bantamweight {
const LinearKernel* linear_kernel_avx512_vnni() { return nullptr; }
}  // namespace bantamweight

#endif
