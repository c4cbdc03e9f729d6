// The walk over records and groups, for `Values<kBits>` of each instruction set: what one group's codes
// stand for, made of its step and zero, with
//   void store(const uint8_t* unit, float* y) const                     the 16 codes of a unit
//   void store_part(const uint8_t* unit, float* y, int64_t count) const  the first `count` of them
// Everything is static: each file that includes it keeps a copy with its own flags.
#pragma once

#include "embedding/embedding.h"

namespace bantamweight {

// Lookups between the fetch of a record and its use.
static constexpr int64_t kAhead = 2;

static inline float float_at(const uint8_t* memory, int64_t i) {
  float value;
  __builtin_memcpy(&value, memory + 4 * i, 4);
  return value;
}

template <int kBits, class Values>
static void gather_bits(const EmbeddingTask& task) {
  for (int64_t i = 0; i < task.count; ++i) {
    if (i + kAhead < task.count) {
      const uint8_t* ahead = task.records + task.index[i + kAhead] * task.record_bytes;
      for (int64_t line = 0; line < task.record_bytes; line += 64) __builtin_prefetch(ahead + line);
    }
    const uint8_t* scale = task.records + task.index[i] * task.record_bytes;
    const uint8_t* zero = scale + 4 * task.groups;
    const uint8_t* unit = task.uniform_zero ? zero : zero + 4 * task.groups;
    float* y = task.y + i * task.ldy;
    for (int64_t g = 0; g < task.groups; ++g) {
      const Values values(float_at(scale, g), task.uniform_zero ? task.zero : float_at(zero, g));
      const int64_t begin = g * task.group_size;
      const int64_t end = task.dim - begin < task.group_size ? task.dim : begin + task.group_size;
      int64_t d = begin;
      for (; d + kUnitCodes <= end; d += kUnitCodes, unit += 2 * kBits) values.store(unit, y + d);
      if (d < end) {
        values.store_part(unit, y + d, end - d);
        unit += 2 * kBits;
      }
    }
  }
}

template <template <int> class Values>
static void gather(int bits, const EmbeddingTask& task) {
  switch (bits) {
    case 2:
      return gather_bits<2, Values<2>>(task);
    case 3:
      return gather_bits<3, Values<3>>(task);
    case 4:
      return gather_bits<4, Values<4>>(task);
    default:
      return gather_bits<8, Values<8>>(task);
  }
}

}  // namespace bantamweight
