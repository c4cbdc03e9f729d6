// Rows of an embedding table of 2, 3, 4 or 8-bit codes, gathered by index and dequantized to float.
//
//   y[i, d] = scale[r, g] * (codes[r, d] - zero[r, g]),   r = index[i], g = d / group_size
//
// A packed table is one flat, position-independent buffer: EmbeddingHeader, then one contiguous
// record a row, so that a lookup touches one place in memory:
//
//   float scale[groups]   float zero[groups] (left out where every zero is the same)   units of codes
//
// A unit is 16 codes of one group in 2 * bits bytes; the last unit of a group may be partly unused.
//   2 bits  uint32, code i at bit 2 i
//   3 bits  the low two bits of each code as at 2 bits, then uint16 with the third bit of code i at bit i
//   4 bits  uint64, code 2 i at bit 4 i and code 2 i + 1 at bit 32 + 4 i: one shift of eight 64-bit
//           lanes by 0, 4, .. 28 leaves sixteen 32-bit lanes in order
//   8 bits  bytes
// The difference and the product are rounded one by one, so every variant agrees to the last bit.
#pragma once

#include <cstddef>
#include <cstdint>

#include "runtime/isa.h"
#include "runtime/status.h"

namespace bantamweight {

struct EmbeddingShape {
  int64_t rows = 0;        // entries of the table
  int64_t dim = 0;         // columns of a row
  int bits = 0;            // 2, 3, 4 or 8
  int64_t group_size = 0;  // columns a scale; groups = ceil(dim / group_size)
};

// Bytes of the packed table, or -1 if the shape is invalid. uniform_zero: every zero is the same.
int64_t embedding_layout_bytes(const EmbeddingShape& shape, bool uniform_zero);

// The variant this op would run under `ceiling`.
Isa embedding_select(Isa ceiling);

// Variants this op has in this build, best first.
const Isa* embedding_variants(std::size_t* count);

Status embedding_pack(const EmbeddingShape& shape, Isa isa,
                      const uint8_t* codes,  // [rows, dim] row-major, values 0 .. 2^bits - 1
                      const float* scale,    // [rows, groups]
                      const float* zero,     // [rows, groups], in code units
                      bool uniform_zero,     // zero[0] stands for all of them
                      void* layout,          // out, embedding_layout_bytes() long
                      int64_t layout_bytes);

// The exact inverse of embedding_pack.
Status embedding_unpack(const void* layout, int64_t layout_bytes, uint8_t* codes, float* scale, float* zero);

// Checks the header and reads the shape and the kernel out of a packed table.
Status embedding_describe(const void* layout, int64_t layout_bytes, EmbeddingShape* shape, Isa* isa);

// Status::out_of_range if an index is negative or not below the rows; y is then undefined.
Status embedding_forward(const void* layout, int64_t layout_bytes,
                         const void* index,  // [count] int64, or int32 if index_bytes is 4
                         int index_bytes, int64_t count,
                         float* y,  // out [count, dim], rows ldy floats apart
                         int64_t ldy);

constexpr int64_t kUnitCodes = 16;

struct EmbeddingTask {
  const uint8_t* records;  // [rows], record_bytes apart
  int64_t record_bytes;
  int64_t dim, group_size, groups;
  bool uniform_zero;  // the records hold no zeros; they all are `zero`
  float zero;
  const int64_t* index;  // [count], each inside the table
  int64_t count;
  float* y;  // out [count, dim], rows ldy floats apart
  int64_t ldy;
};

struct EmbeddingKernel {
  Isa isa;
  void (*run)(int bits, const EmbeddingTask& task);  // one thread
};

const EmbeddingKernel* embedding_kernel_reference();
const EmbeddingKernel* embedding_kernel_avx2();
const EmbeddingKernel* embedding_kernel_avx512();
const EmbeddingKernel* embedding_kernel_neon();

}  // namespace bantamweight
