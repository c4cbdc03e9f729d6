// The chunks of 64 k that AMX tiles hold. For amx.cc only: everything is in an unnamed namespace.
#pragma once

#include <immintrin.h>

#include "lowbit_linear/lowbit_linear.h"
#include "runtime/tiles_amx.h"

namespace bantamweight {
namespace {

constexpr int64_t kBlockN = 64, kTileSums = kTileRows * kBlockN;
constexpr int64_t kChunkQuads = 16;  // 64 k

// Up to 64 k within one piece of a block.
struct Chunk {
  int64_t row_offset;     // of its activations
  int64_t weight_offset;  // of its codes in the block
  int32_t quads;          // 1 .. 16
  int32_t spare;          // k of the last quad that are behind the end of the piece
  int32_t group;
  bool begins_group, ends_group;
};
constexpr int64_t kMaxChunks = 512;  // a block with more of them runs on VNNI

int64_t quads_of(const KPiece& piece) { return (piece.k_size + 3) / 4; }

int64_t count_chunks(const TileTask& task) {
  int64_t count = 0;
  for (int64_t p = 0; p < task.piece_count; ++p) count += (quads_of(task.pieces[p]) + kChunkQuads - 1) / kChunkQuads;
  return count;
}

// Chunks of the longest group.
int64_t longest_group(const TileTask& task) {
  int64_t longest = 0, chunks = 0;
  for (int64_t p = 0; p < task.piece_count; ++p) {
    if (p > 0 && task.pieces[p].group != task.pieces[p - 1].group) chunks = 0;
    chunks += (quads_of(task.pieces[p]) + kChunkQuads - 1) / kChunkQuads;
    if (chunks > longest) longest = chunks;
  }
  return longest;
}

int64_t count_quads(const TileTask& task) {
  int64_t count = 0;
  for (int64_t p = 0; p < task.piece_count; ++p) count += quads_of(task.pieces[p]);
  return count;
}

// The task of the rows from `row` on.
TileTask from_row(TileTask task, int64_t row) {
  task.rows += row;
  task.row_scale += row;
  task.row_sums += row * task.groups;
  if (task.group_scale != nullptr) task.group_scale += row * task.groups;
  task.row_count -= row;
  if (task.codes.rows != nullptr) {
    task.codes.rows += row;
    if (task.codes.added != nullptr) task.codes.added += row;
  } else {
    task.y += row * task.ldy;
    if (task.epilogue.residual != nullptr) task.epilogue.residual += row * task.epilogue.ldr;
  }
  return task;
}

void list_chunks(const TileTask& task, int bits, Chunk* chunk) {
  const int64_t step_quads = bits == 3 ? 2 : 1, step_bytes = 32 * bits * step_quads;
  int64_t weight_offset = 0;
  for (int64_t p = 0; p < task.piece_count; ++p) {
    const KPiece& piece = task.pieces[p];
    const bool first = p == 0 || task.pieces[p - 1].group != piece.group;
    const bool last = p + 1 == task.piece_count || task.pieces[p + 1].group != piece.group;
    const int64_t quads = quads_of(piece);
    for (int64_t q = 0; q < quads; q += kChunkQuads, ++chunk) {
      chunk->row_offset = piece.row_offset + 4 * q;
      chunk->weight_offset = weight_offset;
      chunk->quads = static_cast<int32_t>(quads - q < kChunkQuads ? quads - q : kChunkQuads);
      chunk->spare = q + kChunkQuads >= quads ? static_cast<int32_t>(4 * quads - piece.k_size) : 0;
      chunk->group = static_cast<int32_t>(piece.group);
      chunk->begins_group = first && q == 0;
      chunk->ends_group = last && q + kChunkQuads >= quads;
      weight_offset += (chunk->quads + step_quads - 1) / step_quads * step_bytes;
    }
  }
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

}  // namespace
}  // namespace bantamweight
