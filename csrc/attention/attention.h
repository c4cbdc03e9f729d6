// Attention (Vaswani et al. 2017, arXiv 1706.03762, eq. 1) in float32, for every head of a batch:
//
//   out = softmax(q k^T scale + mask) v
//
// The heads lie side by side in a row, as linear layers write them, and so do those of the result: nothing is
// transposed or copied around it.
//
// Every variant but AMX's gives the same bits: a score is a chain of fused multiply-adds over the head's elements from
// 0, then times scale plus mask in one; exp(score - the row's largest) as in exponential.h; key i is summed in lane i %
// 16, and the lanes are folded in halves; an output is a chain of fused multiply-adds over the keys from 0, times the
// inverse of the sum. A row whose keys are all masked by -infinity gives zeros. AMX's rounds q, k, v and the
// probabilities to bfloat16 (8 bits of fraction) first, and so runs only where the caller allows it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "runtime/isa.h"
#include "runtime/status.h"

namespace bantamweight {

constexpr int64_t kAttentionLanes = 16;

// Rows of a batch: row r of item b starts at data + b * batch + r * row, and head h at its element h * head_size.
struct AttentionRows {
  const float* data = nullptr;
  int64_t batch = 0, row = 0;  // in floats
};

struct AttentionArgs {
  AttentionRows q;     // [batch, queries, heads * head_size]
  AttentionRows k, v;  // [batch, keys, heads * head_size]
  // [batch, heads, queries, keys] floats, strides below, keys next to each other; or null. -infinity hides a key.
  const float* mask = nullptr;
  int64_t mask_batch = 0, mask_head = 0, mask_query = 0;
  int64_t batch = 0, heads = 0, queries = 0, keys = 0, head_size = 0;
  float scale = 1.0f;
  bool bfloat16 = false;  // the products may round what they multiply to bfloat16
  float* out = nullptr;   // [batch, queries, heads * head_size]
  int64_t out_batch = 0, out_row = 0;
};

// not_finite: a score is NaN or infinite, or the mask holds NaN or +infinity; `out` is then undefined.
// Threads: OpenMP's current setting.
Status attention(const AttentionArgs& args, Isa ceiling);

// Some queries of one head.
struct AttentionTask {
  const float *q, *k, *v;  // [queries or keys, head_size], rows ldq, ldk, ldv floats apart
  int64_t ldq, ldk, ldv;
  const float* mask;  // [queries, keys], rows ldm floats apart, or null
  int64_t ldm;
  int64_t queries, keys, head_size;
  float scale;
  float* out;  // [queries, head_size], rows ldo floats apart
  int64_t ldo;
  float* scratch;  // [scratch_floats], 64-byte aligned
};

struct AttentionKernel {
  Isa isa;
  int64_t (*scratch_floats)(int64_t keys, int64_t head_size);
  bool (*run)(const AttentionTask& task);  // false: not finite
};

// Keys, or elements of a head, with what fills the last vector of any instruction set.
constexpr int64_t attention_padded(int64_t count) {
  return (count + kAttentionLanes - 1) / kAttentionLanes * kAttentionLanes;
}

const AttentionKernel* attention_reference();
const AttentionKernel* attention_avx2();
const AttentionKernel* attention_avx512();
const AttentionKernel* attention_amx();
const AttentionKernel* attention_neon();

// Variants this op has in this build, best first.
const Isa* attention_variants(std::size_t* count);

}  // namespace bantamweight
