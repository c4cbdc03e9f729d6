// Convolutions from codes to codes (code_maps.h) by weights that lie in memory as signed bytes: for
// good those so small that they stay in L1, of first layers and narrow networks; others a few channels
// at a time, which stay in L2 for all pixels of a call.
//
//   code = rint(max(min(y, 127), -127))
//   y = factor * (scale[n] * sum_k weight[n, k] a[k]) + bias[n] + added_factor * added
//
// with a rounding after the first product and one after each sum, as the linear kernels have them. With
// few products an output, what goes with each of their rows costs more than the products: a pointer to
// its activations, one to its outputs, the sum of its activations, codes that are unpacked again for
// every few rows. Here pixels are a grid, and weights hold codes minus their zero, unpacked once for
// all calls or for all pixels of one.
#pragma once

#include <cstddef>
#include <cstdint>

#include "lowbit_linear/lowbit_linear.h"
#include "runtime/isa.h"

namespace bantamweight {

constexpr int64_t kResidentChannels = 16;  // of a tile; a weight's channels are a multiple of it

// How many tiles lie side by side where so many channels are left: up to four of a weight in L1, where
// each product loads its own; two of one in L2, where every tile that is loaded has to serve two.
inline int64_t resident_tiles(int64_t channels, int64_t most = 4) {
  return most == 4 && channels >= 64 ? 4 : channels >= 32 ? 2 : 1;
}

// How k is cut into chunks, which are multiplied as a whole: `size` of them each, a multiple of 4, with
// zeros behind the end of a piece.
struct ResidentChunks {
  int64_t size = 0, count = 0;
};

struct ResidentWeight {
  // [blocks of resident_tiles()][chunks][tiles][fours of k][16 channels][4 k] codes minus their zero; 64-byte
  // aligned.
  const int8_t* tiles = nullptr;
  const int64_t* offsets = nullptr;  // [chunks] bytes from a pixel's first activation to a chunk's first
  const float* scale = nullptr;      // [channels], 64-byte aligned
  const float* bias = nullptr;       // the same
  ResidentChunks chunks;
  int64_t channels = 0;
  int64_t most_tiles = 4;  // side by side
};

// Chunks of up to 64 k and of one size: loading fewer bytes of rows that overlap costs less.
ResidentChunks resident_chunks(const KPiece* pieces, int64_t piece_count);

// codes: [channels, k] row-major, which fit signed bytes once `zero` is taken away.
// tiles: out, chunks.size * channels bytes a chunk; offsets: out, one a chunk.
void resident_pack(const uint8_t* codes, int64_t channels, int64_t k, int32_t zero, const KPiece* pieces,
                   int64_t piece_count, const ResidentChunks& chunks, int64_t most_tiles, int8_t* tiles,
                   int64_t* offsets);

// height x width output pixels of each of some images.
struct ResidentTask {
  ResidentWeight weight;
  float factor;
  int64_t images, height, width;
  // Activations of the first pixel, and bytes to the next pixel's, to the next row's and to the next
  // image's. Readable 64 bytes past the last piece.
  const int8_t* q;
  int64_t pixel_bytes, row_bytes, image_bytes;
  // Outputs; what is added, at the same distance from pixel to pixel, or null.
  int8_t* codes;
  int64_t codes_pixel_bytes, codes_row_bytes, codes_image_bytes;
  const int8_t* added;
  int64_t added_row_bytes, added_image_bytes;
  float added_factor;
  // Null, or for a weight of two tiles side by side and chunks of 64: memory for two tiles of every chunk,
  // 64-byte aligned, where pixels that are not equally spaced are copied together once for all channels.
  int8_t* copies;
};

struct ResidentConvKernel {
  Isa isa;
  void (*run)(const ResidentTask& task);  // one thread
};

const ResidentConvKernel* resident_conv_reference();
const ResidentConvKernel* resident_conv_amx();

// The best variant under `ceiling`.
const ResidentConvKernel* resident_conv_pick(Isa ceiling);

// Variants this op has in this build, best first.
const Isa* resident_conv_variants(std::size_t* count);

}  // namespace bantamweight
