// AMX-INT8 over the layout of avx512_vnni.cc.
//
// 16 of its quads, 64 k of 64 channels, are four B tiles of 16 channels once the nested masks are
// applied; an A tile is 16 activation rows x 64 k as they lie in memory. At 2 bits each 64-byte row
// of the weights costs 1 load, 3 and, 3 stores into a buffer that stays in L1, and 1/16 of four tile
// loads; the fourth B tile is the row itself, loaded from where it lies. A few rows run on VNNI.
#include "lowbit_linear/lowbit_linear.h"

#if defined(__AMX_TILE__) && defined(__AMX_INT8__) && defined(__AVX512F__) && defined(__AVX512DQ__)
#include "lowbit_linear/finish_avx512.h"

namespace bantamweight {
namespace {

constexpr int64_t kTileRows = 16, kChunkK = 64, kChunkQuads = kChunkK / 4, kTileBytes = 1024;
constexpr int64_t kPanelRows = 128;     // rows that share one unpacking of the weights
constexpr int64_t kSegmentChunks = 16;  // chunks unpacked at once: 64 KB
constexpr int64_t kSlotBytes = 4 * kTileBytes;
// Below this many rows VNNI, which neither stores nor loads the unpacked weights again, is faster.
constexpr int64_t kMinRows = 3;

// Up to 64 k of one piece, as four B tiles.
struct Chunk {
  int64_t row_offset;  // of its activations
  const uint8_t* raw;  // its quads, zeros past the end of the piece
  uint8_t* slot;       // its masked tiles
};

// Written with memory clobbers: the compiler sees neither what a tile load reads nor what a store writes.
#define TILE_LOAD(tile, address, stride) \
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile::"r"(address), "r"(static_cast<int64_t>(stride)) : "memory")
#define TILE_STORE(tile, address, stride)                                                                             \
  __asm__ volatile("tilestored %%tmm" #tile ", (%0,%1,1)" ::"r"(address), "r"(static_cast<int64_t>(stride)) : "memor" \
                                                                                                              "y")
#define TILE_ZERO(tile) __asm__ volatile("tilezero %%tmm" #tile::: "memory")
// sum += activations (signed) x codes (unsigned)
#define TILE_MULTIPLY(sum, activations, codes) \
  __asm__ volatile("tdpbsud %%tmm" #codes ", %%tmm" #activations ", %%tmm" #sum::: "memory")

// Tiles 0 .. 3 hold sums, 4 and 5 activations, 6 and 7 codes (5 too where one row tile is in use).
// upper: rows of the tiles of the first 16 rows of a pair; lower: of the second, 0 for none.
void configure(int64_t upper, int64_t lower) {
  alignas(64) uint8_t config[64] = {};
  config[0] = 1;                                        // palette
  for (int t = 0; t < 8; ++t) config[16 + 2 * t] = 64;  // bytes a row
  const bool pair = lower > 0;
  const int64_t height[8] = {
      upper, upper, pair ? lower : upper, pair ? lower : upper, upper, pair ? lower : kTileRows, kTileRows, kTileRows};
  for (int t = 0; t < 8; ++t) config[48 + t] = static_cast<uint8_t>(height[t]);
  __asm__ volatile("ldtilecfg %0" ::"m"(config) : "memory");
}

template <int kBits>
inline const uint8_t* codes_tile(const Chunk& chunk, int j) {
  if (kBits == 2) return j == 3 ? chunk.raw : chunk.slot + kTileBytes * j;
  if (kBits == 4) return j % 2 == 1 ? chunk.raw + 64 * (j / 2) : chunk.slot + kTileBytes * (j / 2);
  return chunk.raw + 64 * j;
}

template <int kBits>
constexpr int64_t codes_stride(int j) {
  return kBits == 2 ? 64 : kBits == 4 ? (j % 2 == 1 ? 128 : 64) : 256;
}

// Fills the slot of a chunk that has `quads` quads at `weight`.
template <int kBits>
inline void unpack(const uint8_t* weight, int64_t quads, Chunk* chunk) {
  constexpr int64_t kStep = 32 * kBits, kMasked = kBits == 2 ? 3 : kBits == 4 ? 2 : 0, kPrefetch = 2048;
  chunk->raw = weight;
  if (quads < kChunkQuads) {
    uint8_t* padded = chunk->slot + kMasked * kTileBytes;
    for (int64_t i = 0; i < kChunkQuads * kStep; i += 64) {
      const __m512i row = i < quads * kStep ? _mm512_load_si512(weight + i) : _mm512_setzero_si512();
      _mm512_store_si512(padded + i, row);
    }
    chunk->raw = padded;
  }
  const __m512i low2 = _mm512_set1_epi8(0x03), low4 = _mm512_set1_epi8(0x0f), low6 = _mm512_set1_epi8(0x3f);
  uint8_t* to = chunk->slot;
#pragma GCC unroll 4
  for (int64_t q = 0; q < kChunkQuads; ++q, to += 64) {
    const uint8_t* from = chunk->raw + q * kStep;
    for (int64_t line = 0; line < kStep; line += 64) _mm_prefetch(weight + q * kStep + line + kPrefetch, _MM_HINT_T0);
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

// Where the A tiles of 16 rows lie: chunk c at base + offset[c], rows `stride` bytes apart.
struct RowTile {
  const int8_t* base;
  int64_t stride;
  const int64_t* offset;
};

template <int kBits>
inline void multiply_1x4(const Chunk& chunk, const int8_t* activations, int64_t stride) {
  TILE_LOAD(4, activations, stride);
  TILE_LOAD(5, codes_tile<kBits>(chunk, 0), codes_stride<kBits>(0));
  TILE_MULTIPLY(0, 4, 5);
  TILE_LOAD(6, codes_tile<kBits>(chunk, 1), codes_stride<kBits>(1));
  TILE_MULTIPLY(1, 4, 6);
  TILE_LOAD(7, codes_tile<kBits>(chunk, 2), codes_stride<kBits>(2));
  TILE_MULTIPLY(2, 4, 7);
  TILE_LOAD(5, codes_tile<kBits>(chunk, 3), codes_stride<kBits>(3));
  TILE_MULTIPLY(3, 4, 5);
}

inline void start_1x4(bool zero, const int32_t* sums) {
  if (zero) {
    TILE_ZERO(0);
    TILE_ZERO(1);
    TILE_ZERO(2);
    TILE_ZERO(3);
  } else {
    TILE_LOAD(0, sums, 256);
    TILE_LOAD(1, sums + 16, 256);
    TILE_LOAD(2, sums + 32, 256);
    TILE_LOAD(3, sums + 48, 256);
  }
}

inline void store_1x4(int32_t* sums) {
  TILE_STORE(0, sums, 256);
  TILE_STORE(1, sums + 16, 256);
  TILE_STORE(2, sums + 32, 256);
  TILE_STORE(3, sums + 48, 256);
}

// 32 rows against the channels of B tiles kJ and kJ + 1 over a segment.
template <int kBits, int kJ>
inline void multiply_2x2(const Chunk* chunks, int64_t count, const RowTile& upper, const RowTile& lower, bool zero,
                         int32_t* sums) {
  int32_t* below = sums + kTileRows * 64;
  if (zero) {
    TILE_ZERO(0);
    TILE_ZERO(1);
    TILE_ZERO(2);
    TILE_ZERO(3);
  } else {
    TILE_LOAD(0, sums + 16 * kJ, 256);
    TILE_LOAD(1, sums + 16 * kJ + 16, 256);
    TILE_LOAD(2, below + 16 * kJ, 256);
    TILE_LOAD(3, below + 16 * kJ + 16, 256);
  }
  for (int64_t c = 0; c < count; ++c) {
    TILE_LOAD(4, upper.base + upper.offset[c], upper.stride);
    TILE_LOAD(6, codes_tile<kBits>(chunks[c], kJ), codes_stride<kBits>(kJ));
    TILE_MULTIPLY(0, 4, 6);
    TILE_LOAD(7, codes_tile<kBits>(chunks[c], kJ + 1), codes_stride<kBits>(kJ + 1));
    TILE_MULTIPLY(1, 4, 7);
    TILE_LOAD(5, lower.base + lower.offset[c], lower.stride);
    TILE_MULTIPLY(2, 5, 6);
    TILE_MULTIPLY(3, 5, 7);
  }
  TILE_STORE(0, sums + 16 * kJ, 256);
  TILE_STORE(1, sums + 16 * kJ + 16, 256);
  TILE_STORE(2, below + 16 * kJ, 256);
  TILE_STORE(3, below + 16 * kJ + 16, 256);
}

// Bytes from each row to the next, or 0 if they are not equally spaced.
int64_t equal_spacing(const int8_t* const* rows, int64_t count) {
  if (count == 1) return 64;
  const int64_t stride = rows[1] - rows[0];
  for (int64_t r = 2; r < count; ++r) {
    if (rows[r] - rows[r - 1] != stride) return 0;
  }
  return stride;
}

// The 64-k chunks of one group, walked through in segments.
struct Walk {
  const TileTask& task;
  const uint8_t* weight;
  int64_t piece = 0, quad = 0;  // the next chunk starts here

  bool at_end_of_group(int64_t group) const { return piece == task.piece_count || task.pieces[piece].group != group; }
};

inline int64_t quads_of(const KPiece& piece) { return (piece.k_size + 3) / 4; }

// Takes the next chunk into `chunk` (whose slot is set) and unpacks it.
template <int kBits>
inline void next_chunk(Walk* walk, Chunk* chunk) {
  const KPiece& piece = walk->task.pieces[walk->piece];
  const int64_t left = quads_of(piece) - walk->quad, quads = left < kChunkQuads ? left : kChunkQuads;
  chunk->row_offset = piece.row_offset + 4 * walk->quad;
  unpack<kBits>(walk->weight, quads, chunk);
  walk->weight += quads * 32 * kBits;
  walk->quad += quads;
  if (quads == left) {
    ++walk->piece;
    walk->quad = 0;
  }
}

// Copies the activations of a segment for rows that are not equally spaced: [chunk][16 rows][64].
void gather(const int8_t* const* rows, int64_t count, const Chunk* chunks, int64_t chunk_count, int8_t* to) {
  for (int64_t c = 0; c < chunk_count; ++c) {
    for (int64_t r = 0; r < count; ++r) {
      _mm512_store_si512(to + c * kTileBytes + r * 64, _mm512_loadu_si512(rows[r] + chunks[c].row_offset));
    }
  }
}

// At most 16 rows: every chunk is unpacked two steps before its tiles are loaded and then forgotten.
template <int kBits>
void run_one_tile(const TileTask& task) {
  constexpr int64_t kAhead = 2, kRing = 4;
  alignas(64) uint8_t slots[kRing * kSlotBytes];
  alignas(64) int8_t gathered[kRing * kTileBytes];
  alignas(64) int32_t sums[kTileRows * 64];
  alignas(64) float partial[kTileRows * 64];
  const int64_t rows = task.row_count, stride = equal_spacing(task.rows, rows);
  configure(rows, 0);
  Walk walk = {task, task.weight};
  Chunk ring[kRing];
  for (int64_t i = 0; i < kRing; ++i) ring[i].slot = slots + i * kSlotBytes;
  while (walk.piece < task.piece_count) {
    const int64_t group = task.pieces[walk.piece].group;
    start_1x4(true, nullptr);
    for (int64_t unpacked = 0, done = 0;;) {
      if (!walk.at_end_of_group(group)) {
        Chunk* chunk = &ring[unpacked % kRing];
        next_chunk<kBits>(&walk, chunk);
        if (stride == 0) gather(task.rows, rows, chunk, 1, gathered + unpacked % kRing * kTileBytes);
        ++unpacked;
        if (unpacked - done <= kAhead) continue;
      }
      if (done == unpacked) break;
      const Chunk& chunk = ring[done % kRing];
      const int8_t* activations = stride == 0 ? gathered + done % kRing * kTileBytes : task.rows[0] + chunk.row_offset;
      multiply_1x4<kBits>(chunk, activations, stride == 0 ? 64 : stride);
      ++done;
    }
    store_1x4(sums);
    finish_group<kBits>(task, group, 0, rows, sums, partial);
  }
}

// Up to 128 rows: each segment is unpacked once and used by every pair of row tiles.
template <int kBits>
void run_panel(const TileTask& task, int64_t panel_begin, int64_t panel_rows) {
  alignas(64) uint8_t slots[kSegmentChunks * kSlotBytes];
  alignas(64) int8_t gathered[2 * kSegmentChunks * kTileBytes];
  alignas(64) int32_t sums[kPanelRows * 64];
  alignas(64) float partial[kPanelRows * 64];
  const int8_t* const* rows = task.rows + panel_begin;
  Chunk chunks[kSegmentChunks];
  int64_t row_offset[kSegmentChunks], gathered_offset[kSegmentChunks];
  for (int64_t c = 0; c < kSegmentChunks; ++c) {
    chunks[c].slot = slots + c * kSlotBytes;
    gathered_offset[c] = c * kTileBytes;
  }
  const int64_t tiles = (panel_rows + kTileRows - 1) / kTileRows;
  const auto height = [&](int64_t tile) {
    const int64_t left = panel_rows - tile * kTileRows;
    return left < kTileRows ? left : kTileRows;
  };
  int64_t stride[kPanelRows / kTileRows];
  for (int64_t t = 0; t < tiles; ++t) stride[t] = equal_spacing(rows + t * kTileRows, height(t));

  Walk walk = {task, task.weight};
  int64_t configured_upper = 0, configured_lower = 0;
  while (walk.piece < task.piece_count) {
    const int64_t group = task.pieces[walk.piece].group;
    for (bool first = true; !walk.at_end_of_group(group); first = false) {
      int64_t count = 0;
      for (; count < kSegmentChunks && !walk.at_end_of_group(group); ++count) {
        next_chunk<kBits>(&walk, &chunks[count]);
        row_offset[count] = chunks[count].row_offset;
      }
      for (int64_t t = 0; t < tiles; t += 2) {
        RowTile tile[2];
        for (int64_t i = 0; i < 2 && t + i < tiles; ++i) {
          const int8_t* const* tile_rows = rows + (t + i) * kTileRows;
          int8_t* copy = gathered + i * kSegmentChunks * kTileBytes;
          if (stride[t + i] == 0) gather(tile_rows, height(t + i), chunks, count, copy);
          tile[i] = stride[t + i] == 0 ? RowTile{copy, 64, gathered_offset}
                                       : RowTile{tile_rows[0], stride[t + i], row_offset};
        }
        const int64_t upper = height(t), lower = t + 1 < tiles ? height(t + 1) : 0;
        if (upper != configured_upper || lower != configured_lower) {
          configure(upper, lower);
          configured_upper = upper;
          configured_lower = lower;
        }
        int32_t* tile_sums = sums + t * kTileRows * 64;
        if (lower > 0) {
          multiply_2x2<kBits, 0>(chunks, count, tile[0], tile[1], first, tile_sums);
          multiply_2x2<kBits, 2>(chunks, count, tile[0], tile[1], first, tile_sums);
        } else {
          start_1x4(first, tile_sums);
          for (int64_t c = 0; c < count; ++c) {
            multiply_1x4<kBits>(chunks[c], tile[0].base + tile[0].offset[c], tile[0].stride);
          }
          store_1x4(tile_sums);
        }
      }
    }
    finish_group<kBits>(task, group, panel_begin, panel_rows, sums, partial);
  }
}

template <int kBits>
void run_bits(const TileTask& task) {
  if (task.row_count <= kTileRows) {
    run_one_tile<kBits>(task);
  } else {
    for (int64_t begin = 0; begin < task.row_count; begin += kPanelRows) {
      const int64_t left = task.row_count - begin;
      run_panel<kBits>(task, begin, left < kPanelRows ? left : kPanelRows);
    }
  }
  // Nothing of the tiles is left behind: the next context switch need not save them.
  __asm__ volatile("tilerelease" ::: "memory");
}

void run(int bits, const TileTask& task) {
  if (task.row_count < kMinRows || task.piece_count == 0) {
    linear_kernel_avx512_vnni()->run(bits, task);
  } else if (bits == 2) {
    run_bits<2>(task);
  } else if (bits == 8) {
    run_bits<8>(task);
  } else {
    run_bits<4>(task);
  }
}

// The layout is avx512_vnni's. These forward at the call because this file's accessor, which runs on
// any CPU, may do no more than return an address.
int64_t block_bytes(int bits, const KPiece* pieces, int64_t piece_count) {
  return linear_kernel_avx512_vnni()->block_bytes(bits, pieces, piece_count);
}

float lane_factor(int bits, int64_t lane) { return linear_kernel_avx512_vnni()->lane_factor(bits, lane); }

void pack_block(int bits, const KPiece* pieces, int64_t piece_count, const uint8_t* codes, int64_t ldk, int64_t valid_n,
                uint8_t* block) {
  linear_kernel_avx512_vnni()->pack_block(bits, pieces, piece_count, codes, ldk, valid_n, block);
}

void unpack_block(int bits, const KPiece* pieces, int64_t piece_count, const uint8_t* block, int64_t ldk,
                  int64_t valid_n, uint8_t* codes) {
  linear_kernel_avx512_vnni()->unpack_block(bits, pieces, piece_count, block, ldk, valid_n, codes);
}

constexpr LinearKernel kernel = {Isa::amx, 64, block_bytes, lane_factor, pack_block, unpack_block, run};

}  // namespace

const LinearKernel* linear_kernel_amx() { return &kernel; }

}  // namespace bantamweight

#else

namespace bantamweight {
const LinearKernel* linear_kernel_amx() { return nullptr; }
}  // namespace bantamweight

#endif
