// One channel a block, one code a byte: the oracle of every other variant.
#include <cmath>

#include "lowbit_linear/lowbit_linear.h"

namespace bantamweight {
namespace {

int64_t total_k(const KPiece* pieces, int64_t piece_count) {
  int64_t k = 0;
  for (int64_t p = 0; p < piece_count; ++p) k += pieces[p].k_size;
  return k;
}

int64_t block_bytes(int, const KPiece* pieces, int64_t piece_count) { return total_k(pieces, piece_count); }

float lane_factor(int, int64_t) { return 1.0f; }

void pack_block(int, const KPiece* pieces, int64_t piece_count, const uint8_t* codes, int64_t, int64_t,
                uint8_t* block) {
  for (int64_t p = 0; p < piece_count; ++p) {
    for (int64_t i = 0; i < pieces[p].k_size; ++i) *block++ = codes[pieces[p].k_begin + i];
  }
}

void unpack_block(int, const KPiece* pieces, int64_t piece_count, const uint8_t* block, int64_t, int64_t,
                  uint8_t* codes) {
  for (int64_t p = 0; p < piece_count; ++p) {
    for (int64_t i = 0; i < pieces[p].k_size; ++i) codes[pieces[p].k_begin + i] = *block++;
  }
}

void run(int, const TileTask& task) {
  for (int64_t r = 0; r < task.row_count; ++r) {
    const uint8_t* code = task.weight;
    float sum = 0.0f;
    int64_t p = 0;
    for (int64_t g = 0; g < task.groups; ++g) {
      int32_t dot = 0;
      for (; p < task.piece_count && task.pieces[p].group == g; ++p) {
        const int8_t* a = task.rows[r] + task.pieces[p].row_offset;
        for (int64_t i = 0; i < task.pieces[p].k_size; ++i) dot += static_cast<int32_t>(*code++) * a[i];
      }
      const int32_t row_sum = task.row_sums[r * task.groups + g];
      const float group_scale = task.group_scale == nullptr ? 1.0f : task.group_scale[r * task.groups + g];
      if (task.zero_scale == nullptr) dot -= task.uniform_zero * row_sum;
      sum = std::fma(static_cast<float>(dot) * group_scale, task.scale[g], sum);
      if (task.zero_scale != nullptr)
        sum = std::fma(-task.zero_scale[g], static_cast<float>(row_sum) * group_scale, sum);
    }
    task.y[r * task.ldy] = std::fma(sum, task.row_scale[r], task.bias == nullptr ? 0.0f : task.bias[0]);
  }
}

constexpr LinearKernel kernel = {Isa::reference, 1, block_bytes, lane_factor, pack_block, unpack_block, run};

}  // namespace

const LinearKernel* linear_kernel_reference() { return &kernel; }

}  // namespace bantamweight
