// Many rows on AMX: panels of k whose codes are unpacked once, into L1, and multiplied by every row.
// For amx.cc only: everything is in an unnamed namespace.
//
// Two tiles of activations against two of codes go into four tiles of sums, 32 rows x 32 channels, so
// that a product costs one tile load. The activations are copied once into the order of their tiles: a
// tile whose rows are k bytes apart comes from one set of L1 and no prefetcher follows it. A panel is
// 256 k of 32 channels as signed bytes (8 KB), codes minus their zero, so that the zero costs nothing;
// what a panel adds to the outputs of up to 192 rows waits in floats beside it.
//
// The sums of a group pass through 4 KB of memory, because tiles have no other way out. Each tile is
// stored just before it begins the next group, three products after its last one, and turned into
// floats eight rows a product from some products later on: no store waits for a product, no load for
// a store. (Four stores in a row behind the products: 3,750 GOPS instead of 5,700, without the floats.)
//
// From L1 the products alone reach 5,500 GOPS, from L2 4,100, with the sums' stores 3,700, with floats
// 2,900; a layer of 4096 x 4096 in groups of 128 reaches 1,600 at 512 rows, where the stream of amx.cc
// has 1,230. A tenth is copying the activations, shared by 1,024 channels. Slower: panels of 512 k and
// more (2,450 instead of 3,200 with floats, without unpacking), unpacking between the products, two
// groups turned into floats together with sums twice as large.
#pragma once

#include "lowbit_linear/amx_unit.h"

namespace bantamweight {
namespace {

constexpr int64_t kPanelChunks = 4, kMaxPairs = 6;
// Activations of a pass, which stay in L2.
constexpr int64_t kPassBytes = 1 << 20;
// With fewer rows, unpacking into a ring for each 16 rows is as fast.
constexpr int64_t kMinPanelRows = 64;

// A group, of at most kPanelChunks chunks.
struct Step {
  int32_t chunk, chunk_count, group;
  bool ends_panel;
};

int64_t list_steps(const Chunk* chunks, int64_t chunk_count, Step* steps) {
  int64_t count = 0, in_panel = 0;
  for (int64_t c = 0; c < chunk_count;) {
    int64_t n = 1;
    while (!chunks[c + n - 1].ends_group) ++n;
    if (in_panel > 0 && in_panel + n > kPanelChunks) {
      steps[count - 1].ends_panel = true;
      in_panel = 0;
    }
    steps[count++] = {static_cast<int32_t>(c), static_cast<int32_t>(n), chunks[c].group, false};
    c += n;
    in_panel += n;
  }
  if (count > 0) steps[count - 1].ends_panel = true;
  return count;
}

// The sums of a step on their way out of the tiles. Its user copies it, so that its fields stay in
// registers: read from memory again for every row, the whole was about 5% slower.
struct Fold {
  const int32_t* sums = nullptr;
  bool due = false;                                                   // not before the first step
  bool last = false;                                                  // of the groups
  __mmask16 before = 0;                                               // none at the first group
  float* outputs = nullptr;                                           // [4][16][16], of the groups before
  __m512 left_scale, right_scale, left_zero_scale, right_zero_scale;  // of 16 channels each
  const Unit* unit = nullptr;
  int64_t row = 0, group = 0;
};

// Eight rows, of 64 over the pair's four tiles, from kFirst on.
template <bool kZeros, bool kGroupScale, int64_t kFirst, bool kLast>
inline __attribute__((always_inline)) void fold_rows(const TileTask& task, const Fold& fold) {
  constexpr int64_t kTile = kFirst / kTileRows, kHalf = kTile % 2;
  const int64_t row = fold.row + kTile / 2 * kTileRows + kFirst % kTileRows;
  const int32_t* sums = fold.sums + kFirst * 16;
  float* outputs = fold.outputs + kFirst * 16;
  // Kept apart: GCC 12 would compute the addresses of all rows ahead of the branches around this.
  __asm__ volatile("" : "+r"(sums), "+r"(outputs));
#pragma GCC unroll 8
  for (int64_t r = 0; r < 8; ++r, sums += 16, outputs += 16) {
    const int64_t of_group = (row + r) * task.groups + fold.group;
    __m512 out = _mm512_cvtepi32_ps(_mm512_load_si512(sums));
    float row_sum = kZeros ? static_cast<float>(task.row_sums[of_group]) : 0.0f;
    if constexpr (kGroupScale) {
      const float group_scale = task.group_scale[of_group];
      row_sum *= group_scale;
      out = _mm512_mul_ps(out, _mm512_set1_ps(group_scale));
    }
    out = _mm512_fmadd_ps(out, kHalf == 0 ? fold.left_scale : fold.right_scale,
                          _mm512_maskz_load_ps(fold.before, outputs));
    if constexpr (kZeros)
      out = _mm512_fnmadd_ps(kHalf == 0 ? fold.left_zero_scale : fold.right_zero_scale, _mm512_set1_ps(row_sum), out);
    if constexpr (kLast) {
      const Unit& unit = *fold.unit;
      out = _mm512_fmadd_ps(out, _mm512_set1_ps(task.row_scale[row + r]), unit.bias[kHalf]);
      float* y = task.y + (row + r) * task.ldy + unit.channel + 16 * kHalf;
      if (task.stream_outputs && unit.valid[kHalf] == 0xffff) {
        _mm512_stream_ps(y, out);
      } else {
        _mm512_mask_storeu_ps(y, unit.valid[kHalf], out);
      }
    } else {
      _mm512_store_ps(outputs, out);
    }
  }
}

// Stores tile t of the step before, and begins this one.
#define TILE_TURN(t)                       \
  TILE_STORE(t, sums + t * kTileInts, 64); \
  TILE_ZERO(t);
#define FOLD(fold, first)                                       \
  if (fold.due) {                                               \
    if (fold.last) {                                            \
      fold_rows<kZeros, kGroupScale, first, true>(task, fold);  \
    } else {                                                    \
      fold_rows<kZeros, kGroupScale, first, false>(task, fold); \
    }                                                           \
  }

// `chunk_count` chunks of 32 rows x 32 channels, while the lower tiles of `older`, the step before last,
// and the upper ones of `stored`, the last, are folded. A tile is folded before it is stored again.
template <bool kZeros, bool kGroupScale>
inline __attribute__((always_inline)) void run_step(const TileTask& task, const int8_t* activations,
                                                    const uint8_t* codes, int64_t chunk_count, int32_t* sums,
                                                    const Fold& older, const Fold& stored) {
  TILE_TURN(0)
  TILE_LOAD(4, activations, 64);
  TILE_LOAD(6, codes, 64);
  TILE_MULTIPLY_SIGNED(0, 4, 6);
  FOLD(older, 32)
  TILE_TURN(1)
  TILE_LOAD(7, codes + kTileBytes, 64);
  TILE_MULTIPLY_SIGNED(1, 4, 7);
  FOLD(older, 40)
  TILE_TURN(2)
  TILE_LOAD(5, activations + kTileBytes, 64);
  TILE_MULTIPLY_SIGNED(2, 5, 6);
  FOLD(older, 48)
  FOLD(older, 56)
  TILE_TURN(3)
  TILE_MULTIPLY_SIGNED(3, 5, 7);
  // At the second chunk where there is one.
  for (int64_t c = 1; c < chunk_count; ++c) {
    activations += kUnitTileBytes;
    codes += kUnitTileBytes;
    TILE_LOAD(4, activations, 64);
    TILE_LOAD(6, codes, 64);
    TILE_MULTIPLY_SIGNED(0, 4, 6);
    if (c == 1) FOLD(stored, 0)
    TILE_LOAD(7, codes + kTileBytes, 64);
    TILE_MULTIPLY_SIGNED(1, 4, 7);
    if (c == 1) FOLD(stored, 8)
    TILE_LOAD(5, activations + kTileBytes, 64);
    TILE_MULTIPLY_SIGNED(2, 5, 6);
    if (c == 1) FOLD(stored, 16)
    TILE_MULTIPLY_SIGNED(3, 5, 7);
    if (c == 1) FOLD(stored, 24)
  }
  if (chunk_count == 1) {
    FOLD(stored, 0)
    FOLD(stored, 8)
    FOLD(stored, 16)
    FOLD(stored, 24)
  }
}

// What is left behind the last step.
template <bool kZeros, bool kGroupScale>
inline __attribute__((always_inline)) void finish_steps(const TileTask& task, const Fold& older, const Fold& stored,
                                                        int32_t* sums) {
  FOLD(older, 32)
  FOLD(older, 40)
  FOLD(older, 48)
  FOLD(older, 56)
  TILE_STORE(0, sums, 64);
  TILE_STORE(1, sums + kTileInts, 64);
  TILE_STORE(2, sums + 2 * kTileInts, 64);
  TILE_STORE(3, sums + 3 * kTileInts, 64);
  FOLD(stored, 0)
  FOLD(stored, 8)
  FOLD(stored, 16)
  FOLD(stored, 24)
  FOLD(stored, 32)
  FOLD(stored, 40)
  FOLD(stored, 48)
  FOLD(stored, 56)
}

// The activations of `pairs` pairs of tiles in the order in which panels, pairs and chunks take them.
void pack_activations(const TileTask& task, int64_t pairs, const Chunk* chunks, const Step* steps, int64_t step_count,
                      int8_t* to) {
  for (int64_t begin = 0, end; begin < step_count; begin = end) {
    for (end = begin + 1; !steps[end - 1].ends_panel; ++end) {
    }
    const int64_t first = steps[begin].chunk, last = steps[end - 1].chunk + steps[end - 1].chunk_count;
    for (int64_t p = 0; p < pairs; ++p) {
      const int8_t* const* row = task.rows + p * kPairRows;
      for (int64_t c = first; c < last; ++c) {
        for (int64_t r = 0; r < kPairRows; ++r, to += 64) {
          _mm512_store_si512(to, _mm512_loadu_si512(row[r] + chunks[c].row_offset));
        }
      }
    }
  }
}

// Memory of a pass beside its activations.
struct PanelMemory {
  alignas(64) uint8_t codes[kPanelChunks * kUnitTileBytes];
  alignas(64) int32_t sums[kPairTiles * kTileInts];
  alignas(64) float outputs[kMaxPairs][kPairTiles * kTileInts];
};

// Rows [0, 32 pairs) of `task` against every block.
template <int kBits, bool kZeros, bool kGroupScale>
void run_pass(const TileTask& task, int64_t block_bytes, int64_t channels, const Chunk* chunks, int64_t chunk_count,
              const Step* steps, int64_t step_count, int64_t pairs, uint8_t* scratch) {
  auto* memory = reinterpret_cast<PanelMemory*>(scratch);
  auto* packed = reinterpret_cast<int8_t*>(scratch + sizeof(PanelMemory));
  pack_activations(task, pairs, chunks, steps, step_count, packed);
  const SignedCodes codes = signed_bits<kBits>(kBits == 8 ? 128 : kZeros ? 0 : task.uniform_zero);
  const int64_t unit_count = (channels + kUnitN - 1) / kUnitN;
  Unit units[4];  // in turn: the folds of one may go on during the next two
  Fold older, stored;
  stored.left_scale = stored.right_scale = stored.left_zero_scale = stored.right_zero_scale = _mm512_setzero_ps();
  older = stored;
  units[0] = unit_at<kBits>(task, block_bytes, channels, 0);
  for (int64_t u = 0; u < unit_count; ++u) {
    const Unit& unit = units[u % 4];
    Unit& next = units[(u + 1) % 4];
    next = unit_at<kBits>(task, block_bytes, channels, u + 1 < unit_count ? u + 1 : u);
    const int8_t* activations = packed;
    for (int64_t begin = 0, end; begin < step_count; begin = end) {
      for (end = begin + 1; !steps[end - 1].ends_panel; ++end) {
      }
      const int64_t first = steps[begin].chunk, last = steps[end - 1].chunk + steps[end - 1].chunk_count;
      for (int64_t c = first; c < last; ++c) {
        unpack_signed<kBits>(unit, chunks[c], codes, memory->codes + (c - first) * kUnitTileBytes);
      }
      const Unit& fetched = end < step_count ? unit : next;
      const int64_t fetch_from = end < step_count ? last : 0;
      for (int64_t p = 0; p < pairs; ++p) {
        const uint8_t* tiles = memory->codes;
        for (int64_t s = begin; s < end; ++s) {
          const Step& step = steps[s];
          for (int64_t c = step.chunk; c < step.chunk + step.chunk_count; ++c) {
            const int64_t at = fetch_from + c - first;
            if (at >= chunk_count) break;
            fetch_codes<kBits>(fetched, chunks[at], kChunkQuads * p / pairs, kChunkQuads * (p + 1) / pairs);
          }
          run_step<kZeros, kGroupScale>(task, activations, tiles, step.chunk_count, memory->sums, older, stored);
          activations += step.chunk_count * kUnitTileBytes;
          tiles += step.chunk_count * kUnitTileBytes;
          older = stored;
          stored.sums = memory->sums;
          stored.due = true;
          stored.last = step.group == task.groups - 1;
          stored.before = static_cast<__mmask16>(step.group == 0 ? 0 : 0xffff);
          stored.outputs = memory->outputs[p];
          const int64_t at = step.group * kBlockN;
          stored.left_scale = _mm512_mul_ps(_mm512_load_ps(unit.scale + at), _mm512_set1_ps(unit.factor[0]));
          stored.right_scale = _mm512_mul_ps(_mm512_load_ps(unit.scale + at + 16), _mm512_set1_ps(unit.factor[1]));
          if (kZeros) stored.left_zero_scale = _mm512_load_ps(unit.zero_scale + at);
          if (kZeros) stored.right_zero_scale = _mm512_load_ps(unit.zero_scale + at + 16);
          stored.unit = &unit;
          stored.row = p * kPairRows;
          stored.group = step.group;
        }
      }
    }
  }
  finish_steps<kZeros, kGroupScale>(task, older, stored, memory->sums);
}

// Pairs of row tiles that can share unpacked codes; 0 where too few have room.
int64_t most_pairs(int64_t chunk_count) {
  const int64_t fit = kPassBytes / (chunk_count * kUnitTileBytes);
  return fit < kMinPanelRows / kPairRows ? 0 : fit < kMaxPairs ? fit : kMaxPairs;
}

int64_t panel_scratch_bytes(int64_t row_count, int64_t chunk_count) {
  const int64_t pairs = row_count / kPairRows, most = most_pairs(chunk_count);
  return static_cast<int64_t>(sizeof(PanelMemory)) + (pairs < most ? pairs : most) * chunk_count * kUnitTileBytes;
}

// Rows [0, row_count) of `task`, a multiple of 32.
template <int kBits>
void run_panels(const TileTask& first, int64_t block_bytes, int64_t channels, const Chunk* chunks, int64_t chunk_count,
                int64_t row_count) {
  Step steps[kMaxChunks];
  const int64_t step_count = list_steps(chunks, chunk_count, steps);
  // Passes of equally many pairs but for the last.
  const int64_t all_pairs = row_count / kPairRows, most = most_pairs(chunk_count);
  const int64_t passes = (all_pairs + most - 1) / most, pairs = (all_pairs + passes - 1) / passes;
  const auto run = first.zero_scale != nullptr
                       ? (first.group_scale != nullptr ? run_pass<kBits, true, true> : run_pass<kBits, true, false>)
                       : (first.group_scale != nullptr ? run_pass<kBits, false, true> : run_pass<kBits, false, false>);
  configure(kTileRows);
  for (int64_t row = 0; row < row_count; row += pairs * kPairRows) {
    const int64_t left = (row_count - row) / kPairRows;
    run(from_row(first, row), block_bytes, channels, chunks, chunk_count, steps, step_count,
        left < pairs ? left : pairs, first.scratch);
  }
}

}  // namespace
}  // namespace bantamweight
