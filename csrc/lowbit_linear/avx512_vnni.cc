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
// Fewer bytes for ternary, as loops alone (VBMI, one row, one thread; against 2 bits at 768 x 768, 4096 x
// 4096, 4096 x 14336 and 64 MB): three trits in five bits, five rows of 64 bytes for 24 k, vpermb on their
// low six bits whatever the others are, three more rows out of the three top bits: 0.98, 1.20, 1.15 and
// 1.28 times as fast. Five trits a byte as s + 128, vpermi2b on its absolute value and a masked
// subtraction, the byte itself for the fifth: 0.79, 1.10, 1.11 and 1.43. Not here yet: several rows would want
// them written out as 2 bits first (not measured), and reading would not overlap with that as it does now.
//
// One row keeps its outputs in registers across the groups; scales along K in groups of 128 cost it 10 %
// (6 % more bytes), groups of 32 45 %.
//
// No gain beyond L2: huge pages under the layout, fetching 2, 4 or 8 KB ahead instead of 1, reading
// two to eight streams at once. In it: huge pages, fetching 0.5 or 2 KB ahead, fetching scales, the 32
// steps of a group of 128 unrolled. Expanding 3 bits to 4 for few rows: the stores into L2 cost more than
// the unpacking that they save until 64 rows.
//
// Tried and slower: activations as embedded broadcasts (one load for every product instead of one
// for four: 717 GOPS at best); for several rows, float outputs in registers across the groups (GCC 12
// spills the integer sums: 250 GOPS).
#include "lowbit_linear/lowbit_linear.h"

#if defined(__AVX512VNNI__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#include "lowbit_linear/finish_avx512.h"
#include "lowbit_linear/three_bits_avx512.h"

namespace bantamweight {
namespace {

constexpr int64_t kBlockN = 64;
constexpr int64_t kExpandRows = 64;

// k of a step, which takes 8 * bits * step_k bytes: 4, and 8 at 3 bits.
constexpr int64_t step_k(int bits) { return bits == 3 ? 8 : 4; }
constexpr int64_t step_bytes(int bits) { return 8 * bits * step_k(bits); }

int64_t steps_of(int bits, const KPiece& piece) { return (piece.k_size + step_k(bits) - 1) / step_k(bits); }

int64_t block_bytes(int bits, const KPiece* pieces, int64_t piece_count) {
  int64_t steps = 0;
  for (int64_t p = 0; p < piece_count; ++p) steps += steps_of(bits, pieces[p]);
  return steps * step_bytes(bits);
}

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
void expand_block(const KPiece* pieces, int64_t piece_count, const uint8_t* block, uint8_t* expanded) {
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

// One step of codes against the next activations of kRows rows.
template <int kBits, int kRows, int kTiles>
__attribute__((always_inline)) inline void multiply_step(const uint8_t* w, const int8_t* const (&a)[kRows], int64_t k,
                                                         __m512i (&into)[kRows][kTiles]) {
  const __m512i low2 = _mm512_set1_epi8(0x03), low3 = _mm512_set1_epi8(0x07), low4 = _mm512_set1_epi8(0x0f),
                low6 = _mm512_set1_epi8(0x3f);
  const auto multiply = [&](const __m512i(&x)[4], int64_t at) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      int32_t four;
      __builtin_memcpy(&four, a[r] + at, 4);
      const __m512i activations = _mm512_set1_epi32(four);
#pragma GCC unroll 4
      for (int j = 0; j < kTiles; ++j) multiply_add(into[r][j], x[j], activations);
    }
  };
  __m512i x[4];
  for (int64_t line = 0; line < step_bytes(kBits); line += 64) _mm_prefetch(w + kPrefetch + line, _MM_HINT_T0);
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
    multiply(next, k + 4);
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
  multiply(x, k);
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
constexpr bool nested(int bits, int j) { return bits == 2 ? j > 0 : bits != 8 && j % 2 == 1; }

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

constexpr LinearKernel kernel = {
    Isa::avx512_vnni, kBlockN,      block_bytes, lane_factor, pack_block, unpack_block, run,
    nullptr,          expand_block, kExpandRows, 0,           384 << 10,  true};

}  // namespace

const LinearKernel* linear_kernel_avx512_vnni() { return &kernel; }

}  // namespace bantamweight

#else

namespace bantamweight {
const LinearKernel* linear_kernel_avx512_vnni() { return nullptr; }
}  // namespace bantamweight

#endif
