// AMX-INT8 over the layout of avx512_vnni.cc.
//
// 16 of its quads, 64 k of 64 channels, are four B tiles of 16 channels once the nested masks are
// applied; an A tile is 16 activation rows x 64 k as they lie in memory. At 2 bits each 64-byte row
// of the weights costs 1 load, 3 and, 3 stores into a ring that stays in L1, and its share of four
// tile loads; the fourth B tile is the row itself, loaded from where it lies. Up to three rows run on
// VNNI.
//
// A chunk (4 tile products, 64 cycles) takes about as long on the store port, so everything is one
// stream over (row tile, block, chunk): while a chunk is multiplied, the one two steps on is
// unpacked, and the sums of the previous group are turned into floats.
//
// What bounds it, a chunk of 4,096 weights (1 KB at 2 bits) and 16 rows at 2.8 GHz: the products 23
// ns, what of the unpacking they do not hide 5, and at the end of a group 16 ns for four tile stores,
// 40 for turning the sums into floats (ports 0 and 5, which the products leave free but the ring
// needs), and as much again where the output lines are not in L1. Everything here has to fit L1
// together, the ring (9 KB), the sums (4 KB) and the activations: a store that misses holds up all
// stores behind it, so a ring of four or a second buffer of sums cost 20%.
//
// It reaches 2,400 GOPS at 2 bits and 2,100 at 4; tdpbsud alone 6,300. Beside a
// product (16 cycles) 32 vector operations, 16 stores or 16 loads that hit L1 cost nothing, and the two
// stores of two tiles; the stores of four tiles in a row cost 23 ns.
//
// Weights from beyond L2 are fetched into L1 1 KB ahead of the unpacking, and scales two groups ahead of their sums, on
// the first way through them: from DRAM a tenth less time at 4 bits (4096x14336 in groups of 128, 8 rows, in huge
// pages: 2,620 us to 2,300); at 8 bits measured only together with those, at 3 not; nothing at 2. As fast within the
// spread: 4 or 8 KB ahead into L2. Mostly slower: 2 to 8 KB ahead into L1. Weights that stay in L2 lose 2 to 5%.
//
// Trits (trits_avx512.h) become 2 bits a chunk ahead, which adds 12 ns to a chunk. Decoding them between the
// products instead of all at once is slower. From 24 rows on amx_long_groups.h unpacks them as signed bytes, which
// takes no longer than 2 bits do: 4096x4096 at 32, 64 and 256 rows 559 us to 458, 978 to 734 and 3,660 to 2,820, where
// 2 bits take 505, 832 and 3,050. Expanding blocks to 2 bits instead left L2 room for no more than 1,024 channels a
// copy of the activations.
//
// For rows enough that unpacking once for many of them pays, short groups run in amx_panel.h and all
// others in amx_long_groups.h. No gain here: tile stores put off until the next group's products,
// fetching the activations ahead, the masks in one run.
#include "lowbit_linear/lowbit_linear.h"

#if defined(__AMX_TILE__) && defined(__AMX_INT8__) && defined(__AVX512F__) && defined(__AVX512DQ__)
#include "epilogue/rows.h"
#include "lowbit_linear/amx_chunks.h"
#include "lowbit_linear/amx_long_groups.h"
#include "lowbit_linear/amx_panel.h"
#include "lowbit_linear/finish_avx512.h"
#include "lowbit_linear/three_bits_avx512.h"
#include "lowbit_linear/trits_avx512.h"

namespace bantamweight {
namespace {

constexpr int64_t kAhead = 2, kRing = kAhead + 1;
// Codes and scales are fetched so many bytes ahead of what is unpacked, and so many groups of what is finished.
constexpr int64_t kFetchBytes = 1024, kFetchGroups = 2;
// With fewer rows, or fewer chunks in all, VNNI is faster: it neither stores and loads the unpacked
// weights again nor configures tiles (0.3 us).
constexpr int64_t kMinRows = 4, kMinTritRows = 5, kMinChunks = 8;

// A quarter of a chunk, 4 quads, from raw codes to masked tiles. Codes of 8 bits are tiles as they lie.
template <int kBits>
inline void unpack(const uint8_t* raw, uint8_t* masked, int64_t quarter) {
  if constexpr (kBits == 8) return;
  constexpr int64_t kStep = 32 * kBits;
  const __m512i low2 = _mm512_set1_epi8(0x03), low3 = _mm512_set1_epi8(0x07), low4 = _mm512_set1_epi8(0x0f),
                low6 = _mm512_set1_epi8(0x3f);
  const uint8_t* from = raw + 4 * quarter * kStep;
  uint8_t* to = masked + 4 * quarter * 64;
  if constexpr (kBits == 3) {
#pragma GCC unroll 2
    for (int64_t q = 0; q < 4; q += 2, from += 2 * kStep, to += 2 * 64) {
      const __m512i x0 = _mm512_load_si512(from), x1 = _mm512_load_si512(from + 64), x2 = _mm512_load_si512(from + 128);
      const __m512i x3 = fourth_row(x0, x1, x2);
      _mm512_store_si512(to, _mm512_and_si512(x0, low3));
      _mm512_store_si512(to + 64, _mm512_and_si512(x2, low3));
      _mm512_store_si512(to + kTileBytes, _mm512_and_si512(x0, low6));
      _mm512_store_si512(to + kTileBytes + 64, _mm512_and_si512(x2, low6));
      _mm512_store_si512(to + 2 * kTileBytes, _mm512_and_si512(x1, low3));
      _mm512_store_si512(to + 2 * kTileBytes + 64, _mm512_and_si512(x3, low3));
      _mm512_store_si512(to + 3 * kTileBytes, _mm512_and_si512(x1, low6));
      _mm512_store_si512(to + 3 * kTileBytes + 64, _mm512_and_si512(x3, low6));
    }
    return;
  }
#pragma GCC unroll 4
  for (int64_t q = 0; q < 4; ++q, from += kStep, to += 64) {
    if constexpr (kBits == 2) {
      const __m512i x = _mm512_load_si512(from);
      _mm512_store_si512(to, _mm512_and_si512(x, low2));
      _mm512_store_si512(to + kTileBytes, _mm512_and_si512(x, low4));
      _mm512_store_si512(to + 2 * kTileBytes, _mm512_and_si512(x, low6));
    } else if constexpr (kBits == 4) {
      _mm512_store_si512(to, _mm512_and_si512(_mm512_load_si512(from), low4));
      _mm512_store_si512(to + kTileBytes, _mm512_and_si512(_mm512_load_si512(from + 64), low4));
    }
  }
}

// At most so many tiles of a chunk are masked; the others are loaded from the raw codes.
template <int kBits>
constexpr int64_t kMaskedTiles = kBits == 2   ? 3
                                 : kBits == 3 ? 4
                                 : kBits == 4 ? 2
                                              : 0;

template <int kBits>
inline const uint8_t* codes_tile(const uint8_t* raw, const uint8_t* masked, int j) {
  if (kBits == 2) return j == 3 ? raw : masked + kTileBytes * j;
  if (kBits == 3) return masked + kTileBytes * j;
  if (kBits == 4) return j % 2 == 1 ? raw + 64 * (j / 2) : masked + kTileBytes * (j / 2);
  return raw + 64 * j;
}

template <int kBits>
constexpr int64_t codes_stride(int j) {
  return kBits <= 3 ? 64 : kBits == 4 ? (j % 2 == 1 ? 128 : 64) : 256;
}

// Sums of a group on their way to the outputs, a few rows at a time.
template <int kBits, int kTiles = 4>
struct Pending {
  const TileTask* task;
  int64_t group, first_row;
  int64_t row = 0, rows = 0;  // rows [row, rows) are still to do
  const int32_t* sums;
  float* partial;  // [rows][64], carried from group to group

  void finish(int64_t count) {
    if (row == rows) return;
    const int64_t now = rows - row < count ? rows - row : count;
    finish_group<kBits, kTiles>(*task, group, first_row + row, now, sums + row * kBlockN, partial + row * kBlockN);
    row += now;
  }
};

// A store that misses L1 holds up every store behind it, those into the ring too.
void fetch_outputs(const TileTask& task, int64_t first_row, int64_t rows) {
  if (task.codes.rows != nullptr) {
    for (int64_t r = first_row; r < first_row + rows; ++r) {
      __asm__ volatile("prefetchw %0" ::"m"(task.codes.rows[r][task.first_channel]));
      if (task.codes.added != nullptr) _mm_prefetch(task.codes.added[r] + task.first_channel, _MM_HINT_T0);
    }
    return;
  }
  for (int64_t r = first_row; r < first_row + rows; ++r) {
    const float* y = task.y + r * task.ldy;
    for (int64_t n = 0; n < task.block_n_valid; n += 16) __asm__ volatile("prefetchw %0" ::"m"(y[n]));
  }
}

// The task of the block that follows.
void advance(TileTask* task, int64_t block_bytes, int64_t* channels) {
  *channels -= kBlockN;
  task->weight += block_bytes;
  task->scale += task->groups * kBlockN;
  if (task->zero_scale != nullptr) task->zero_scale += task->groups * kBlockN;
  if (task->bias != nullptr) task->bias += kBlockN;
  if (task->codes.rows != nullptr) {
    task->first_channel += kBlockN;
  } else {
    task->y += kBlockN;
  }
  task->block_n_valid = *channels < kBlockN ? *channels : kBlockN;
}

// Trits as chunks of 2 bits, in a ring of the chunks of a stream and one more, where a step's last quads
// go that belong to the next chunk.
class TritChunks {
 public:
  // The chunk behind the last one, or the first of a block.
  const uint8_t* next(const Chunk& chunk, const uint8_t* block) {
    if (chunk.weight_offset == 0) {
      step_ = block;
      ready_ = 0;
    }
    const int64_t begin = at_;
    for (; ready_ < chunk.quads; ready_ += kTritQuads, step_ += kTritBytes) {
      for (int64_t line = 0; line < kTritBytes; line += 64) _mm_prefetch(step_ + kPrefetch + line, _MM_HINT_T0);
      const TritStep step(step_);
#pragma GCC unroll 6
      for (int q = 0; q < kTritQuads; ++q) {
        _mm512_store_si512(quad(begin + ready_ + q), _mm512_or_si512(step.three(q), step.fourth(q)));
      }
    }
    for (int64_t q = chunk.quads; q < kChunkQuads; ++q) _mm512_store_si512(quad(begin + q), _mm512_setzero_si512());
    ready_ -= kChunkQuads;
    at_ = (begin + kChunkQuads) % kQuads;
    return quad(begin);
  }

 private:
  static constexpr int64_t kQuads = (kRing + 1) * kChunkQuads, kPrefetch = 2048;
  static_assert((kQuads & (kQuads - 1)) == 0, "the ring's length is a power of two");
  uint8_t* quad(int64_t at) { return memory_ + at % kQuads * 64; }

  alignas(64) uint8_t memory_[kQuads * 64];
  const uint8_t* step_ = nullptr;
  int64_t ready_ = 0;  // quads of the next chunk that are there already
  int64_t at_ = 0;     // of the next chunk in the ring
};

// `rows` rows (at most 16) from `first_row` on against every block, whose codes are fetched ahead or not.
template <int kStored, bool kFetch>
void run_tile(const TileTask& first, int64_t block_count, int64_t block_bytes, int64_t channels, const Chunk* chunks,
              int64_t chunk_count, int64_t first_row, int64_t rows) {
  constexpr int kBits = kStored == kTrits ? 2 : kStored;
  constexpr int64_t kStep = 32 * kBits, kMaskedBytes = kMaskedTiles<kBits> * kTileBytes;
  TritChunks trits;
  alignas(64) uint8_t masked[kRing * kMaskedBytes];
  alignas(64) uint8_t padded[kRing * kChunkQuads * kStep];
  alignas(64) int8_t gathered[kTileBytes];
  alignas(64) int32_t sums[kTileSums];
  alignas(64) float partial[kTileSums];
  const uint8_t* raw[kRing];
  const int8_t* const* row = first.rows + first_row;
  const int64_t stride = equal_spacing(row, rows);
  // So many rows are finished in each half chunk that a group is done when the next one ends.
  const int64_t needed_rows = (rows * first.groups + 2 * chunk_count - 1) / (2 * chunk_count);
  const int64_t finish_rows = needed_rows < 4 ? 4 : needed_rows;
  Pending<kBits> pending;
  pending.partial = partial;

  // The chunk that is unpacked next.
  const uint8_t* ahead_weight = first.weight;
  int64_t ahead_chunk = 0, ahead_left = chunk_count * block_count;
  const uint8_t* fetched = nullptr;
  const auto unpack_ahead = [&](const uint8_t* from, uint8_t* to, int64_t quarter) __attribute__((always_inline)) {
    unpack<kBits>(from, to, quarter);
    if constexpr (!kFetch) return;
#pragma GCC unroll 16
    for (int64_t i = 0; i < 4 * kStep; i += 64) _mm_prefetch(fetched + 4 * quarter * kStep + i, _MM_HINT_T0);
  };
  const auto next_raw = [&](int64_t slot) {
    const Chunk& chunk = chunks[ahead_chunk];
    fetched = ahead_weight + chunk.weight_offset + kFetchBytes;
    if constexpr (kStored == kTrits) {
      raw[slot] = trits.next(chunk, ahead_weight);
    } else {
      raw[slot] = ahead_weight + chunk.weight_offset;
    }
    if (kStored != kTrits && chunk.quads < kChunkQuads) {
      uint8_t* to = padded + slot * kChunkQuads * kStep;
      for (int64_t i = 0; i < kChunkQuads * kStep; i += 64) {
        const __m512i line = i < chunk.quads * kStep ? _mm512_load_si512(raw[slot] + i) : _mm512_setzero_si512();
        _mm512_store_si512(to + i, line);
      }
      raw[slot] = to;
    }
    --ahead_left;
    if (++ahead_chunk == chunk_count) {
      ahead_chunk = 0;
      ahead_weight += block_bytes;
    }
  };
  for (int64_t slot = 0; slot < kAhead && ahead_left > 0; ++slot) {
    next_raw(slot);
    for (int64_t quarter = 0; quarter < 4; ++quarter) {
      unpack<kBits>(raw[slot], masked + slot * kMaskedBytes, quarter);
    }
  }

  TileTask tasks[2] = {first, first};  // in turn: the last sums of a block are finished during the next
  int64_t slot = 0;
  for (int64_t b = 0; b < block_count; ++b) {
    TileTask& task = tasks[b % 2];
    if (b > 0) {
      task = tasks[(b + 1) % 2];
      advance(&task, block_bytes, &channels);
    }
    for (int64_t c = 0; c < chunk_count; ++c) {
      const Chunk& chunk = chunks[c];
      const int64_t ahead_slot = slot == 0 ? kRing - 1 : slot - 1;
      const bool more = ahead_left > 0;
      if (more) next_raw(ahead_slot);
      const uint8_t* ahead = raw[ahead_slot];
      uint8_t* ahead_masked = masked + ahead_slot * kMaskedBytes;
      const uint8_t* codes = raw[slot];
      const uint8_t* codes_masked = masked + slot * kMaskedBytes;
      if (chunk.begins_group) {
        TILE_ZERO(0);
        TILE_ZERO(1);
        TILE_ZERO(2);
        TILE_ZERO(3);
      }
      if (stride != 0) {
        TILE_LOAD(4, row[0] + chunk.row_offset, stride);
      } else {
        for (int64_t r = 0; r < rows; ++r) {
          _mm512_store_si512(gathered + r * 64, _mm512_loadu_si512(row[r] + chunk.row_offset));
        }
        TILE_LOAD(4, gathered, 64);
      }
      TILE_LOAD(5, codes_tile<kBits>(codes, codes_masked, 0), codes_stride<kBits>(0));
      TILE_MULTIPLY(0, 4, 5);
      if (more) unpack_ahead(ahead, ahead_masked, 0);
      TILE_LOAD(6, codes_tile<kBits>(codes, codes_masked, 1), codes_stride<kBits>(1));
      TILE_MULTIPLY(1, 4, 6);
      if (more) unpack_ahead(ahead, ahead_masked, 1);
      pending.finish(finish_rows);
      TILE_LOAD(7, codes_tile<kBits>(codes, codes_masked, 2), codes_stride<kBits>(2));
      TILE_MULTIPLY(2, 4, 7);
      if (more) unpack_ahead(ahead, ahead_masked, 2);
      TILE_LOAD(5, codes_tile<kBits>(codes, codes_masked, 3), codes_stride<kBits>(3));
      TILE_MULTIPLY(3, 4, 5);
      if (more) unpack_ahead(ahead, ahead_masked, 3);
      pending.finish(finish_rows);
      slot = slot == kRing - 1 ? 0 : slot + 1;
      if (chunk.ends_group) {
        if constexpr (kFetch) {
          for (int64_t n = 0; n < kBlockN; n += 16) {
            _mm_prefetch(task.scale + (chunk.group + kFetchGroups) * kBlockN + n, _MM_HINT_T0);
          }
        }
        pending.finish(rows);
        TILE_STORE(0, sums, 4 * kBlockN);
        TILE_STORE(1, sums + 16, 4 * kBlockN);
        TILE_STORE(2, sums + 32, 4 * kBlockN);
        TILE_STORE(3, sums + 48, 4 * kBlockN);
        pending.task = &task;
        pending.group = chunk.group;
        pending.first_row = first_row;
        pending.row = 0;
        pending.rows = rows;
        pending.sums = sums;
        if (chunk.group == task.groups - 1 && !task.stream_outputs) fetch_outputs(task, first_row, rows);
      }
    }
  }
  pending.finish(rows);
}

void run_vnni(int bits, TileTask task, int64_t block_count, int64_t block_bytes, int64_t channels) {
  task.stream_outputs = false;
  for (int64_t b = 0; b < block_count; ++b) {
    linear_kernel_avx512_vbmi()->run(bits, task);
    advance(&task, block_bytes, &channels);
  }
}

// Up to 32 channels, as the first layers of convolutional networks have: two of a block's four tiles
// or one, so few codes that they are unpacked once and stay in L1. Rows come two tiles at a time.
constexpr int64_t kNarrowChannels = 32, kMaxNarrowChunks = 16, kNarrowRows = 2 * kTileRows;

template <int kBits, int kTiles>
void unpack_narrow(const TileTask& task, const Chunk* chunks, int64_t chunk_count, uint8_t* codes) {
  for (int64_t c = 0; c < chunk_count; ++c) {
    const uint8_t* from = task.weight + chunks[c].weight_offset;
    for (int64_t q = 0; q < kChunkQuads; ++q, from += 32 * kBits, codes += 64) {
      __m512i tile[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
      if (q < chunks[c].quads) {
        const __m512i line = _mm512_load_si512(from);
        tile[0] = kBits == 8 ? line : _mm512_and_si512(line, _mm512_set1_epi8(kBits == 2 ? 0x03 : 0x0f));
        if (kTiles == 2) {
          tile[1] = kBits == 8   ? _mm512_load_si512(from + 64)
                    : kBits == 4 ? line
                                 : _mm512_and_si512(line, _mm512_set1_epi8(0x0f));
        }
      }
      _mm512_store_si512(codes, tile[0]);
      if (kTiles == 2) _mm512_store_si512(codes + kTileBytes, tile[1]);
    }
    codes += (kTiles - 1) * kTileBytes;
  }
}

// Rows 0 .. row_count - 1 of a task, a multiple of 32.
template <int kBits, int kTiles>
void run_narrow(const TileTask& task, const Chunk* chunks, int64_t chunk_count, int64_t row_count) {
  alignas(64) uint8_t codes[kMaxNarrowChunks * kTiles * kTileBytes];
  alignas(64) int8_t gathered[2][kTileBytes];
  alignas(64) int32_t sums[2][kNarrowRows * kBlockN];  // in turn: one is finished while the other is made
  alignas(64) float partial[kNarrowRows * kBlockN];
  unpack_narrow<kBits, kTiles>(task, chunks, chunk_count, codes);
  configure(kTileRows);
  Pending<kBits, kTiles> pending;
  pending.task = &task;
  pending.partial = partial;
  int turn = 0;
  for (int64_t first_row = 0; first_row < row_count; first_row += kNarrowRows) {
    const int8_t* const* row[2] = {task.rows + first_row, task.rows + first_row + kTileRows};
    const int64_t stride[2] = {equal_spacing(row[0], kTileRows), equal_spacing(row[1], kTileRows)};
    const uint8_t* tile = codes;
    for (int64_t c = 0; c < chunk_count; ++c, tile += kTiles * kTileBytes) {
      const Chunk& chunk = chunks[c];
      const int8_t* activations[2];
      for (int i = 0; i < 2; ++i) {
        activations[i] = row[i][0] + chunk.row_offset;
        if (stride[i] != 0) continue;
        activations[i] = gathered[i];
        for (int64_t r = 0; r < kTileRows; ++r) {
          _mm512_store_si512(gathered[i] + r * 64, _mm512_loadu_si512(row[i][r] + chunk.row_offset));
        }
      }
      if (chunk.begins_group) {
        TILE_ZERO(0);
        TILE_ZERO(2);
        if (kTiles == 2) TILE_ZERO(1);
        if (kTiles == 2) TILE_ZERO(3);
      }
      TILE_LOAD(4, activations[0], stride[0] == 0 ? 64 : stride[0]);
      TILE_LOAD(6, tile, 64);
      TILE_MULTIPLY(0, 4, 6);
      TILE_LOAD(5, activations[1], stride[1] == 0 ? 64 : stride[1]);
      TILE_MULTIPLY(2, 5, 6);
      if (kTiles == 2) {
        TILE_LOAD(7, tile + kTileBytes, 64);
        TILE_MULTIPLY(1, 4, 7);
        TILE_MULTIPLY(3, 5, 7);
      }
      if (chunk.ends_group) {
        pending.finish(kNarrowRows);
        int32_t *upper = sums[turn], *lower = sums[turn] + kTileRows * kBlockN;
        TILE_STORE(0, upper, 4 * kBlockN);
        TILE_STORE(2, lower, 4 * kBlockN);
        if (kTiles == 2) TILE_STORE(1, upper + 16, 4 * kBlockN);
        if (kTiles == 2) TILE_STORE(3, lower + 16, 4 * kBlockN);
        pending.group = chunk.group;
        pending.first_row = first_row;
        pending.row = 0;
        pending.rows = kNarrowRows;
        pending.sums = sums[turn];
        turn = 1 - turn;
      }
    }
  }
  pending.finish(kNarrowRows);
}

template <int kBits>
void run_narrow_bits(const TileTask& task, const Chunk* chunks, int64_t chunk_count, int64_t row_count) {
  const auto run_tiles = task.block_n_valid <= 16 ? run_narrow<kBits, 1> : run_narrow<kBits, 2>;
  run_tiles(task, chunks, chunk_count, row_count);
}

// Outputs that will not stay in L2 are written past it: reading each line first, only to overwrite
// it, costs a quarter of the time at 512 x 3072.
bool outgrows_cache(const TileTask& task) {
  constexpr int64_t kCacheBytes = 2 << 20;
  const bool aligned = reinterpret_cast<uintptr_t>(task.y) % 64 == 0 && task.ldy % 16 == 0;
  return task.y != nullptr && aligned && task.row_count * task.ldy * 4 >= kCacheBytes;
}

// Codes of 8 bits are signed bytes only around the middle.
bool has_signed_codes(int bits, const TileTask& task) {
  return bits != 3 && (bits != 8 || (task.zero_scale == nullptr && task.uniform_zero == 128));
}

// Groups of up to a panel.
bool panels_pay(int bits, const TileTask& task, int64_t chunk_count) {
  if (bits == kTrits || !has_signed_codes(bits, task)) return false;
  if (task.codes.rows != nullptr || task.row_count < kMinPanelRows || chunk_count == 0) return false;
  return most_pairs(chunk_count) > 0 && longest_group(task) <= kPanelChunks;
}

// A call copies the activations, which fewer channels do not pay back: convolutions hand over 64 at a time (ResNet-50,
// 16 images, int8 maps, one thread: 101 ms, and 106 with copies).
constexpr int64_t kMinLongBlocks = 4;

bool long_groups_pay(int bits, const TileTask& task, int64_t block_count, int64_t chunk_count) {
  // At 64 rows the stream is as fast at 4 bits and 15% faster at 8, which it need not unpack.
  // Trits are taken apart for each 16 rows there, and here for 32 and more.
  const int64_t min_rows = bits == kTrits ? 24 : bits == 2 && task.codes.rows == nullptr ? 64 : 96;
  if (bits == kTrits && task.piece_count > 1) return false;
  if (!has_signed_codes(bits, task) || task.row_count < min_rows || block_count < kMinLongBlocks) return false;
  return chunk_count > 0 && most_long_pairs(chunk_count) > 0;
}

int64_t scratch_bytes(int bits, const TileTask& task, int64_t block_count) {
  const int64_t chunk_count = count_chunks(task);
  if (chunk_count > kMaxChunks) return 0;
  if (panels_pay(bits, task, chunk_count)) return panel_scratch_bytes(task.row_count, chunk_count);
  return long_groups_pay(bits, task, block_count, chunk_count) ? long_scratch_bytes(task, chunk_count) : 0;
}

void run_blocks(int bits, const TileTask& first, int64_t block_count, int64_t block_bytes, int64_t channels) {
  TileTask task = first;
  // Chunks that short groups leave half empty pay off at more rows.
  const int64_t chunk_count = count_chunks(task);
  // One that the end of k leaves so, among several, does not.
  const int64_t spare = chunk_count < 4 ? 0 : kChunkQuads - 1;
  const int64_t average = chunk_count == 0 ? 0 : (count_quads(task) + spare) / chunk_count;
  const int64_t quads = average < kChunkQuads ? average : kChunkQuads;
  const int64_t min_rows = (bits == kTrits ? kMinTritRows : kMinRows) + kChunkQuads - quads;
  const int64_t tiles = (task.row_count + kTileRows - 1) / kTileRows, tail = task.row_count % kTileRows;
  const bool on_vnni = (bits == kTrits && task.piece_count > 1) || chunk_count > kMaxChunks || min_rows > kTileRows ||
                       chunk_count * block_count * tiles < kMinChunks;
  const bool in_panels = task.scratch != nullptr && panels_pay(bits, task, chunk_count);
  const bool in_long_groups =
      !in_panels && task.scratch != nullptr && long_groups_pay(bits, task, block_count, chunk_count);
  // Long groups have their epilogue before they write; other rows read again what they wrote.
  task.stream_outputs = (in_long_groups || task.epilogue.empty()) && outgrows_cache(task);
  const int64_t width = channels < block_count * kBlockN ? channels : block_count * kBlockN;
  // The rows from here on are too few for a tile.
  const int64_t end = on_vnni ? 0 : task.row_count - (tail < min_rows ? tail : 0);
  if (end > 0) {
    Chunk chunks[kMaxChunks];
    list_chunks(task, bits, chunks);
    int64_t configured = 0, row = 0;
    if (bits != 3 && bits != kTrits && block_count == 1 && task.block_n_valid <= kNarrowChannels &&
        chunk_count <= kMaxNarrowChunks) {
      row = end / kNarrowRows * kNarrowRows;
      const auto run_bits = bits == 2 ? run_narrow_bits<2> : bits == 8 ? run_narrow_bits<8> : run_narrow_bits<4>;
      if (row > 0) run_bits(task, chunks, chunk_count, row);
    } else if (in_panels) {
      row = end / kPairRows * kPairRows;
      const auto run_bits = bits == 2 ? run_panels<2> : bits == 8 ? run_panels<8> : run_panels<4>;
      run_bits(task, block_bytes, width, chunks, chunk_count, row);
    } else if (in_long_groups) {
      row = end;
      const auto run_bits = bits == 2        ? run_long<2>
                            : bits == kTrits ? run_long<kTrits>
                            : bits == 8      ? run_long<8>
                                             : run_long<4>;
      run_bits(task, block_bytes, width, chunks, chunk_count, row);
    }
    for (; row < end; row += kTileRows) {
      const int64_t rows = end - row < kTileRows ? end - row : kTileRows;
      if (rows != configured) configure(rows);
      configured = rows;
      const bool fetch = task.beyond_l2 && row == 0;  // later rows find in L2 what the first ones read
      const auto run_tile_bits = bits == 2        ? run_tile<2, false>
                                 : bits == kTrits ? run_tile<kTrits, false>
                                 : bits == 3      ? (fetch ? run_tile<3, true> : run_tile<3, false>)
                                 : bits == 8      ? (fetch ? run_tile<8, true> : run_tile<8, false>)
                                 : fetch          ? run_tile<4, true>
                                                  : run_tile<4, false>;
      run_tile_bits(task, block_count, block_bytes, channels, chunks, chunk_count, row, rows);
    }
    release_tiles();
  }
  if (task.stream_outputs) _mm_sfence();  // streamed stores are not ordered with the caller's flags
  if (end < task.row_count) run_vnni(bits, from_row(task, end), block_count, block_bytes, channels);
  const TileTask unfinished = from_row(task, in_long_groups ? end : 0);
  if (!task.epilogue.empty() && unfinished.row_count > 0) {
    epilogue_rows<Floats>({unfinished.y, unfinished.ldy, unfinished.row_count, width, unfinished.epilogue});
  }
}

bool finishes_outputs(int bits, const TileTask& task, int64_t block_count) {
  constexpr int64_t kKeptBytes = 1 << 20;  // less is in L2 still when others come to it
  return task.row_count * task.ldy * 4 > kKeptBytes && long_groups_pay(bits, task, block_count, count_chunks(task));
}

void run(int bits, const TileTask& task) { run_blocks(bits, task, 1, 0, task.block_n_valid); }

// The layout is avx512_vnni's. These forward at the call because this file's accessor, which runs on
// any CPU, may do no more than return an address.
int64_t block_bytes(int bits, const KPiece* pieces, int64_t piece_count) {
  return linear_kernel_avx512_vbmi()->block_bytes(bits, pieces, piece_count);
}

float lane_factor(int bits, int64_t lane) { return linear_kernel_avx512_vbmi()->lane_factor(bits, lane); }

void pack_block(int bits, const KPiece* pieces, int64_t piece_count, const uint8_t* codes, int64_t ldk, int64_t valid_n,
                uint8_t* block) {
  linear_kernel_avx512_vbmi()->pack_block(bits, pieces, piece_count, codes, ldk, valid_n, block);
}

void unpack_block(int bits, const KPiece* pieces, int64_t piece_count, const uint8_t* block, int64_t ldk,
                  int64_t valid_n, uint8_t* codes) {
  linear_kernel_avx512_vbmi()->unpack_block(bits, pieces, piece_count, block, ldk, valid_n, codes);
}

void expand_block(int bits, const KPiece* pieces, int64_t piece_count, const uint8_t* block, uint8_t* expanded) {
  linear_kernel_avx512_vbmi()->expand_block(bits, pieces, piece_count, block, expanded);
}

template <int kBits>
void signed_tiles_of(const Unit& unit, const Chunk* chunks, int64_t chunk_count, int32_t zero, int8_t* tiles) {
  unpack_chunks<kBits>(unit, chunks, chunk_count, signed_bits<kBits>(zero), reinterpret_cast<uint8_t*>(tiles));
}

void signed_tiles(int bits, const KPiece* pieces, int64_t piece_count, int32_t zero, const uint8_t* block, bool upper,
                  int8_t* tiles) {
  TileTask task = {};
  task.pieces = pieces;
  Unit unit = {};
  unit.weight = block;
  unit.half = upper ? 1 : 0;
  const auto run_bits = bits == 2 ? signed_tiles_of<2> : bits == 8 ? signed_tiles_of<8> : signed_tiles_of<4>;
  Chunk chunks[kMaxChunks];
  for (task.piece_count = 1; piece_count > 0; --piece_count, ++task.pieces) {  // one at a time has room
    const int64_t count = count_chunks(task);
    list_chunks(task, bits, chunks);
    run_bits(unit, chunks, count, zero, tiles);
    tiles += count * kUnitTileBytes;
    unit.weight += count_quads(task) * 32 * bits;
  }
}

// Never for trits: amx_long_groups.h takes them apart where it wants them.
int64_t expand_rows(int bits) { return bits == kTrits ? INT64_MAX : 128; }

// Every CPU with AMX has 2 MB of L2. Loading the weights half as often: 4096x14336 at 8 bits and 512 rows
// from 47.8 ms to 37.7.
constexpr int64_t kActivationBytes = 768 << 10;

// One copy of the activations for 1,024 channels each took 8% of 4096x4096 at 512 rows.
constexpr int64_t kChannelsPerCopy = 4096;

constexpr LinearKernel kernel = [] {
  LinearKernel all = {Isa::amx, kBlockN, block_bytes, lane_factor, pack_block, unpack_block, run};
  all.run_blocks = run_blocks;
  all.expand_block = expand_block;
  all.expand_rows = expand_rows;
  all.activation_bytes = kActivationBytes;
  all.writes_codes = true;
  all.scratch_bytes = scratch_bytes;
  all.channels_per_copy = kChannelsPerCopy;
  all.takes_trits = true;
  all.signed_tiles = signed_tiles;
  all.finishes_outputs = finishes_outputs;
  return all;
}();

}  // namespace

const LinearKernel* linear_kernel_amx() { return &kernel; }

}  // namespace bantamweight

#else

namespace bantamweight {
const LinearKernel* linear_kernel_amx() { return nullptr; }
}  // namespace bantamweight

#endif
