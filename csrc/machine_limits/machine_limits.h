// What the machine itself can do, to hold the kernels' times against: bytes read from a buffer and int8
// multiply-adds, each by the plainest loop that saturates it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "runtime/isa.h"
#include "runtime/status.h"

namespace bantamweight {

// Reads the buffer `repeats` times over, every thread its own share. The caller takes the time.
//   words  [count], 64-byte aligned
//   sum    out: the sum of all words of one pass, modulo 2^64 (a proof that they were read)
Status read_memory(const uint64_t* words, int64_t count, int64_t repeats, Isa ceiling, uint64_t* sum);

// Every thread runs `steps` steps of the widest int8 multiply-add, all operands in registers.
//   products  out: multiply-adds done by all threads, as their accumulators counted them (every operand is one)
Status multiply_int8(int64_t steps, Isa ceiling, int64_t* products);

struct ReadMemoryKernel {
  Isa isa;
  // One thread, one pass; any count.
  uint64_t (*run)(const uint64_t* words, int64_t count);
};

struct MultiplyInt8Kernel {
  Isa isa;
  int64_t products_per_step;
  // One thread; returns the sum of all products: steps * products_per_step.
  int64_t (*run)(int64_t steps);
};

const ReadMemoryKernel* read_memory_reference();
const ReadMemoryKernel* read_memory_avx2();
const ReadMemoryKernel* read_memory_avx512();
const ReadMemoryKernel* read_memory_neon();

const MultiplyInt8Kernel* multiply_int8_reference();
const MultiplyInt8Kernel* multiply_int8_avx2();
const MultiplyInt8Kernel* multiply_int8_avx_vnni();
const MultiplyInt8Kernel* multiply_int8_avx512_vnni();
const MultiplyInt8Kernel* multiply_int8_amx();
const MultiplyInt8Kernel* multiply_int8_neon_dotprod();
const MultiplyInt8Kernel* multiply_int8_neon_i8mm();

// Null where this build lacks the variant.
const ReadMemoryKernel* read_memory_kernel(Isa isa);
const MultiplyInt8Kernel* multiply_int8_kernel(Isa isa);

// Variants in this build, best first.
const Isa* read_memory_variants(std::size_t* count);
const Isa* multiply_int8_variants(std::size_t* count);

}  // namespace bantamweight
