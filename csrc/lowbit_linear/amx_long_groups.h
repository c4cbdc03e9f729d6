// Many rows on AMX: groups longer than amx_panel.h's, and outputs that are codes.
// For amx.cc only: everything is in an unnamed namespace.
//
// A panel is up to 768 k of one group and a unit of 32 channels, unpacked into L1 and multiplied by every
// row. The activations of up to 512 rows are copied once into the order of their tiles. They stream from
// L2, 32 bytes a cycle, with loads that leave L1 to the codes: with ordinary ones, 24 KB of codes and as
// much of activations push each other out (3,000 GOPS instead of 4,900). A longer group is cut into panels
// of up to 512 k, between which its int32 sums wait in memory and come back as tiles.
//
// At the end of a group a tile is stored just before it begins the next pair of row tiles, and turned into
// outputs a few rows a product while that pair is multiplied.
// An activation and a residual are had there, too, where the outputs go past the caches: read again, 512 x 3072 of
// them take 1.5 times as long with GELU. In L2 it is faster the other way round, when rows are rounded.
#pragma once

#include "epilogue/rows.h"
#include "lowbit_linear/amx_unit.h"

namespace bantamweight {
namespace {

constexpr int64_t kWholeChunks = 12, kCutChunks = 8;  // of a group in one panel, and of a panel of several
constexpr int64_t kMaxLongPairs = 16;
// Activations of a pass, which stay in L2.
constexpr int64_t kLongPassBytes = 1 << 20;

// Chunks of one group.
struct LongPanel {
  int32_t chunk, chunk_count, group;
  bool begins_group, ends_group;
};

int64_t list_panels(const Chunk* chunks, int64_t chunk_count, LongPanel* panels) {
  int64_t count = 0;
  for (int64_t c = 0, end; c < chunk_count; c = end) {
    for (end = c + 1; !chunks[end - 1].ends_group; ++end) {
    }
    const int64_t all = end - c, parts = all <= kWholeChunks ? 1 : (all + kCutChunks - 1) / kCutChunks;
    for (int64_t i = 0; i < parts; ++i) {
      const int64_t first = c + all * i / parts, last = c + all * (i + 1) / parts;
      panels[count++] = {static_cast<int32_t>(first), static_cast<int32_t>(last - first), chunks[c].group, i == 0,
                         i + 1 == parts};
    }
  }
  return count;
}

// The sums of up to 32 rows and a unit over a group, on their way to the outputs.
struct Leaving {
  const Unit* unit;
  const int32_t* sums;  // [2][2][16][16]: upper and lower rows, left and right channels
  float* outputs;       // the same of the groups before
  int64_t group, first_row;
  int64_t row = 0, rows = 0;  // rows [row, rows) are still to do
};

// Where they go: to `outputs` between groups, and behind the last.
enum class Outlet { partial, floats, streamed, codes };

// Sixteen codes of each of two vectors, of values up to 127, in order.
inline __m256i narrow(__m512 left, __m512 right) {
  const __m512i pairs = _mm512_packs_epi32(_mm512_cvtps_epi32(left), _mm512_cvtps_epi32(right));
  // Packing works within 128-bit lanes; this puts fours of channels back in order.
  const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
  const __m256i bytes = _mm512_cvtsepi16_epi8(_mm512_permutexvar_epi64(order, pairs));
  return _mm256_max_epi8(bytes, _mm256_set1_epi8(-127));
}

// Rows [begin, end), which lie in one tile.
template <bool kZeros, bool kGroupScale, Outlet kOutlet, class Kind = EpilogueKind<Activation::none, false>>
__attribute__((noinline)) void finish_outlet(const TileTask& task, const Leaving& leaving, int64_t begin, int64_t end) {
  alignas(64) static const float kNone[16] = {};
  const Unit& unit = *leaving.unit;
  const int64_t group = leaving.group, at = group * kBlockN, groups = task.groups;
  const int64_t part = begin / kTileRows * 2 * kTileInts + begin % kTileRows * 16, row = leaving.first_row + begin;
  const int32_t* sums = leaving.sums + part;
  float* outputs = leaving.outputs + part;
  // Not a masked load: of a page that was never written, it takes microcode.
  const float* before = group == 0 ? kNone : outputs;
  const int64_t before_row = group == 0 ? 0 : 16, before_right = group == 0 ? 0 : kTileInts;
  __m512 scale[2], zero_scale[2], bias[2];
  for (int j = 0; j < 2; ++j) {
    scale[j] = _mm512_mul_ps(_mm512_load_ps(unit.scale + at + 16 * j), _mm512_set1_ps(unit.factor[j]));
    zero_scale[j] = kZeros ? _mm512_load_ps(unit.zero_scale + at + 16 * j) : _mm512_setzero_ps();
    bias[j] = unit.bias[j];
  }
  const __mmask16 valid[2] = {unit.valid[0], unit.valid[1]};
  const float* row_scale = task.row_scale + row;
  const int32_t* row_sums = kZeros ? task.row_sums + row * groups + group : nullptr;
  const float* group_scale = kGroupScale ? task.group_scale + row * groups + group : nullptr;
  int8_t* const* codes = kOutlet == Outlet::codes ? task.codes.rows + row : nullptr;
  const int64_t channel = task.first_channel + unit.channel;
  const int8_t* const* added =
      kOutlet == Outlet::codes && task.codes.added != nullptr ? task.codes.added + row : nullptr;
  const __m512 factor = _mm512_set1_ps(task.codes.factor), most = _mm512_set1_ps(127.0f);
  float* y = kOutlet == Outlet::codes ? nullptr : task.y + row * task.ldy + unit.channel;
  const int64_t ldy = task.ldy;
  const float* residual = Kind::residual ? task.epilogue.residual + row * task.epilogue.ldr + unit.channel : nullptr;
  const bool whole = valid[1] == 0xffff;
#pragma GCC unroll 1
  for (int64_t r = 0; r < end - begin; ++r, sums += 16, outputs += 16, before += before_row) {
    __m512 out[2];
    for (int j = 0; j < 2; ++j) out[j] = _mm512_cvtepi32_ps(_mm512_load_si512(sums + j * kTileInts));
    float row_sum = kZeros ? static_cast<float>(row_sums[r * groups]) : 0.0f;
    if constexpr (kGroupScale) {
      row_sum *= group_scale[r * groups];
      for (int j = 0; j < 2; ++j) out[j] = _mm512_mul_ps(out[j], _mm512_set1_ps(group_scale[r * groups]));
    }
    out[0] = _mm512_fmadd_ps(out[0], scale[0], _mm512_load_ps(before));
    out[1] = _mm512_fmadd_ps(out[1], scale[1], _mm512_load_ps(before + before_right));
    for (int j = 0; kZeros && j < 2; ++j) {
      out[j] = _mm512_fnmadd_ps(zero_scale[j], _mm512_set1_ps(row_sum), out[j]);
    }
    if constexpr (kOutlet == Outlet::partial) {
      for (int j = 0; j < 2; ++j) _mm512_store_ps(outputs + j * kTileInts, out[j]);
      continue;
    }
    for (int j = 0; j < 2; ++j) out[j] = _mm512_fmadd_ps(out[j], _mm512_set1_ps(row_scale[r]), bias[j]);
    if constexpr (kOutlet == Outlet::floats || kOutlet == Outlet::streamed) {
      for (int j = 0; j < 2; ++j) out[j] = activate<Floats, Kind::activation>(out[j]);
      if constexpr (Kind::residual) {
        for (int j = 0; j < 2; ++j) out[j] = _mm512_add_ps(out[j], _mm512_maskz_loadu_ps(valid[j], residual + 16 * j));
        residual += task.epilogue.ldr;
      }
      if constexpr (kOutlet == Outlet::streamed) {
        for (int j = 0; j < 2; ++j) _mm512_stream_ps(y + 16 * j, out[j]);
      } else {
        for (int j = 0; j < 2; ++j) _mm512_mask_storeu_ps(y + 16 * j, valid[j], out[j]);
      }
      y += ldy;
    } else if constexpr (kOutlet == Outlet::codes) {
      if (added != nullptr) {
        for (int j = 0; j < 2; ++j) {
          const __m128i bytes = _mm_maskz_loadu_epi8(valid[j], added[r] + channel + 16 * j);
          out[j] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)), factor, out[j]);
        }
      }
      const __m256i bytes = narrow(_mm512_min_ps(out[0], most), _mm512_min_ps(out[1], most));
      int8_t* to = codes[r] + channel;
      if (whole) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), bytes);
      } else {
        _mm_mask_storeu_epi8(to, valid[0], _mm256_castsi256_si128(bytes));
        _mm_mask_storeu_epi8(to + 16, valid[1], _mm256_extracti128_si256(bytes, 1));
      }
    }
  }
}

template <bool kZeros, bool kGroupScale, Outlet kOutlet>
void finish_floats(const TileTask& task, const Leaving& leaving, int64_t begin, int64_t end) {
  with_epilogue_kind(task.epilogue, [&](auto kind) {
    finish_outlet<kZeros, kGroupScale, kOutlet, decltype(kind)>(task, leaving, begin, end);
  });
}

template <bool kZeros, bool kGroupScale>
__attribute__((noinline)) void finish_leaving(const TileTask& task, Leaving* leaving, int64_t count) {
  const int64_t all = leaving->rows - leaving->row < count ? leaving->rows : leaving->row + count;
  for (int64_t begin = leaving->row, end; begin < all; begin = end) {
    end = (begin / kTileRows + 1) * kTileRows;
    end = end < all ? end : all;
    if (leaving->group < task.groups - 1) {
      finish_outlet<kZeros, kGroupScale, Outlet::partial>(task, *leaving, begin, end);
    } else if (task.codes.rows != nullptr) {
      finish_outlet<kZeros, kGroupScale, Outlet::codes>(task, *leaving, begin, end);
    } else if (task.stream_outputs && leaving->unit->valid[1] == 0xffff) {
      finish_floats<kZeros, kGroupScale, Outlet::streamed>(task, *leaving, begin, end);
    } else {
      finish_floats<kZeros, kGroupScale, Outlet::floats>(task, *leaving, begin, end);
    }
  }
  leaving->row = all;
}

// The activations in the order in which panels, pairs and chunks take them. Behind the last row: that row.
void pack_rows(const int8_t* const* rows, int64_t row_count, int64_t pairs, const Chunk* chunks,
               const LongPanel* panels, int64_t panel_count, int8_t* to) {
  for (int64_t i = 0; i < panel_count; ++i) {
    const Chunk* first = chunks + panels[i].chunk;
    for (int64_t p = 0; p < pairs; ++p) {
      for (int64_t r = 0; r < kPairRows; ++r) {
        const int64_t row = p * kPairRows + r;
        const int8_t* from = rows[row < row_count ? row : row_count - 1];
        for (int64_t c = 0; c < panels[i].chunk_count; ++c) {
          _mm512_store_si512(to + c * kUnitTileBytes + r * 64, _mm512_loadu_si512(from + first[c].row_offset));
        }
      }
      to += panels[i].chunk_count * kUnitTileBytes;
    }
  }
}

// Memory of a pass; behind it the carried sums of each pair, with several groups as many outputs, and the
// activations.
struct LongMemory {
  alignas(64) uint8_t codes[kWholeChunks * kUnitTileBytes];
  alignas(64) int32_t sums[kPairTiles * kTileInts];
};

int64_t carried_bytes(const TileTask& task, int64_t pairs) { return (task.groups > 1 ? 2 : 1) * pairs * kPairBytes; }

// Stores tile t of the step before, and begins this one.
#define TILE_TURN(t)                             \
  if (!stays) {                                  \
    TILE_STORE(t, stored + t * kTileInts, 64);   \
    if (carried == nullptr) {                    \
      TILE_ZERO(t);                              \
    } else {                                     \
      TILE_LOAD(t, carried + t * kTileInts, 64); \
    }                                            \
  }
#define FINISH(count) \
  if (leaving.row < leaving.rows) finish_leaving<kZeros, kGroupScale>(task, &leaving, count);

// Rows [0, row_count) of `task`, at most 32 kMaxLongPairs, against every block.
template <int kBits, bool kZeros, bool kGroupScale>
void run_long_pass(const TileTask& task, int64_t block_bytes, int64_t channels, const Chunk* chunks,
                   const LongPanel* panels, int64_t panel_count, int64_t row_count, uint8_t* scratch) {
  const int64_t pairs = (row_count + kPairRows - 1) / kPairRows;
  auto* memory = reinterpret_cast<LongMemory*>(scratch);
  auto* carried_sums = reinterpret_cast<int32_t*>(scratch + sizeof(LongMemory));
  auto* outputs = reinterpret_cast<float*>(carried_sums) + (task.groups > 1 ? pairs * kPairBytes / 4 : 0);
  auto* packed = reinterpret_cast<int8_t*>(carried_sums) + carried_bytes(task, pairs);
  pack_rows(task.rows, row_count, pairs, chunks, panels, panel_count, packed);
  const auto codes = signed_codes<kBits>(kBits == 8 ? 128 : kZeros ? 0 : task.uniform_zero);
  const int64_t unit_count = (channels + kUnitN - 1) / kUnitN;
  Unit units[3];  // in turn: the sums of one leave during the next
  units[0] = unit_at<kBits>(task, block_bytes, channels, 0);
  Leaving leaving, next;
  int32_t* stored = memory->sums;  // where the tiles of the step before go
  for (int64_t u = 0; u < unit_count; ++u) {
    const Unit& unit = units[u % 3];
    units[(u + 1) % 3] = unit_at<kBits>(task, block_bytes, channels, u + 1 < unit_count ? u + 1 : u);
    const int8_t* activations = packed;
    for (int64_t i = 0; i < panel_count; ++i) {
      const LongPanel panel = panels[i];
      unpack_chunks<kBits>(unit, chunks + panel.chunk, panel.chunk_count, codes, memory->codes);
      const Unit& fetched_unit = i + 1 < panel_count ? unit : units[(u + 1) % 3];
      const LongPanel& fetched = panels[i + 1 < panel_count ? i + 1 : 0];
      // So many rows leave in each half chunk behind the first chunk that the last does it.
      const int64_t halves = 2 * (panel.chunk_count - 1);
      const int64_t count = halves == 0 ? kPairRows : (kPairRows + halves - 1) / halves;
      for (int64_t p = 0; p < pairs; ++p) {
        const bool stays = pairs == 1 && !panel.begins_group;
        int32_t* const of_pair = carried_sums + p * (kPairBytes / 4);
        const int32_t* const carried = panel.begins_group ? nullptr : of_pair;
        const int64_t first_row = p * kPairRows;
        const int64_t rows = row_count - first_row < kPairRows ? row_count - first_row : kPairRows;
        const int64_t quad = kChunkQuads * p / pairs, end_quad = kChunkQuads * (p + 1) / pairs;
        const uint8_t* tiles = memory->codes;
        const auto fetch = [&](int64_t c) {
          if (c < fetched.chunk_count) fetch_codes<kBits>(fetched_unit, chunks[fetched.chunk + c], quad, end_quad);
        };
        TILE_LOAD_ONCE(4, activations, 64);
        TILE_LOAD(6, tiles, 64);
        TILE_TURN(0)
        TILE_MULTIPLY_SIGNED(0, 4, 6);
        fetch(0);
        TILE_LOAD(7, tiles + kTileBytes, 64);
        TILE_TURN(1)
        TILE_MULTIPLY_SIGNED(1, 4, 7);
        TILE_LOAD_ONCE(5, activations + kTileBytes, 64);
        TILE_TURN(2)
        TILE_MULTIPLY_SIGNED(2, 5, 6);
        TILE_TURN(3)
        TILE_MULTIPLY_SIGNED(3, 5, 7);
        activations += kUnitTileBytes;
        if (!stays) {
          leaving = next;
          next.rows = 0;
        }
        for (int64_t c = 1; c < panel.chunk_count; ++c, activations += kUnitTileBytes) {
          tiles += kUnitTileBytes;
          TILE_LOAD_ONCE(4, activations, 64);
          TILE_LOAD(6, tiles, 64);
          TILE_MULTIPLY_SIGNED(0, 4, 6);
          fetch(c);
          TILE_LOAD(7, tiles + kTileBytes, 64);
          TILE_MULTIPLY_SIGNED(1, 4, 7);
          FINISH(count)
          TILE_LOAD_ONCE(5, activations + kTileBytes, 64);
          TILE_MULTIPLY_SIGNED(2, 5, 6);
          TILE_MULTIPLY_SIGNED(3, 5, 7);
          FINISH(count)
        }
        FINISH(kPairRows)
        stored = panel.ends_group ? memory->sums : of_pair;
        if (panel.ends_group) {
          next.unit = &unit;
          next.sums = memory->sums;
          next.outputs = outputs + p * (kPairBytes / 4);
          next.group = panel.group;
          next.first_row = first_row;
          next.row = 0;
          next.rows = rows;
        }
      }
    }
  }
  TILE_STORE(0, stored, 64);
  TILE_STORE(1, stored + kTileInts, 64);
  TILE_STORE(2, stored + 2 * kTileInts, 64);
  TILE_STORE(3, stored + 3 * kTileInts, 64);
  leaving = next;
  FINISH(kPairRows)
}
#undef TILE_TURN
#undef FINISH

// Pairs of row tiles that can share unpacked codes; 0 where too few have room.
int64_t most_long_pairs(int64_t chunk_count) {
  const int64_t fit = kLongPassBytes / (chunk_count * kUnitTileBytes);
  return fit < 2 ? 0 : fit < kMaxLongPairs ? fit : kMaxLongPairs;
}

int64_t long_scratch_bytes(const TileTask& task, int64_t chunk_count) {
  const int64_t all = (task.row_count + kPairRows - 1) / kPairRows, most = most_long_pairs(chunk_count);
  const int64_t pairs = all < most ? all : most;
  return static_cast<int64_t>(sizeof(LongMemory)) + carried_bytes(task, pairs) + pairs * chunk_count * kUnitTileBytes;
}

// Rows [0, row_count) of `task`.
template <int kBits>
void run_long(const TileTask& first, int64_t block_bytes, int64_t channels, const Chunk* chunks, int64_t chunk_count,
              int64_t row_count) {
  LongPanel panels[kMaxChunks];
  const int64_t panel_count = list_panels(chunks, chunk_count, panels);
  // Passes of equally many pairs but for the last.
  const int64_t all_pairs = (row_count + kPairRows - 1) / kPairRows, most = most_long_pairs(chunk_count);
  const int64_t passes = (all_pairs + most - 1) / most, rows = (all_pairs + passes - 1) / passes * kPairRows;
  const auto run =
      first.zero_scale != nullptr
          ? (first.group_scale != nullptr ? run_long_pass<kBits, true, true> : run_long_pass<kBits, true, false>)
          : (first.group_scale != nullptr ? run_long_pass<kBits, false, true> : run_long_pass<kBits, false, false>);
  configure(kTileRows);
  for (int64_t row = 0; row < row_count; row += rows) {
    run(from_row(first, row), block_bytes, channels, chunks, panels, panel_count,
        row_count - row < rows ? row_count - row : rows, first.scratch);
  }
}

}  // namespace
}  // namespace bantamweight
