// Codes into tiles.
#include <algorithm>
#include <cstring>

#include "resident_conv/resident_conv.h"

namespace bantamweight {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// `count` columns from `codes` on, the k of one chunk, against `tile_count` tiles of channels.
void pack_chunk(const uint8_t* codes, int64_t k, int64_t count, int32_t zero, int64_t tile_count, int64_t size,
                int8_t* tiles) {
  const int64_t tile_bytes = size * kResidentChannels;
  std::memset(tiles, 0, static_cast<size_t>(tile_count * tile_bytes));
  for (int64_t n = 0; n < tile_count * kResidentChannels; ++n, codes += k) {
    int8_t* to = tiles + n / kResidentChannels * tile_bytes + n % kResidentChannels * 4;
    for (int64_t i = 0; i < count; ++i) to[i / 4 * 64 + i % 4] = static_cast<int8_t>(codes[i] - zero);
  }
}

}  // namespace

ResidentChunks resident_chunks(const KPiece* pieces, int64_t piece_count) {
  constexpr int64_t kMost = 64;
  ResidentChunks chunks;
  for (int64_t p = 0; p < piece_count; ++p) {
    const int64_t parts = ceil_div(pieces[p].k_size, kMost);
    chunks.size = std::max(chunks.size, ceil_div(ceil_div(pieces[p].k_size, parts), 4) * 4);
  }
  for (int64_t p = 0; p < piece_count; ++p) chunks.count += ceil_div(pieces[p].k_size, chunks.size);
  return chunks;
}

void resident_pack(const uint8_t* codes, int64_t channels, int64_t k, int32_t zero, const KPiece* pieces,
                   int64_t piece_count, const ResidentChunks& chunks, int64_t most_tiles, int8_t* tiles,
                   int64_t* offsets) {
  for (int64_t first = 0; first < channels;) {
    const int64_t tile_count = resident_tiles(channels - first, most_tiles);
    int64_t chunk = 0;
    for (const KPiece* piece = pieces; piece < pieces + piece_count; ++piece) {
      for (int64_t at = 0; at < piece->k_size; at += chunks.size) {
        const int64_t count = std::min(chunks.size, piece->k_size - at);
        pack_chunk(codes + first * k + piece->k_begin + at, k, count, zero, tile_count, chunks.size, tiles);
        tiles += tile_count * kResidentChannels * chunks.size;
        offsets[chunk++] = piece->row_offset + at;
      }
    }
    first += tile_count * kResidentChannels;
  }
}

}  // namespace bantamweight
