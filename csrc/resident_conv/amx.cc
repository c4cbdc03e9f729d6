// AMX-INT8: four tiles of sums at a time, 16 pixels x 64 channels, 32 x 32 or 64 x 16, in all of which
// four vectors of sums make a line of 64 codes.
//
// Tiles of activations are loaded from the image, whose pixels are equally spaced within a row of it, and
// from row to row if what lies between them is multiplied, too; others that turn into the next row are
// copied together first. Their rows overlap and cross cache lines:
// loading 64 bytes of each, 16 apart, takes 10.9 ns, 48 bytes 6.0 and 32 bytes 3.0, where a product takes
// 5.0. So chunks are no longer than they have to be.
//
// While one unit is multiplied, its tiles give up the sums of the unit before just before they begin
// anew, and those become codes during the rest of it, a few lines a chunk: 5 ns a line, which with few
// chunks is most of the time. No gain here: a line a product, all lines at once, two tiles side by side
// where there could be four.
//
// Weights from L2 (32 x 32): the activations of 32 pixels stay in L1 for all channels, those of a 3x3
// kernel 16 KB at 256 channels, and 2 KB of weights a chunk stream past them: 27 to 35 ns a chunk of four
// products, which alone take 21. Tiles of 14 rows, for maps as wide, take as long as those of 16; fetching
// the weights ahead, or loading them past L1, gains nothing.
#include "resident_conv/resident_conv.h"

#if defined(__AMX_TILE__) && defined(__AMX_INT8__) && defined(__AVX512F__) && defined(__AVX512BW__)
#include <immintrin.h>

#include "runtime/tiles_amx.h"

namespace bantamweight {
namespace {

constexpr int64_t kLines = 16;  // of codes in four tiles

// 16 output pixels; some may be there only to fill the tile.
struct Pixels {
  bool in_row;      // they are in one row, and all are wanted
  int64_t spacing;  // bytes between their activations; 0 where those are not equally spaced
  bool copied;      // together, tile by tile
  // Of the first one; of each one where they are not in one row, codes null where none are wanted.
  const int8_t* q;
  int8_t* codes;
  const int8_t* added;
  const int8_t* each_q[kTileRows];
  int8_t* each_codes[kTileRows];
  const int8_t* each_added[kTileRows];
};

// Where the next pixels are. Where activations are equally spaced from row to row, too, but for a border,
// tiles run on through the border: what they make of it is dropped. The last tile of such a run begins so
// much earlier that it ends with it.
class Cursor {
 public:
  explicit Cursor(const ResidentTask& task) : task_(task), left_(task.images * task.height * task.width) {
    // Rows of whole tiles have no use for it.
    if (task.row_bytes % task.pixel_bytes != 0 || task.width % kTileRows == 0) return;
    const int64_t columns = task.row_bytes / task.pixel_bytes, all = (task.height - 1) * columns + task.width;
    const bool on = columns == task.width && (task.images == 1 || task.image_bytes == task.height * task.row_bytes);
    const int64_t positions = on ? left_ : all;
    // Copying costs more than an eighth of the products; once for all channels, activations from L2 and not
    // from L1 cost almost a third.
    const int64_t most = task.height * task.width * (task.copies == nullptr ? 36 : 42) / 32;
    if (positions < kTileRows || all > most) return;
    columns_ = columns;
    positions_ = positions;
    left_ = (on ? 1 : task.images) * positions;
  }

  bool done() const { return left_ == 0; }

  void next(Pixels* pixels) {
    if (columns_ != 0) {
      next_in_run(pixels);
    } else {
      next_of_all(pixels);
    }
  }

 private:
  void next_in_run(Pixels* pixels) {
    const bool none = left_ == 0;
    int64_t at = none ? 0 : left_ % positions_ == 0 ? 0 : positions_ - left_ % positions_;
    const int64_t image = none ? 0 : task_.images - (left_ + positions_ - 1) / positions_;
    if (!none) left_ -= positions_ - at < kTileRows ? positions_ - at : kTileRows;
    if (at > positions_ - kTileRows) at = positions_ - kTileRows;
    const bool on = columns_ == task_.width;
    image_ = on ? at / columns_ / task_.height : image;
    y_ = on ? at / columns_ % task_.height : at / columns_;
    x_ = at % columns_;
    pixels->in_row = !none && x_ + kTileRows <= task_.width;
    pixels->spacing = task_.pixel_bytes;
    point(&pixels->q, &pixels->codes, &pixels->added);
    if (pixels->in_row) return;
    const int8_t* q;
    for (int64_t r = 0; r < kTileRows; ++r) {
      pixels->each_added[r] = pixels->added;
      pixels->each_codes[r] = nullptr;
      if (!none && x_ < task_.width) point(&q, &pixels->each_codes[r], &pixels->each_added[r]);
      if (++x_ == columns_) turn_row();
    }
  }

  void next_of_all(Pixels* pixels) {
    const int64_t count = left_ < kTileRows ? left_ : kTileRows;
    if (count == 0) image_ = y_ = x_ = 0;  // none: anything that can be read
    pixels->in_row = count == kTileRows && x_ + kTileRows <= task_.width;
    pixels->spacing = pixels->in_row ? task_.pixel_bytes : 0;
    point(&pixels->q, &pixels->codes, &pixels->added);
    left_ -= count;
    if (pixels->in_row) {
      x_ += kTileRows;
      if (x_ == task_.width) turn_row();
      return;
    }
    for (int64_t r = 0; r < kTileRows; ++r) {
      point(&pixels->each_q[r], &pixels->each_codes[r], &pixels->each_added[r]);
      if (r >= count) pixels->each_codes[r] = nullptr;
      if (r + 1 < count && ++x_ == task_.width) turn_row();  // those that are missing are the last one again
    }
    if (count > 0 && ++x_ == task_.width) turn_row();
  }

  void point(const int8_t** q, int8_t** codes, const int8_t** added) const {
    const ResidentTask& t = task_;
    *q = t.q + image_ * t.image_bytes + y_ * t.row_bytes + x_ * t.pixel_bytes;
    *codes = t.codes + image_ * t.codes_image_bytes + y_ * t.codes_row_bytes + x_ * t.codes_pixel_bytes;
    *added = nullptr;
    if (t.added != nullptr) {
      *added = t.added + image_ * t.added_image_bytes + y_ * t.added_row_bytes + x_ * t.codes_pixel_bytes;
    }
  }

  void turn_row() {
    x_ = 0;
    if (++y_ == task_.height) {
      y_ = 0;
      ++image_;
    }
  }

  const ResidentTask& task_;
  int64_t left_;                         // pixels, or positions of all runs
  int64_t columns_ = 0, positions_ = 0;  // pixels from row to row and of a run; 0: no runs
  int64_t image_ = 0, y_ = 0, x_ = 0;
};

// Four tiles of sums on their way to codes.
struct Unit {
  const Pixels* pixels = nullptr;  // a tile's
  int64_t first_channel = 0;
};

inline void store(int8_t* to, __m256i codes) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), codes); }
inline void store(int8_t* to, __m128i codes) { _mm_storeu_si128(reinterpret_cast<__m128i*>(to), codes); }

// Lines [begin, end) of sums [4 tiles][16][16]. Not inlined: what the multiplication keeps in registers
// is not what this needs there.
template <int kWide, bool kAdded>
__attribute__((noinline)) void finish(const ResidentTask& task, const Unit& unit, const int32_t* sums, uint64_t begin,
                                      uint64_t end) {
  constexpr uint64_t kPixels = 4 / kWide;  // of a line
  const int64_t first_channel = unit.first_channel, pixel_bytes = task.codes_pixel_bytes;
  const float *scale = task.weight.scale + first_channel, *bias = task.weight.bias + first_channel;
  const __m512 factor = _mm512_set1_ps(task.factor), added_factor = _mm512_set1_ps(task.added_factor);
  const __m512 most = _mm512_set1_ps(127.0f);
  // Packing works within 128-bit lanes; this puts the dwords back in order.
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i least = _mm512_set1_epi8(-127);
#pragma GCC unroll 1
  for (uint64_t line = begin; line < end; ++line) {
    const uint64_t tile = line * kPixels / kTileRows, row = line * kPixels % kTileRows;
    const Pixels& at = unit.pixels[tile];
    const int32_t* from = sums + tile * kWide * kTileInts + row * 16;
    const auto place = [&](auto* first, auto* const* each, uint64_t r) {
      return (at.in_row ? first + r * pixel_bytes : each[r]) + first_channel;
    };
    const auto wanted = [&](uint64_t r) { return at.in_row || at.each_codes[r] != nullptr; };
    __m512i codes[4];
#pragma GCC unroll 4
    for (uint64_t j = 0; j < 4; ++j) {
      const uint64_t lane = 16 * (j % kWide);
      const __m512i sum = _mm512_load_si512(from + j % kWide * kTileInts + j / kWide * 16);
      __m512 y = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_load_ps(scale + lane));
      y = _mm512_fmadd_ps(y, factor, _mm512_load_ps(bias + lane));
      if constexpr (kAdded) {
        const int8_t* added = place(at.added, at.each_added, row + j / kWide) + lane;
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(added));
        y = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)), added_factor, y);
      }
      codes[j] = _mm512_cvtps_epi32(_mm512_min_ps(y, most));
    }
    const __m512i packed =
        _mm512_packs_epi16(_mm512_packs_epi32(codes[0], codes[1]), _mm512_packs_epi32(codes[2], codes[3]));
    const __m512i out = _mm512_max_epi8(_mm512_permutexvar_epi32(order, packed), least);
    if (kWide == 4 ? wanted(row) : at.in_row && pixel_bytes == 16 * kWide) {
      _mm512_storeu_si512(place(at.codes, at.each_codes, row), out);
      continue;
    }
    if constexpr (kWide == 2) {
      if (wanted(row)) store(place(at.codes, at.each_codes, row), _mm512_castsi512_si256(out));
      if (wanted(row + 1)) store(place(at.codes, at.each_codes, row + 1), _mm512_extracti64x4_epi64(out, 1));
    } else if constexpr (kWide == 1) {
      if (wanted(row)) store(place(at.codes, at.each_codes, row), _mm512_castsi512_si128(out));
      if (wanted(row + 1)) store(place(at.codes, at.each_codes, row + 1), _mm512_extracti32x4_epi32(out, 1));
      if (wanted(row + 2)) store(place(at.codes, at.each_codes, row + 2), _mm512_extracti32x4_epi32(out, 2));
      if (wanted(row + 3)) store(place(at.codes, at.each_codes, row + 3), _mm512_extracti32x4_epi32(out, 3));
    }
  }
}

// The address of a tile of activations and the bytes between its rows.
struct Rows {
  const int8_t* from;
  int64_t stride;
};

template <bool kFromL2>
inline __attribute__((always_inline)) Rows rows_of(const Pixels& pixels, int64_t chunk, int64_t offset, int8_t* copy) {
  if (kFromL2 && pixels.copied) return {pixels.q + chunk * kTileBytes, 64};
  if (kFromL2 || pixels.spacing != 0) return {pixels.q + offset, pixels.spacing};
  for (int64_t r = 0; r < kTileRows; ++r) {
    _mm512_store_si512(copy + 64 * r, _mm512_loadu_si512(pixels.each_q[r] + offset));
  }
  return {copy, 64};
}

// Those chunk by chunk, once for all channels.
void copy_together(Pixels* pixels, const ResidentWeight& weight, int8_t* copies) {
  for (int64_t r = 0; r < kTileRows; ++r) {
    for (int64_t c = 0; c < weight.chunks.count; ++c) {
      const __m512i activations = _mm512_loadu_si512(pixels->each_q[r] + weight.offsets[c]);
      _mm512_store_si512(copies + c * kTileBytes + r * 64, activations);
    }
  }
  pixels->q = copies;
  pixels->copied = true;
}

#define TURN(t)                                \
  if (first) {                                 \
    TILE_STORE(t, sums + (t) * kTileInts, 64); \
    TILE_ZERO(t);                              \
  }
#define LOAD_ROWS(tile, index)                                                                       \
  {                                                                                                  \
    const Rows rows = rows_of<kFromL2>(pixels[index], chunk, offset, copies + (index) * kTileBytes); \
    TILE_LOAD(tile, rows.from, rows.stride);                                                         \
  }
#define LOAD_CODES(tile, index) TILE_LOAD(tile, codes + (index) * tile_bytes, 64)

// A chunk of a unit. At the first one the sums before leave the tiles for `sums`.
template <int kWide, bool kFromL2>
inline __attribute__((always_inline)) void multiply(const Pixels* pixels, int64_t chunk, int64_t offset,
                                                    const int8_t* codes, int64_t tile_bytes, int8_t* copies,
                                                    int32_t* sums) {
  const bool first = chunk == 0;
  if constexpr (kWide == 4) {
    LOAD_ROWS(4, 0)
    TURN(0)
    LOAD_CODES(5, 0);
    TILE_MULTIPLY_SIGNED(0, 4, 5);
    TURN(1)
    LOAD_CODES(6, 1);
    TILE_MULTIPLY_SIGNED(1, 4, 6);
    TURN(2)
    LOAD_CODES(7, 2);
    TILE_MULTIPLY_SIGNED(2, 4, 7);
    TURN(3)
    LOAD_CODES(5, 3);
    TILE_MULTIPLY_SIGNED(3, 4, 5);
  } else if constexpr (kWide == 2) {
    LOAD_CODES(6, 0);
    LOAD_ROWS(4, 0)
    TURN(0)
    TILE_MULTIPLY_SIGNED(0, 4, 6);
    LOAD_ROWS(5, 1)
    TURN(2)
    TILE_MULTIPLY_SIGNED(2, 5, 6);
    LOAD_CODES(7, 1);
    TURN(1)
    TILE_MULTIPLY_SIGNED(1, 4, 7);
    TURN(3)
    TILE_MULTIPLY_SIGNED(3, 5, 7);
  } else {
    LOAD_CODES(7, 0);
    LOAD_ROWS(4, 0)
    TURN(0)
    TILE_MULTIPLY_SIGNED(0, 4, 7);
    LOAD_ROWS(5, 1)
    TURN(1)
    TILE_MULTIPLY_SIGNED(1, 5, 7);
    LOAD_ROWS(6, 2)
    TURN(2)
    TILE_MULTIPLY_SIGNED(2, 6, 7);
    LOAD_ROWS(4, 3)
    TURN(3)
    TILE_MULTIPLY_SIGNED(3, 4, 7);
  }
}

// All pixels against `blocks` blocks of kWide tiles of channels.
template <int kWide, bool kAdded, bool kFromL2>
void run_blocks(const ResidentTask& task, int64_t first_channel, int64_t blocks) {
  constexpr int64_t kHigh = 4 / kWide, kTurns = 4;
  const ResidentWeight& weight = task.weight;
  alignas(64) int32_t sums[2][4 * kTileInts];
  alignas(64) int8_t copies[kHigh * kTileBytes];
  Pixels pixels[kTurns][kHigh];  // those of three units are in use
  const int64_t chunks = weight.chunks.count, lines = (kLines + chunks - 1) / chunks;
  const int64_t tile_bytes = weight.chunks.size * kResidentChannels;
  const int8_t* tiles = weight.tiles + first_channel * chunks * weight.chunks.size;
  Unit pending, stored;
  int64_t line = kLines;  // of `pending`
  bool any = false;       // stored
  Cursor cursor(task);
  configure(kTileRows, weight.chunks.size, kWide == 4 ? 5 : kWide == 2 ? 6 : 7);
  int64_t turn = 0, unit = 0;
  for (; !cursor.done(); turn = (turn + 1) % kTurns) {
    for (int64_t i = 0; i < kHigh; ++i) {
      Pixels* const next = &pixels[turn][i];
      cursor.next(next);
      next->copied = false;
      if (kFromL2 && next->spacing == 0) copy_together(next, weight, task.copies + i * chunks * kTileBytes);
    }
    const int8_t* codes = tiles;
    for (int64_t b = 0; b < blocks; ++b, ++unit) {
      int32_t* to = sums[unit % 2];
      const int32_t* from = sums[(unit + 1) % 2];
      for (int64_t c = 0; c < chunks; ++c, codes += kWide * tile_bytes) {
        multiply<kWide, kFromL2>(pixels[turn], c, weight.offsets[c], codes, tile_bytes, copies, to);
        const int64_t end = line + lines < kLines ? line + lines : kLines;
        finish<kWide, kAdded>(task, pending, from, line, end);
        line = end;
        if (c == 0) {  // and the sums that were just stored are next
          pending = stored;
          from = to;
          line = any ? 0 : kLines;
          any = true;
        }
      }
      stored = {pixels[turn], first_channel + b * 16 * kWide};
    }
  }
  finish<kWide, kAdded>(task, pending, sums[(unit + 1) % 2], line, kLines);
  int32_t* to = sums[unit % 2];
  TILE_STORE(0, to, 64);
  TILE_STORE(1, to + kTileInts, 64);
  TILE_STORE(2, to + 2 * kTileInts, 64);
  TILE_STORE(3, to + 3 * kTileInts, 64);
  finish<kWide, kAdded>(task, stored, to, 0, kLines);
}

template <bool kAdded>
void run_all(const ResidentTask& task) {
  const int64_t channels = task.weight.channels;
  if (task.weight.most_tiles == 2) {
    run_blocks<2, kAdded, true>(task, 0, channels / 32);
    return;
  }
  int64_t first = channels / 64 * 64;
  if (first > 0) run_blocks<4, kAdded, false>(task, 0, first / 64);
  if (channels - first >= 32) {
    run_blocks<2, kAdded, false>(task, first, 1);
    first += 32;
  }
  if (first < channels) run_blocks<1, kAdded, false>(task, first, 1);
}

void run(const ResidentTask& task) {
  if (task.images * task.height * task.width == 0) return;
  if (task.added != nullptr) {
    run_all<true>(task);
  } else {
    run_all<false>(task);
  }
  release_tiles();
}

constexpr ResidentConvKernel kernel = {Isa::amx, run};

}  // namespace

const ResidentConvKernel* resident_conv_amx() { return &kernel; }

}  // namespace bantamweight

#else

namespace bantamweight {
const ResidentConvKernel* resident_conv_amx() { return nullptr; }
}  // namespace bantamweight

#endif
