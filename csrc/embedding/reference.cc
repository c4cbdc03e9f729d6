// The obvious loop: the oracle of every other variant.
#include <cstring>

#include "embedding/embedding.h"

namespace bantamweight {
namespace {

float float_at(const uint8_t* memory, int64_t i) {
  float value;
  std::memcpy(&value, memory + 4 * i, 4);
  return value;
}

int code_at(int bits, const uint8_t* unit, int64_t i) {
  switch (bits) {
    case 2:
      return unit[i / 4] >> (i % 4 * 2) & 3;
    case 3:
      return (unit[i / 4] >> (i % 4 * 2) & 3) | (unit[4 + i / 8] >> (i % 8) & 1) << 2;
    case 4:
      return unit[i % 2 * 4 + i / 4] >> (i / 2 % 2 * 4) & 15;
    default:
      return unit[i];
  }
}

void run(int bits, const EmbeddingTask& task) {
  for (int64_t i = 0; i < task.count; ++i) {
    const uint8_t* scale = task.records + task.index[i] * task.record_bytes;
    const uint8_t* zero = scale + 4 * task.groups;
    const uint8_t* unit = task.uniform_zero ? zero : zero + 4 * task.groups;
    float* y = task.y + i * task.ldy;
    for (int64_t g = 0; g < task.groups; ++g) {
      const float step = float_at(scale, g);
      const float shift = task.uniform_zero ? task.zero : float_at(zero, g);
      const int64_t begin = g * task.group_size;
      const int64_t size = task.dim - begin < task.group_size ? task.dim - begin : task.group_size;
      for (int64_t d = 0; d < size; ++d) {
        const uint8_t* own = unit + d / kUnitCodes * 2 * bits;
        y[begin + d] = (static_cast<float>(code_at(bits, own, d % kUnitCodes)) - shift) * step;
      }
      unit += (size + kUnitCodes - 1) / kUnitCodes * 2 * bits;
    }
  }
}

constexpr EmbeddingKernel kernel = {Isa::reference, run};

}  // namespace

const EmbeddingKernel* embedding_kernel_reference() { return &kernel; }

}  // namespace bantamweight
