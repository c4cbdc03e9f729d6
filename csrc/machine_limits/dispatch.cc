// Picks the variant and gives every thread its share.
#include <algorithm>
#include <atomic>

#include "machine_limits/machine_limits.h"
#include "runtime/threads.h"
#include "runtime/variants.h"

namespace bantamweight {
namespace {

const VariantList<ReadMemoryKernel>& readers() {
  static const VariantList<ReadMemoryKernel> list = {read_memory_avx512(), read_memory_avx2(), read_memory_neon(),
                                                     read_memory_reference()};
  return list;
}

const VariantList<MultiplyInt8Kernel>& multipliers() {
  static const VariantList<MultiplyInt8Kernel> list = {
      multiply_int8_amx(),       multiply_int8_avx512_vnni(),  multiply_int8_avx_vnni(), multiply_int8_avx2(),
      multiply_int8_neon_i8mm(), multiply_int8_neon_dotprod(), multiply_int8_reference()};
  return list;
}

}  // namespace

const ReadMemoryKernel* read_memory_kernel(Isa isa) { return readers().find(isa); }
const MultiplyInt8Kernel* multiply_int8_kernel(Isa isa) { return multipliers().find(isa); }
const Isa* read_memory_variants(std::size_t* count) { return readers().isas(count); }
const Isa* multiply_int8_variants(std::size_t* count) { return multipliers().isas(count); }

Status read_memory(const uint64_t* words, int64_t count, int64_t repeats, Isa ceiling, uint64_t* sum) {
  if (count < 0 || repeats < 1 || sum == nullptr || (count > 0 && words == nullptr)) return Status::invalid_argument;
  const ReadMemoryKernel* kernel = readers().pick(ceiling);
  const int64_t shares = available_threads();
  const int64_t share = (count + shares - 1) / shares;
  std::atomic<uint64_t> total{0};
  for_each_shared(shares, true, [&](int64_t i) {
    const int64_t begin = std::min(i * share, count), size = std::min(share, count - begin);
    uint64_t found = 0;
    for (int64_t r = 0; r < repeats; ++r) {
      found = kernel->run(words + begin, size);
    }
    total += found;
  });
  *sum = total;
  return Status::ok;
}

Status multiply_int8(int64_t steps, Isa ceiling, int64_t* products) {
  if (steps < 0 || products == nullptr) return Status::invalid_argument;
  const MultiplyInt8Kernel* kernel = multipliers().pick(ceiling);
  std::atomic<int64_t> total{0};
  for_each_shared(available_threads(), true, [&](int64_t) { total += kernel->run(steps); });
  *products = total;
  return Status::ok;
}

}  // namespace bantamweight
