// Portable loops. As a limit they mean little: they say what the compiler's baseline reaches.
#include "machine_limits/machine_limits.h"

namespace bantamweight {
namespace {

uint64_t read_words(const uint64_t* words, int64_t count) {
  uint64_t sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += words[i];
  return sum;
}

int64_t multiply(int64_t steps) {
  // Volatile, or the compiler knows the result before the loop runs.
  volatile int8_t a = 1, b = 1;
  int64_t sum = 0;
  for (int64_t i = 0; i < steps; ++i) sum += static_cast<int32_t>(a) * b;
  return sum;
}

constexpr ReadMemoryKernel kRead = {Isa::reference, read_words};
constexpr MultiplyInt8Kernel kMultiply = {Isa::reference, 1, multiply};

}  // namespace

const ReadMemoryKernel* read_memory_reference() { return &kRead; }
const MultiplyInt8Kernel* multiply_int8_reference() { return &kMultiply; }

}  // namespace bantamweight
