// The flat form of a packed weight: header, pieces, blocks of codes, scales, zeros.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "block_offsets/block_offsets.h"
#include "code_maps/code_maps.h"
#include "lowbit_linear/lowbit_linear.h"
#include "runtime/fresh_pages.h"
#include "runtime/huge_pages.h"
#include "runtime/scratch.h"
#include "runtime/threads.h"

namespace bantamweight {
namespace {

constexpr uint64_t kMagic = 0x3177656976776231ull;
constexpr uint64_t kAlign = 64;

struct ViewHeader {
  uint64_t magic;
  int32_t isa;
  int32_t bits;
  int64_t n, groups, piece_count;
  int64_t bytes;  // of the whole view
  int32_t uniform_zero;
  int32_t has_zeros;  // 1: one zero a channel and group follows
  int32_t has_sums;   // 1: the sums of the weights follow
  int32_t unused;
};

int64_t align(int64_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

int64_t blocks_of(const LinearKernel& kernel, int64_t n) { return (n + kernel.block_n - 1) / kernel.block_n; }

// Byte offsets of each part. Zeros are stored twice: as the kernel reads them (scale * zero) and
// as they came, because a product cannot be divided back exactly.
struct Parts {
  int64_t pieces, blocks, block_bytes, scale, zero_scale, zero, weight_sum, end;
};

Parts parts_of(const LinearKernel& kernel, int bits, int64_t n, int64_t groups, const KPiece* pieces,
               int64_t piece_count, bool with_sums) {
  const int64_t blocks = blocks_of(kernel, n);
  const int64_t table = align(blocks * groups * kernel.block_n * static_cast<int64_t>(sizeof(float)));
  Parts at;
  at.pieces = align(sizeof(ViewHeader));
  at.blocks = at.pieces + align(piece_count * static_cast<int64_t>(sizeof(KPiece)));
  at.block_bytes = align(kernel.block_bytes(bits, pieces, piece_count));
  at.scale = at.blocks + blocks * at.block_bytes;
  at.zero_scale = at.scale + table;
  at.zero = at.zero_scale + table;
  at.weight_sum = at.zero + align(n * groups * static_cast<int64_t>(sizeof(float)));
  at.end = at.weight_sum + (with_sums ? table : 0);
  return at;
}

// True if every zero is the same integer that the codes can hold.
bool find_uniform_zero(int bits, const float* zero, int64_t count, int32_t* uniform) {
  const float first = count > 0 ? zero[0] : 0.0f;
  if (!(first >= 0.0f && first < static_cast<float>(1 << bits)) || first != std::floor(first)) return false;
  for (int64_t i = 1; i < count; ++i) {
    if (zero[i] != first) return false;
  }
  *uniform = static_cast<int32_t>(first);
  return true;
}

// False unless the sizes may be multiplied without overflow and the pieces may be walked.
bool sound(const ViewHeader& header, const KPiece* pieces) {
  constexpr int64_t kLimit = int64_t{1} << 31;
  const int bits = header.bits;
  if (bits != kTrits && bits != 2 && bits != 3 && bits != 4 && bits != 8) return false;
  if (header.n < 0 || header.n >= kLimit || header.groups < 0 || header.groups > header.piece_count) return false;
  if (header.uniform_zero < 0 || header.uniform_zero >= 1 << std::max(2, bits) || (header.has_zeros | 1) != 1)
    return false;
  if ((header.has_sums | 1) != 1) return false;
  int64_t k = 0, group = 0;
  for (int64_t p = 0; p < header.piece_count; ++p) {
    const KPiece& piece = pieces[p];
    if (piece.k_begin < 0 || piece.k_size <= 0 || piece.k_begin >= kLimit || piece.k_size >= kLimit) return false;
    if (piece.row_offset < 0 || piece.group < group || piece.group >= header.groups) return false;
    k += piece.k_size;
    group = piece.group;
    if (k >= kLimit) return false;
  }
  return true;
}

// Expanded blocks in the thread's memory, as many as L2 holds beside the activations; null when out
// of memory.
struct Expanded {
  uint8_t* blocks = nullptr;
  int64_t block_bytes = 0, count = 0;
};

Expanded make_room(const PackedView& view, int64_t blocks) {
  const int64_t kBytes = view.bits == kTrits ? 1 << 20 : 512 << 10;
  thread_local Scratch scratch;
  Expanded room;
  room.block_bytes = align(view.kernel->block_bytes(expanded_bits(view.bits), view.pieces, view.piece_count));
  room.count = std::clamp<int64_t>(kBytes / std::max<int64_t>(1, room.block_bytes), 1, blocks);
  room.blocks = scratch.get(room.count * room.block_bytes);
  return room;
}

// y[r] = half[2 r] + half[2 r + 1] + bias; the compiler makes vectors of it.
void add_halves(const float* half, int64_t ldh, int64_t row_count, int64_t n, const float* bias, float* y,
                int64_t ldy) {
  for (int64_t r = 0; r < row_count; ++r, half += 2 * ldh, y += ldy) {
    const float *high = half, *low = half + ldh;
    if (bias == nullptr) {
      for (int64_t i = 0; i < n; ++i) y[i] = high[i] + low[i];
    } else {
      for (int64_t i = 0; i < n; ++i) y[i] = (high[i] + low[i]) + bias[i];
    }
  }
}

// True if so many rows are worth expanded blocks.
bool expands(const PackedView& view, int64_t row_count) {
  const LinearKernel& kernel = *view.kernel;
  return expanded_bits(view.bits) != view.bits && kernel.expand_block != nullptr &&
         row_count >= kernel.expand_rows(view.bits);
}

// The bits at which the kernel runs so many rows.
int bits_run(const PackedView& view, int64_t row_count) {
  return expands(view, row_count) ? expanded_bits(view.bits) : view.bits;
}

TileTask task_of(const PackedView& view, const int8_t* const* rows, const float* row_scale, const int32_t* row_sums,
                 int64_t row_count) {
  TileTask task = {};
  task.uniform_zero = view.uniform_zero;
  task.pieces = view.pieces;
  task.piece_count = view.piece_count;
  task.groups = view.groups;
  task.rows = rows;
  task.row_scale = row_scale;
  task.row_sums = row_sums;
  task.row_count = row_count;
  task.beyond_l2 = blocks_of(*view.kernel, view.n) * view.block_bytes > (2 << 20);
  return task;
}

}  // namespace

int stored_bits(const LinearKernel& kernel, const LinearShape& shape) {
  // Bytes at 4 bits that fit a core's L2 beside the rest, and at 2 bits that each thread's L2 holds little of.
  constexpr int64_t kFourBitBytes = 1 << 20, kTwoBitBytes = 5 << 19;
  const int64_t codes = shape.n * shape.k;
  if (shape.bits == 3 && kernel.expand_block != nullptr && codes / 2 <= kFourBitBytes) return 4;
  // Groups that are no multiple of what a step takes would fill it up.
  const bool one_group = shape.group_size >= shape.k && shape.k <= kMaxGroupK;
  const bool decodes = shape.activations == Activations::int8;  // the other modes have rows in pairs or short groups
  return shape.ternary && kernel.takes_trits && one_group && decodes && codes / 4 > kTwoBitBytes * available_threads()
             ? kTrits
             : shape.bits;
}

int64_t packed_view_bytes(const LinearKernel& kernel, int bits, int64_t n, int64_t groups, const KPiece* pieces,
                          int64_t piece_count, bool with_sums) {
  return parts_of(kernel, bits, n, groups, pieces, piece_count, with_sums).end;
}

void packed_view_write(const LinearKernel& kernel, int bits, int code_bits, int64_t n, int64_t groups,
                       const KPiece* pieces, int64_t piece_count, const uint8_t* codes, int64_t k, const float* scale,
                       const float* zero, void* memory, bool with_sums) {
  const Parts at = parts_of(kernel, bits, n, groups, pieces, piece_count, with_sums);
  auto* base = static_cast<uint8_t*>(memory);
  prefer_huge_pages(base, at.end);
  std::memset(base, 0, static_cast<size_t>(at.end));

  ViewHeader header = {};
  header.magic = kMagic;
  header.isa = static_cast<int32_t>(kernel.isa);
  header.bits = bits;
  header.n = n;
  header.groups = groups;
  header.piece_count = piece_count;
  header.bytes = at.end;
  header.has_zeros = find_uniform_zero(code_bits, zero, n * groups, &header.uniform_zero) ? 0 : 1;
  header.has_sums = with_sums ? 1 : 0;
  std::memcpy(base, &header, sizeof header);
  if (piece_count > 0) std::memcpy(base + at.pieces, pieces, static_cast<size_t>(piece_count) * sizeof(KPiece));

  const int64_t block_n = kernel.block_n, blocks = blocks_of(kernel, n);
  auto* scale_out = reinterpret_cast<float*>(base + at.scale);
  auto* zero_scale_out = reinterpret_cast<float*>(base + at.zero_scale);
  auto* weight_sum_out = reinterpret_cast<float*>(base + at.weight_sum);
  for_each_shared(blocks, n * k > (1 << 20), [&](int64_t b) {
    const int64_t first = b * block_n, valid = std::min(block_n, n - first);
    kernel.pack_block(bits, pieces, piece_count, codes + first * k, k, valid, base + at.blocks + b * at.block_bytes);
    for (int64_t g = 0; g < groups; ++g) {
      for (int64_t lane = 0; lane < valid; ++lane) {
        const int64_t from = (first + lane) * groups + g, to = (b * groups + g) * block_n + lane;
        scale_out[to] = scale[from] / kernel.lane_factor(bits, lane);
        zero_scale_out[to] = scale[from] * zero[from];
      }
    }
    for (int64_t p = 0; with_sums && p < piece_count; ++p) {
      for (int64_t lane = 0; lane < valid; ++lane) {
        const uint8_t* code = codes + (first + lane) * k + pieces[p].k_begin;
        int64_t sum = 0;
        for (int64_t i = 0; i < pieces[p].k_size; ++i) sum += code[i];
        const int64_t from = (first + lane) * groups + pieces[p].group;
        const double weights = static_cast<double>(sum) - static_cast<double>(zero[from]) * pieces[p].k_size;
        weight_sum_out[(b * groups + pieces[p].group) * block_n + lane] += static_cast<float>(weights * scale[from]);
      }
    }
  });
  if (n * groups > 0) std::memcpy(base + at.zero, zero, static_cast<size_t>(n * groups) * sizeof(float));
}

Status packed_view_read(const LinearKernel& kernel, const void* memory, int64_t bytes, PackedView* view) {
  const auto* base = static_cast<const uint8_t*>(memory);
  ViewHeader header;
  if (bytes < static_cast<int64_t>(sizeof header)) return Status::wrong_layout;
  std::memcpy(&header, base, sizeof header);
  if (header.magic != kMagic || header.isa != static_cast<int32_t>(kernel.isa) || header.bytes > bytes) {
    return Status::wrong_layout;
  }
  const int64_t pieces_at = align(sizeof(ViewHeader));
  if (header.piece_count < 0 || header.piece_count > (bytes - pieces_at) / static_cast<int64_t>(sizeof(KPiece))) {
    return Status::wrong_layout;
  }
  const auto* pieces = reinterpret_cast<const KPiece*>(base + pieces_at);
  if (!sound(header, pieces) || (header.bits == kTrits && !kernel.takes_trits)) return Status::wrong_layout;
  const Parts at =
      parts_of(kernel, header.bits, header.n, header.groups, pieces, header.piece_count, header.has_sums != 0);
  if (at.end != header.bytes) return Status::wrong_layout;
  view->kernel = &kernel;
  view->bits = header.bits;
  view->n = header.n;
  view->groups = header.groups;
  view->piece_count = header.piece_count;
  view->block_bytes = at.block_bytes;
  view->pieces = pieces;
  view->blocks = base + at.blocks;
  view->scale = reinterpret_cast<const float*>(base + at.scale);
  view->zero_scale = header.has_zeros ? reinterpret_cast<const float*>(base + at.zero_scale) : nullptr;
  view->zero = reinterpret_cast<const float*>(base + at.zero);
  view->weight_sum = header.has_sums ? reinterpret_cast<const float*>(base + at.weight_sum) : nullptr;
  view->uniform_zero = header.uniform_zero;
  return Status::ok;
}

void packed_view_unpack(const PackedView& view, int64_t k, uint8_t* codes, float* scale, float* zero) {
  const LinearKernel& kernel = *view.kernel;
  for (int64_t b = 0; b < blocks_of(kernel, view.n); ++b) {
    const int64_t first = b * kernel.block_n, valid = std::min(kernel.block_n, view.n - first);
    if (codes != nullptr) {
      kernel.unpack_block(view.bits, view.pieces, view.piece_count, view.blocks + b * view.block_bytes, k, valid,
                          codes + first * k);
    }
    for (int64_t g = 0; g < view.groups; ++g) {
      for (int64_t lane = 0; lane < valid; ++lane) {
        scale[(first + lane) * view.groups + g] =
            view.scale[(b * view.groups + g) * kernel.block_n + lane] * kernel.lane_factor(view.bits, lane);
      }
    }
  }
  if (view.n * view.groups > 0) {
    std::memcpy(zero, view.zero, static_cast<size_t>(view.n * view.groups) * sizeof(float));
  }
}

bool packed_view_finishes(const PackedView& view, int64_t row_count, int64_t ldy) {
  if (view.kernel->finishes_outputs == nullptr || row_count == 0) return false;
  TileTask task = task_of(view, nullptr, nullptr, nullptr, row_count);
  task.ldy = ldy;
  return view.kernel->finishes_outputs(bits_run(view, row_count), task, blocks_of(*view.kernel, view.n));
}

Status packed_view_run(const PackedView& view, const int8_t* const* rows, const float* row_scale,
                       const int32_t* row_sums, int64_t row_count, const float* bias, float* y, int64_t ldy,
                       const Epilogue& epilogue, const float* group_scale, const float* group_offset, bool halves) {
  // A chunk is some rows, whose activations stay in L2, against some blocks, whose codes stay there
  // too: long enough to amortize what a kernel does at its ends, short enough to give every thread
  // two, so that one which was preempted holds the others up little.
  constexpr int64_t kWeightBytes = 512 << 10, kOutputBytes = 512 << 10, kHalvesBytes = 1 << 20;
  constexpr int64_t kMinMacs = 1 << 17, kMaxMacs = 1 << 28;
  // Below this, about 2 us of work, waking a second thread costs as much as it saves.
  constexpr int64_t kMinParallelMacs = 1 << 19;
  const int64_t block_n = view.kernel->block_n, blocks = blocks_of(*view.kernel, view.n);
  int64_t k = 0;
  for (int64_t p = 0; p < view.piece_count; ++p) k += view.pieces[p].k_size;
  int64_t rows_fit = std::max<int64_t>(64, view.kernel->activation_bytes / std::max<int64_t>(1, k) / 64 * 64);
  const EpilogueKernel* epilogue_of_chunk = nullptr;
  const bool offsets = group_offset != nullptr && view.weight_sum != nullptr;
  const bool finished = !epilogue.empty() && !offsets && !halves && packed_view_finishes(view, row_count, ldy);
  if (!epilogue.empty() && !finished) {  // which reads the outputs again: they stay in L2, too
    epilogue_of_chunk = epilogue_kernel(view.kernel->isa);
    rows_fit = std::clamp<int64_t>(kOutputBytes / std::max<int64_t>(1, 4 * view.n) / 32 * 32, 32, rows_fit);
  }
  if (offsets) {  // which are added to a chunk's columns in L2; more rows, and a kernel may write past the caches
    rows_fit = std::clamp<int64_t>(3 * kOutputBytes / std::max<int64_t>(1, 4 * ldy) / 32 * 32, 32, rows_fit);
  }
  // A kernel that wants many channels at once gets threads that share the rows out before the channels.
  const int64_t blocks_at_once = std::min(blocks, view.kernel->channels_at_once / block_n);
  if (blocks_at_once > 0) rows_fit = std::min(rows_fit, (row_count / available_threads() + 31) / 32 * 32);
  rows_fit = std::max<int64_t>(rows_fit, 32);
  // The kernel copies the activations at every call.
  const auto copies_of = [&](int64_t chunk_rows) {
    if (view.kernel->scratch_bytes == nullptr || chunk_rows == 0) return false;
    const TileTask task = task_of(view, rows, row_scale, row_sums, chunk_rows);
    return view.kernel->scratch_bytes(bits_run(view, chunk_rows), task, blocks) > 0;
  };
  const bool copies = copies_of(std::min(row_count, rows_fit));
  if (copies) {
    // Threads share the channels of all rows where each gets many: it unpacks its own alone. (Two threads, 8 bits:
    // 256 x 768-3072 363 us to 273; narrower, 128 x 768-768 at 2 bits 46 to 52.) Otherwise they share the rows, in
    // chunks of equal height, as many for each, unless that leaves too few to copy for (128 x 4096-4096 2.1 ms to 1.1).
    constexpr int64_t kManyBlocks = 12;
    const auto equal = [&](int64_t sharing) {
      const int64_t each = (row_count + rows_fit * sharing - 1) / (rows_fit * sharing) * sharing;
      return std::max<int64_t>(64, ((row_count + each - 1) / each + 31) / 32 * 32);
    };
    const int64_t sharing = available_threads(), shared = equal(sharing);
    const bool wide = row_count <= rows_fit && blocks >= kManyBlocks * sharing;
    rows_fit = wide || !copies_of(std::min(row_count, shared)) ? equal(1) : shared;
  }
  const int64_t row_chunks = (row_count + rows_fit - 1) / rows_fit;
  const int64_t macs_per_block = std::max<int64_t>(1, std::min(row_count, rows_fit) * k * block_n);
  const int64_t total = macs_per_block * blocks * row_chunks;
  const int64_t threads = total < kMinParallelMacs ? 1 : available_threads();
  const int64_t share = total / (2 * threads);
  const int64_t macs = threads == 1 ? kMaxMacs : std::clamp(share, kMinMacs, kMaxMacs);
  int64_t blocks_fit = kWeightBytes / std::max<int64_t>(1, view.block_bytes);
  if (halves) {  // which are added up while they are in L2
    const int64_t block_outputs = 4 * block_n * std::max<int64_t>(1, std::min(row_count, rows_fit));
    blocks_fit = std::min(blocks_fit, std::max<int64_t>(1, kHalvesBytes / block_outputs));
  }
  const int64_t blocks_per_thread = (blocks * row_chunks + threads - 1) / threads;
  int64_t least = std::min(blocks_at_once, blocks_per_thread);
  if (copies) {  // equal calls, as many on every thread
    const int64_t most = std::max<int64_t>(1, view.kernel->channels_per_copy / block_n);
    const int64_t calls = (blocks_per_thread + most - 1) / most;
    least = (blocks_per_thread + calls - 1) / calls;
  }
  const int64_t blocks_per_chunk = std::max<int64_t>({1, least, std::min(macs / macs_per_block, blocks_fit)});
  const int64_t block_chunks = (blocks + blocks_per_chunk - 1) / blocks_per_chunk;
  const int64_t chunks = row_chunks * block_chunks;
  const auto epilogue_at = [&](int64_t row, int64_t channel) {
    Epilogue there = epilogue;
    if (there.residual != nullptr) there.residual += row * there.ldr + channel;
    return there;
  };
  std::atomic<bool> lacks_memory{false};
  const auto run_chunk = [&](int64_t c) {
    const int64_t row_begin = c / block_chunks * rows_fit, block_begin = c % block_chunks * blocks_per_chunk;
    const int64_t block_end = std::min(blocks, block_begin + blocks_per_chunk);
    const int64_t rows_here = std::min(rows_fit, row_count - row_begin);
    const int64_t first = block_begin * block_n, width = std::min(view.n, block_end * block_n) - first;
    const auto run = [&](const float* from_bias, float* to, int64_t ldto) {
      packed_view_run_blocks(view, rows + row_begin, row_scale + row_begin, row_sums + row_begin * view.groups,
                             rows_here, from_bias, to, ldto, block_begin, block_end,
                             group_scale == nullptr ? nullptr : group_scale + row_begin * view.groups,
                             finished ? epilogue_at(row_begin, 0) : Epilogue{});
    };
    const int64_t y_row = halves ? row_begin / 2 : row_begin, y_rows = halves ? rows_here / 2 : rows_here;
    if (halves) {
      thread_local Scratch scratch;
      const int64_t ldh = (width + 15) / 16 * 16;
      auto* half = reinterpret_cast<float*>(scratch.get(rows_here * ldh * static_cast<int64_t>(sizeof(float))));
      if (half == nullptr) {
        lacks_memory.store(true);
        return;
      }
      run(nullptr, half - first, ldh);
      add_halves(half, ldh, y_rows, width, bias == nullptr ? nullptr : bias + first, y + y_row * ldy + first, ldy);
    } else {
      run(bias, y + y_row * ldy, ldy);
    }
    for (int64_t b = block_begin; offsets && b < block_end; ++b) {
      block_offsets_kernel(view.kernel->isa)
          ->run({group_offset + row_begin * view.groups, view.weight_sum + b * view.groups * block_n, view.groups,
                 block_n, y + y_row * ldy + b * block_n, ldy, y_rows, std::min(block_n, view.n - b * block_n)});
    }
    if (epilogue_of_chunk == nullptr) return;
    epilogue_of_chunk->run({y + y_row * ldy + first, ldy, y_rows, width, epilogue_at(y_row, first)});
  };
  map_fresh_rows(y, halves ? row_count / 2 : row_count, view.n, ldy);
  for_each_shared(chunks, threads > 1, run_chunk);
  return lacks_memory.load() ? Status::out_of_memory : Status::ok;
}

namespace {

// The task for the channels of blocks block_begin .. block_end - 1; bias, y and the residual are those of channel 0.
void run_blocks(const PackedView& view, TileTask task, const float* bias, float* y, int64_t block_begin,
                int64_t block_end) {
  const float* const residual = task.epilogue.residual;
  const int64_t block_n = view.kernel->block_n, row_count = task.row_count;
  const LinearKernel& kernel = *view.kernel;
  Expanded room;
  if (expands(view, row_count)) {
    room = make_room(view, block_end - block_begin);
  }
  int64_t count = 1;
  for (int64_t b = block_begin; b < block_end; b += count) {
    int bits = view.bits;
    int64_t block_bytes = view.block_bytes;
    task.weight = view.blocks + b * block_bytes;
    task.scale = view.scale + b * view.groups * block_n;
    task.zero_scale = view.zero_scale == nullptr ? nullptr : view.zero_scale + b * view.groups * block_n;
    task.bias = bias == nullptr ? nullptr : bias + b * block_n;
    if (y != nullptr) task.y = y + b * block_n;
    if (residual != nullptr) task.epilogue.residual = residual + b * block_n;
    task.first_channel = b * block_n;
    task.block_n_valid = std::min(block_n, view.n - b * block_n);
    if (kernel.run_blocks != nullptr) count = block_end - b;
    if (room.blocks != nullptr) {
      count = std::min(block_end - b, kernel.run_blocks == nullptr ? 1 : room.count);
      for (int64_t i = 0; i < count; ++i) {
        kernel.expand_block(view.bits, view.pieces, view.piece_count, task.weight + i * block_bytes,
                            room.blocks + i * room.block_bytes);
      }
      bits = expanded_bits(view.bits);
      block_bytes = room.block_bytes;
      task.weight = room.blocks;
    }
    if (kernel.scratch_bytes != nullptr) {
      thread_local Scratch scratch;
      const int64_t bytes = kernel.scratch_bytes(bits, task, count);
      task.scratch = bytes == 0 ? nullptr : scratch.get(bytes);
    }
    if (kernel.run_blocks != nullptr) {
      kernel.run_blocks(bits, task, count, block_bytes, view.n - b * block_n);
    } else {
      kernel.run(bits, task);
    }
  }
}

}  // namespace

void packed_view_run_blocks(const PackedView& view, const int8_t* const* rows, const float* row_scale,
                            const int32_t* row_sums, int64_t row_count, const float* bias, float* y, int64_t ldy,
                            int64_t block_begin, int64_t block_end, const float* group_scale,
                            const Epilogue& epilogue) {
  TileTask task = task_of(view, rows, row_scale, row_sums, row_count);
  task.epilogue = epilogue;
  task.group_scale = group_scale;
  task.ldy = ldy;
  run_blocks(view, task, bias, y, block_begin, block_end);
}

Status packed_view_run_codes(const PackedView& view, const int8_t* const* rows, const float* row_scale,
                             const int32_t* row_sums, int64_t row_count, const float* bias, const CodeOutputs& codes,
                             int64_t block_begin, int64_t block_end) {
  if (view.kernel->writes_codes) {
    TileTask task = task_of(view, rows, row_scale, row_sums, row_count);
    task.codes = codes;
    run_blocks(view, task, bias, nullptr, block_begin, block_end);
    return Status::ok;
  }
  // A few rows at a time, whose floats stay in L1 or near it.
  constexpr int64_t kFloats = 8 << 10;
  const int64_t block_n = view.kernel->block_n, first = block_begin * block_n;
  const int64_t width = std::min(view.n, block_end * block_n) - first, ldy = (width + 15) / 16 * 16;
  const int64_t rows_at_once = std::max<int64_t>(16, kFloats / std::max<int64_t>(1, ldy) / 16 * 16);
  thread_local Scratch scratch;
  const int64_t most = std::min(rows_at_once, row_count);
  auto* floats = reinterpret_cast<float*>(scratch.get(most * ldy * static_cast<int64_t>(sizeof(float))));
  if (floats == nullptr) return Status::out_of_memory;
  const auto to_codes = code_maps_kernel(view.kernel->isa)->to_codes;
  for (int64_t row = 0; row < row_count; row += rows_at_once) {
    const int64_t count = std::min(rows_at_once, row_count - row);
    TileTask task = task_of(view, rows + row, row_scale + row, row_sums + row * view.groups, count);
    task.ldy = ldy;
    run_blocks(view, task, bias, floats - first, block_begin, block_end);
    for (int64_t r = 0; r < count; ++r) {
      WeightedSum sum;
      sum.floats = floats + r * ldy;
      if (codes.added != nullptr) sum.a = codes.added[row + r] + first;
      sum.factor_a = codes.factor;
      sum.count = width;
      to_codes(sum, codes.rows[row + r] + first);
    }
  }
  return Status::ok;
}

}  // namespace bantamweight
