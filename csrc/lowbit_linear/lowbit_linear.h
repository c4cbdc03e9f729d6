// Packed low-bit weights times int8 activations: the workhorse.
//
//   y[m, n] = bias[n] + a_scale[m] * sum_g scale[n, g] * (sum_{k in g} codes[n, k] * a[m, k] - zero[n, g] * sum_{k in
//   g} a[m, k])
//
// `a` is the activation row rounded to int8 against its own absolute maximum (see
// quantize_activations.h; activations in blocks have a scale each, inside the sum over g, and an offset
// each, see block_offsets.h). The integer sums are exact on every variant; the float steps are
// ordered the same way everywhere, fused multiply-adds over g ascending, so that all variants
// agree to the last bit.
//
// A packed weight is one flat, position-independent buffer: a 64-byte-aligned block that starts
// with LayoutHeader. It belongs to one kernel of one CPU family and is never written to disk.
#pragma once

#include <cstddef>
#include <cstdint>

#include "epilogue/epilogue.h"
#include "layer_norm/layer_norm.h"
#include "quantize_activations/quantize_activations.h"
#include "runtime/isa.h"
#include "runtime/status.h"

namespace bantamweight {

// ---------------------------------------------------------------------------------------------
// What callers use.

struct LinearShape {
  int64_t n = 0;           // output channels, >= 0
  int64_t k = 0;           // inputs, >= 0
  int bits = 0;            // 2, 3, 4 or 8 bits a code in memory (ternary is 2)
  int64_t group_size = 0;  // k per scale; groups = ceil(k / group_size); k for one scale a channel
  // How inputs are rounded. int8_block: for every kActivationBlock columns, or every group of fewer,
  // on their own; group_size divides kActivationBlock, is a multiple of it, or covers the row.
  Activations activations = Activations::int8;
  bool ternary = false;  // 2 bits, and no code is 3: a kernel may store them in fewer
};

constexpr int64_t kActivationBlock = 128;

// Bytes of the packed buffer for `isa`, or -1 if the shape is invalid or the op has no such variant.
int64_t linear_layout_bytes(const LinearShape& shape, Isa isa);

// The variant this op would run under `ceiling`.
Isa linear_select(Isa ceiling);

// Variants this op has in this build, best first.
const Isa* linear_variants(std::size_t* count);

Status linear_pack(const LinearShape& shape, Isa isa,
                   const uint8_t* codes,  // [n, k] row-major, values 0 .. 2^bits - 1
                   const float* scale,    // [n, groups]
                   const float* zero,     // [n, groups], in code units
                   void* layout,          // out, 64-byte aligned, linear_layout_bytes() long
                   int64_t layout_bytes);

// The exact inverse of linear_pack: canonical codes, scales and zeros out of the kernel's layout.
Status linear_unpack(const void* layout, int64_t layout_bytes, uint8_t* codes, float* scale, float* zero);

// Checks the header and reads the shape and the kernel out of a packed buffer, and the bits that a code is stored
// with: those of the shape, 4 for 3, or 5/3.
Status linear_describe(const void* layout, int64_t layout_bytes, LinearShape* shape, Isa* isa,
                       double* stored = nullptr);

struct LinearArgs {
  const float* x = nullptr;  // [m, k], rows ldx floats apart; null to take `rows`
  int64_t ldx = 0;
  QuantizedRows rows;  // instead of x: m rows of k that were rounded before
  int64_t m = 0;
  const float* bias = nullptr;  // [n] or null
  Epilogue epilogue;
  float* y = nullptr;  // out [m, n], rows ldy floats apart
  int64_t ldy = 0;
};

// y = activation(x W^T + bias) + residual, with x rounded on the way in as the layout's shape says.
// Threads: OpenMP's current setting. Status::unsupported for rows that were rounded before where the
// shape's activations are not int8.
Status linear_forward(const void* layout, int64_t layout_bytes, const LinearArgs& args);

struct LinearWeight {
  const void* layout = nullptr;
  int64_t layout_bytes = 0;
  const float* bias = nullptr;  // [n] or null
};

// The same with several weights of one k, the outputs side by side: y is [m, n_0 + n_1 + ..], and so
// are the residual's rows. x is rounded once. `args.bias` is not read.
Status linears_forward(const LinearWeight* weights, int64_t count, const LinearArgs& args);

// One step of a chain: h = norm(activation(h W^T + bias) + residual), what is null or none left out.
struct ChainStage {
  // What is added: nothing, the chain's float input, args.residual, or the output of stage i.
  static constexpr int kNothing = -1, kInput = -2, kGiven = -3;

  LinearWeight weight;
  Activation activation = Activation::none;
  int residual = kNothing;
  const LayerNorm* norm = nullptr;
};

struct ChainArgs {
  const float* x = nullptr;  // [m, k of the first stage], rows ldx floats apart; null to take `rows` alone
  int64_t ldx = 0;
  QuantizedRows rows;               // x rounded before, or empty; not with a first norm
  const LayerNorm* norm = nullptr;  // of x before the first stage; kInput stays the x before it
  const float* residual = nullptr;  // [m, n of the stage that adds it], rows ldr floats apart
  int64_t ldr = 0;
  int64_t m = 0;
  float* y = nullptr;  // out [m, n of the last stage], rows ldy floats apart; null if only the rounded ones are wanted
  int64_t ldy = 0;
  int8_t* q = nullptr;      // out: the outputs rounded as QuantizedRows has them, or null
  float* scale = nullptr;   // out [m]
  int32_t* sums = nullptr;  // out [m, ceil(n / group_size)]
  int64_t group_size = 0;
};

// Linear layers in a row. Rows go through all of them in chunks whose intermediate outputs stay in L2,
// a chunk a thread; when the rows are few, the threads share the channels of each layer instead.
Status linear_chain(const ChainStage* stages, int64_t count, const ChainArgs& args);

// ---------------------------------------------------------------------------------------------
// What the variants and the convolution share: one inner kernel over rows given by pointers.

// A run of k that is contiguous in an activation row and lies in one scale group. A linear layer
// has one piece a group; a convolution one a kernel row (or tap) and group, in the order of k.
struct KPiece {
  int64_t k_begin = 0;     // first column of W
  int64_t k_size = 0;      // columns, > 0
  int64_t row_offset = 0;  // bytes from the row pointer to the first activation
  int64_t group = 0;       // non-decreasing over the pieces
};

// Among the bits that codes are stored with: ternary codes, three of them in five bits.
constexpr int kTrits = 1;

// int32 sums of code * activation stay exact up to this many k (255 * 127 * k < 2^31); the
// dispatcher cuts longer groups into pieces of their own with the scale repeated.
constexpr int64_t kMaxGroupK = 65536;

// Outputs as int8 codes instead of floats: with y what the float would be,
//
//   code = rint(max(min(y + factor * added, 127), -127)), the sum a fused multiply-add, ties to even
//
// so the caller's bias and row scales are in units of a code and hold whatever shifts the codes.
struct CodeOutputs {
  int8_t* const* rows = nullptr;         // [row_count] channel 0 of each row; null for float outputs
  const int8_t* const* added = nullptr;  // [row_count] the same of the codes that are added, or null
  float factor = 0.0f;
};

// One task: every row of `rows` against one block of `block_n` channels.
struct TileTask {
  const uint8_t* weight;    // the block's codes, pieces in order, this kernel's layout
  const float* scale;       // [groups][block_n], already divided by what the layout multiplies by
  const float* zero_scale;  // [groups][block_n] scale * zero (undivided); null if the zero is uniform
  int32_t uniform_zero;     // the integer zero of every channel and group when zero_scale is null
  const KPiece* pieces;     // [piece_count]
  int64_t piece_count;
  int64_t groups;
  const int8_t* const* rows;  // [row_count]; readable 64 bytes past the last piece
  const float* row_scale;     // [row_count]
  const int32_t* row_sums;    // [row_count][groups] sums of the activations of each group
  // [row_count][groups] or null: a scale of the activations of each group, which multiplies the
  // group's sums before the weight's scale does; row_scale multiplies the whole as ever.
  const float* group_scale = nullptr;
  int64_t row_count;
  const float* bias;  // [block_n_valid] or null
  float* y;           // out: row r at y + r * ldy; null for codes
  int64_t ldy;
  int64_t block_n_valid;        // channels to write, <= block_n
  bool beyond_l2 = false;       // the weight, of which this is a part, comes from beyond a core's L2
  bool stream_outputs = false;  // a variant may set it to write past the caches
  CodeOutputs codes;            // instead of y, for a kernel that writes codes
  Epilogue epilogue;  // of y, its residual that of row 0 and channel 0; where the kernel's finishes_outputs says so
  int64_t first_channel = 0;   // of the block, for them
  uint8_t* scratch = nullptr;  // the kernel's scratch_bytes, 64-byte aligned, or null
};

struct LinearKernel {
  Isa isa;
  int64_t block_n;  // channels a block
  // Bytes of one block of codes over these pieces.
  int64_t (*block_bytes)(int bits, const KPiece* pieces, int64_t piece_count);
  // What the layout multiplies channel `lane` (0 .. block_n-1) of a block by: 1, 4, 16, 64, ..
  float (*lane_factor)(int bits, int64_t lane);
  // codes: the block's rows [valid_n, k], ldk bytes apart; lanes past valid_n are packed as code 0.
  void (*pack_block)(int bits, const KPiece* pieces, int64_t piece_count, const uint8_t* codes, int64_t ldk,
                     int64_t valid_n, uint8_t* block);
  void (*unpack_block)(int bits, const KPiece* pieces, int64_t piece_count, const uint8_t* block, int64_t ldk,
                       int64_t valid_n, uint8_t* codes);
  void (*run)(int bits, const TileTask& task);
  // Optional: `block_count` blocks in a row, `block_bytes` apart, of which `task` is the first and
  // `channels` the number from there on. A variant that can overlap one block with the next has it.
  void (*run_blocks)(int bits, const TileTask& task, int64_t block_count, int64_t block_bytes,
                     int64_t channels) = nullptr;
  // Optional: rewrites a block of `bits` as one of expanded_bits(bits). From expand_rows(bits) rows on, that
  // and a run at those bits are faster than a run at `bits`.
  void (*expand_block)(int bits, const KPiece* pieces, int64_t piece_count, const uint8_t* block,
                       uint8_t* expanded) = nullptr;
  int64_t (*expand_rows)(int bits) = nullptr;
  // Channels that one call of run_blocks should get where the layer has them, because they share what
  // the call does for its rows.
  int64_t channels_at_once = 0;
  // Activations that run between two loads of the weights from beyond L2, where they stay meanwhile.
  int64_t activation_bytes = 384 << 10;
  bool writes_codes = false;  // takes TileTask::codes
  // Optional: working memory that run_blocks makes use of for so many blocks if it gets it, for copies of the
  // activations; 0 where it has no use for any. Then one call should get `channels_per_copy` channels, if that leaves
  // no thread idle.
  int64_t (*scratch_bytes)(int bits, const TileTask& task, int64_t block_count) = nullptr;
  int64_t channels_per_copy = 0;
  bool takes_trits = false;  // kTrits for bits
  // Optional: the lower or upper 32 channels of a block as tiles of signed bytes, codes minus `zero`, which they fit:
  // [chunks][2][16][16 channels][4 k], up to 64 k of one piece a chunk, zeros behind its end. Not for 3 bits or trits.
  void (*signed_tiles)(int bits, const KPiece* pieces, int64_t piece_count, int32_t zero, const uint8_t* block,
                       bool upper, int8_t* tiles) = nullptr;
  // Optional: true if run_blocks should get the epilogue of so many blocks, too, which pays where the outputs leave L2
  // as they are written. Reads neither the rows nor y.
  bool (*finishes_outputs)(int bits, const TileTask& task, int64_t block_count) = nullptr;
};

// The bits whose kernels need no unpacking that those of `bits` need; `bits` itself where there are none.
constexpr int expanded_bits(int bits) { return bits == 3 ? 4 : bits == kTrits ? 2 : bits; }

// Null if this build has no such variant.
const LinearKernel* linear_kernel(Isa isa);

// One accessor a variant; each stands in its own file, and returns null where it was not compiled.
const LinearKernel* linear_kernel_reference();
const LinearKernel* linear_kernel_avx2();
const LinearKernel* linear_kernel_avx_vnni();
const LinearKernel* linear_kernel_avx512_vnni();
const LinearKernel* linear_kernel_avx512_vbmi();
const LinearKernel* linear_kernel_amx();
const LinearKernel* linear_kernel_neon_dotprod();
const LinearKernel* linear_kernel_neon_i8mm();

// The bits that codes of this shape are stored with: 4 for 3 in a weight that stays in a core's L2, where a
// kernel's 4-bit form takes fewer instructions than its 3-bit form; kTrits for ternary codes in one that does
// not stay in those of the threads that there are now, where bytes are what a single row waits for.
int stored_bits(const LinearKernel& kernel, const LinearShape& shape);

// Packed codes, scales and zeros of one weight over any pieces: what linear_pack writes after its
// header, and what a convolution keeps one of for each of its channel groups.
struct PackedView {
  const LinearKernel* kernel = nullptr;
  int bits = 0;
  int64_t n = 0, groups = 0, piece_count = 0;
  int64_t block_bytes = 0;
  const KPiece* pieces = nullptr;
  const uint8_t* blocks = nullptr;    // [ceil(n / block_n)] blocks, 64-byte aligned
  const float* scale = nullptr;       // [blocks][groups][block_n]
  const float* zero_scale = nullptr;  // the same shape, or null when every zero is uniform_zero
  const float* zero = nullptr;        // [n, groups] as they came
  const float* weight_sum = nullptr;  // [blocks][groups][block_n] sums of the weights, or null
  int32_t uniform_zero = 0;
};

// Bytes that packed_view_write fills, a multiple of 64.
int64_t packed_view_bytes(const LinearKernel& kernel, int bits, int64_t n, int64_t groups, const KPiece* pieces,
                          int64_t piece_count, bool with_sums = false);
// with_sums: weight_sum is kept, too, which activations with an offset want. codes [n, k], below 2^code_bits; scale and
// zero [n, groups].
void packed_view_write(const LinearKernel& kernel, int bits, int code_bits, int64_t n, int64_t groups,
                       const KPiece* pieces, int64_t piece_count, const uint8_t* codes, int64_t k, const float* scale,
                       const float* zero, void* memory, bool with_sums = false);
// Reads the view back from memory that packed_view_write filled; wrong_layout if it does not fit.
Status packed_view_read(const LinearKernel& kernel, const void* memory, int64_t bytes, PackedView* view);
// codes may be null if only the others are wanted.
void packed_view_unpack(const PackedView& view, int64_t k, uint8_t* codes, float* scale, float* zero);

// The shape and the view of a buffer that linear_pack filled; wrong_layout if it is none.
Status linear_read(const void* layout, int64_t layout_bytes, LinearShape* shape, PackedView* view);

// True if an epilogue of so many rows is the kernel's, which has it before it writes: int8 rows, no offsets.
bool packed_view_finishes(const PackedView& view, int64_t row_count, int64_t ldy);

// Every row against every channel, in chunks shared out over OpenMP's threads; the epilogue follows
// each chunk while its outputs are in the cache, unless the kernel has it before it writes them. Only `halves` needs
// memory that may be lacking.
//   group_scale  [row_count, groups] or null, as in TileTask
//   group_offset [row_count, groups] or null: what the activations of a group are counted from
//   halves       rows 2 i and 2 i + 1 are the halves of row i of y (Activations::int16)
Status packed_view_run(const PackedView& view, const int8_t* const* rows, const float* row_scale,
                       const int32_t* row_sums, int64_t row_count, const float* bias, float* y, int64_t ldy,
                       const Epilogue& epilogue = {}, const float* group_scale = nullptr,
                       const float* group_offset = nullptr, bool halves = false);

// The same on the calling thread for the channels of blocks block_begin .. block_end - 1; bias, y and the
// residual are those of channel 0. An epilogue only where the kernel finishes these outputs.
void packed_view_run_blocks(const PackedView& view, const int8_t* const* rows, const float* row_scale,
                            const int32_t* row_sums, int64_t row_count, const float* bias, float* y, int64_t ldy,
                            int64_t block_begin, int64_t block_end, const float* group_scale = nullptr,
                            const Epilogue& epilogue = {});

// The same to codes. Only kernels that write floats need memory that may be lacking.
Status packed_view_run_codes(const PackedView& view, const int8_t* const* rows, const float* row_scale,
                             const int32_t* row_sums, int64_t row_count, const float* bias, const CodeOutputs& codes,
                             int64_t block_begin, int64_t block_end);

}  // namespace bantamweight
