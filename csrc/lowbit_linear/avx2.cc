// AVX2: vpmaddubsw into int16 sums, widened before they can overflow. Few rows unpack codes as they go
// (this file), more share a panel of unpacked codes (panel_avx2.h), and many rows of ternary codes go by
// tables over the batch (tables_avx2.h).
//
// A block is 16 channels; a step is 64 bytes, 4 of each channel. At 2 bits byte kk of a channel holds
// its codes at k = kk, 4 + kk, 8 + kk and 12 + kk from the low bits up, at 4 bits at kk and 4 + kk.
// 8-bit codes are multiplied nibble by nibble here, because two products of 255 x 127 do not fit int16.
// 3 bits use the 4-bit bytes.
//
// Per 256 weights at 2 bits (64 bytes, a quarter of a byte a weight) and one row: 2 loads, 6 shifts, 8
// and, 8 broadcasts, 8 vpmaddubsw, 8 vpaddw: bound by the three vector ports, 10 cycles. Four rows
// share the shifts and masks.
#include "lowbit_linear/lowbit_linear.h"

#if defined(__AVX2__) && defined(__FMA__)
#include "lowbit_linear/finish_avx2.h"
#include "lowbit_linear/panel_avx2.h"
#include "lowbit_linear/tables_avx2.h"
#include "lowbit_linear/tiles.h"

namespace bantamweight {
namespace {

constexpr int64_t kBlockN = 16, kStepBytes = 64;

// More rows take panels.
constexpr int direct_rows(int bits) { return bits == 8 ? 2 : 4; }

int layout_bits(int bits) { return bits == 3 ? 4 : bits; }

int64_t step_k(int bits) { return 32 / layout_bits(bits); }

int64_t steps_of(const KPiece& piece, int64_t k) { return (piece.k_size + k - 1) / k; }

// A line behind the steps of 2-bit codes says whether all are ternary.
int64_t trailer_bytes(int bits) { return bits == 2 ? 64 : 0; }

int64_t block_bytes(int bits, const KPiece* pieces, int64_t piece_count) {
  int64_t steps = 0;
  for (int64_t p = 0; p < piece_count; ++p) steps += steps_of(pieces[p], step_k(bits));
  return steps * kStepBytes + trailer_bytes(bits);
}

float lane_factor(int, int64_t) { return 1.0f; }

void pack_block(int bits, const KPiece* pieces, int64_t piece_count, const uint8_t* codes, int64_t ldk, int64_t valid_n,
                uint8_t* block) {
  const int64_t step = step_k(bits), bytes = block_bytes(bits, pieces, piece_count);
  for (int64_t i = 0; i < bytes; ++i) block[i] = 0;
  uint8_t* trailer = block + bytes - trailer_bytes(bits);
  bool ternary = true;
  for (int64_t p = 0; p < piece_count; block += steps_of(pieces[p], step) * kStepBytes, ++p) {
    for (int64_t lane = 0; lane < valid_n; ++lane) {
      const uint8_t* from = codes + lane * ldk + pieces[p].k_begin;
      for (int64_t k = 0; k < pieces[p].k_size; ++k) {
        uint8_t& byte = block[k / step * kStepBytes + lane * 4 + k % 4];
        byte = static_cast<uint8_t>(byte | from[k] << k % step / 4 * layout_bits(bits));
        ternary = ternary && from[k] < 3;
      }
    }
  }
  if (bits == 2) *trailer = ternary;
}

void unpack_block(int bits, const KPiece* pieces, int64_t piece_count, const uint8_t* block, int64_t ldk,
                  int64_t valid_n, uint8_t* codes) {
  const int64_t step = step_k(bits);
  const int mask = (1 << layout_bits(bits)) - 1;
  for (int64_t p = 0; p < piece_count; block += steps_of(pieces[p], step) * kStepBytes, ++p) {
    for (int64_t lane = 0; lane < valid_n; ++lane) {
      uint8_t* to = codes + lane * ldk + pieces[p].k_begin;
      for (int64_t k = 0; k < pieces[p].k_size; ++k) {
        const uint8_t byte = block[k / step * kStepBytes + lane * 4 + k % 4];
        to[k] = static_cast<uint8_t>(byte >> k % step / 4 * layout_bits(bits) & mask);
      }
    }
  }
}

inline __m256i load(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }

// As assembly because GCC 12 reorders the additions and keeps the broadcasts of both halves of a
// step, and spills the sums for it: four rows ran at 160 GOPS instead of 250.
inline void add_products(__m256i& sum, __m256i codes, const int8_t* four_activations) {
  __m256i products;
  __asm__ volatile(
      "vpbroadcastd %2, %1\n\t"
      "vpmaddubsw %1, %3, %1\n\t"
      "vpaddw %1, %0, %0"
      : "+x"(sum), "=&x"(products)
      : "m"(*reinterpret_cast<const int8_t (*)[4]>(four_activations)), "x"(codes));
}

// Adds `steps` steps of one piece to sums [kRows][16].
template <int kBits, int kRows>
inline void sum_piece(const uint8_t* weight, const int8_t* const* rows, int64_t row_offset, int64_t steps,
                      int32_t* sums) {
  constexpr int64_t kStepK = 32 / kBits;
  // An int16 holds ten steps of 4 x 2 x 3 x 127 at 2 bits, four of 2 x 2 x 15 x 127 at 4 bits, and
  // eight of 2 x 15 x 127 of each nibble at 8 bits.
  constexpr int64_t kSafeSteps = kBits == 2 ? 10 : kBits == 4 ? 4 : 8;
  constexpr int kParts = kBits == 8 ? 2 : 1;  // low and high nibbles
  const __m256i ones = _mm256_set1_epi16(1);
  const __m256i mask = _mm256_set1_epi8(kBits == 2 ? 0x03 : 0x0f);
  const int8_t* a[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) a[r] = rows[r] + row_offset;
  for (int64_t begin = 0; begin < steps; begin += kSafeSteps) {
    const int64_t end = steps - begin < kSafeSteps ? steps : begin + kSafeSteps;
    __m256i s[kParts][kRows][2];
#pragma GCC unroll 2
    for (int part = 0; part < kParts; ++part) {
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) s[part][r][0] = s[part][r][1] = _mm256_setzero_si256();
    }
    for (int64_t step = begin; step < end; ++step) {
      const uint8_t* w = weight + step * kStepBytes;
      _mm_prefetch(reinterpret_cast<const char*>(w) + 1024, _MM_HINT_T0);
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const __m256i raw = load(w + 32 * half);
#pragma GCC unroll 4
        for (int field = 0; field < 8 / kBits * kParts; ++field) {
          constexpr int kFieldBits = kBits == 8 ? 4 : kBits;
          const __m256i codes = _mm256_and_si256(_mm256_srli_epi16(raw, field * kFieldBits), mask);
          const int part = kParts == 2 ? field : 0;
          const int quad = kParts == 2 ? 0 : field;
#pragma GCC unroll 4
          for (int r = 0; r < kRows; ++r) {
            add_products(s[part][r][half], codes, a[r] + step * kStepK + 4 * quad);
          }
        }
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        __m256i wide = _mm256_madd_epi16(s[0][r][half], ones);
        if constexpr (kParts == 2) {
          wide = _mm256_add_epi32(wide, _mm256_slli_epi32(_mm256_madd_epi16(s[1][r][half], ones), 4));
        }
        auto* to = reinterpret_cast<__m256i*>(sums + r * kBlockN + 8 * half);
        _mm256_store_si256(to, _mm256_add_epi32(_mm256_load_si256(to), wide));
      }
    }
  }
}

template <int kBits, int kRows>
void run_rows(const TileTask& task, int64_t first_row) {
  alignas(32) int32_t sums[kRows * kBlockN];
  alignas(32) float partial[kRows * kBlockN] = {};
  const uint8_t* weight = task.weight;
  for (int64_t p = 0; p < task.piece_count;) {
    const int64_t group = task.pieces[p].group;
    for (int64_t i = 0; i < kRows * kBlockN; ++i) sums[i] = 0;
    for (; p < task.piece_count && task.pieces[p].group == group; ++p) {
      const int64_t steps = steps_of(task.pieces[p], 32 / kBits);
      sum_piece<kBits, kRows>(weight, task.rows + first_row, task.pieces[p].row_offset, steps, sums);
      weight += steps * kStepBytes;
    }
    finish_group<8, 2>(task, group, first_row, kRows, sums, partial);
  }
}

template <int kBits>
void run_bits(const TileTask& task) {
  for_each_tile<direct_rows(kBits)>(
      task.row_count, [&](auto count, int64_t row) { run_rows<kBits, decltype(count)::value>(task, row); });
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

// What comes before and after the channels of `first` that the caller's task stands for.
TileTask task_at(const TileTask& first, int64_t blocks, int64_t block_bytes, int64_t channels) {
  TileTask task = first;
  task.weight += blocks * block_bytes;
  task.scale += blocks * kBlockN * task.groups;
  if (task.zero_scale != nullptr) task.zero_scale += blocks * kBlockN * task.groups;
  if (task.bias != nullptr) task.bias += blocks * kBlockN;
  task.y += blocks * kBlockN;
  const int64_t left = channels - blocks * kBlockN;
  task.block_n_valid = left < kBlockN ? left : kBlockN;
  return task;
}

bool all_ternary(const uint8_t* first_block, int64_t block_count, int64_t block_bytes) {
  for (int64_t b = 1; b <= block_count; ++b) {
    if (first_block[b * block_bytes - trailer_bytes(2)] == 0) return false;
  }
  return true;
}

// Tables pay from this many rows and channels on, and those of 32 rows from 24.
constexpr int64_t kMinTableRows = 12, kMinWideTableRows = 24, kMinTableChannels = 128;

// Returns how many of the rows it did: all but a remainder too small for tables.
int64_t run_by_tables(const TileTask& first, int64_t block_bytes, int64_t channels) {
  int64_t done = 0;
  for (int64_t left = first.row_count; left >= kMinTableRows; left = first.row_count - done) {
    const bool wide = left >= kMinWideTableRows;
    const int64_t most = wide ? 32 : 16, rows = left < most ? left : most;
    for (int64_t n = 0; n < channels; n += kTableChannels) {
      const TileTask task = task_at(first, n / kBlockN, block_bytes, channels);
      const int64_t some = channels - n < kTableChannels ? channels - n : kTableChannels;
      wide ? run_tables<2>(task, done, rows, some, block_bytes) : run_tables<1>(task, done, rows, some, block_bytes);
    }
    done += rows;
  }
  return done;
}

template <int kBits>
void run_by_panels(const TileTask& first, int64_t block_count, int64_t block_bytes, int64_t channels) {
  const int64_t chunks = (first.row_count + kPanelRows - 1) / kPanelRows;
  const int64_t most = first.groups == 1 ? kPanelBlocks : kPanelBlocksOfGroups;
  for (int64_t b = 0; b < block_count; b += most) {
    TileTask tasks[kPanelBlocks];
    const int64_t blocks = block_count - b < most ? block_count - b : most;
    for (int64_t i = 0; i < blocks; ++i) tasks[i] = task_at(first, b + i, block_bytes, channels);
    for (int64_t c = 0; c < chunks; ++c) {
      const int64_t row = first.row_count * c / chunks;
      run_panels<kBits>(tasks, blocks, row, first.row_count * (c + 1) / chunks - row);
    }
  }
}

void run_blocks(int bits, const TileTask& first, int64_t block_count, int64_t block_bytes, int64_t channels) {
  const int64_t here = channels < block_count * kBlockN ? channels : block_count * kBlockN;
  TileTask rest = first;
  if (bits == 2 && first.piece_count > 0 && first.row_count >= kMinTableRows && here >= kMinTableChannels &&
      all_ternary(first.weight, block_count, block_bytes)) {
    const int64_t done = run_by_tables(first, block_bytes, here);
    rest.rows += done;
    rest.row_scale += done;
    rest.row_sums += done * first.groups;
    if (first.group_scale != nullptr) rest.group_scale += done * first.groups;
    rest.row_count -= done;
    rest.y += done * first.ldy;
    if (rest.row_count == 0) return;
  }
  if (rest.piece_count > 0 && rest.row_count > direct_rows(bits)) {
    if (bits == 2) return run_by_panels<2>(rest, block_count, block_bytes, channels);
    if (bits == 3) return run_by_panels<3>(rest, block_count, block_bytes, channels);
    if (bits == 4) return run_by_panels<4>(rest, block_count, block_bytes, channels);
    if (bits == 8) return run_by_panels<8>(rest, block_count, block_bytes, channels);
  }
  for (int64_t b = 0; b < block_count; ++b) run(bits, task_at(rest, b, block_bytes, channels));
}

constexpr LinearKernel kernel = [] {
  LinearKernel all = {Isa::avx2, kBlockN, block_bytes, lane_factor, pack_block, unpack_block, run};
  all.run_blocks = run_blocks;
  all.channels_at_once = 1024;
  return all;
}();

}  // namespace

const LinearKernel* linear_kernel_avx2() { return &kernel; }

}  // namespace bantamweight

#else

namespace bantamweight {
const LinearKernel* linear_kernel_avx2() { return nullptr; }
}  // namespace bantamweight

#endif
