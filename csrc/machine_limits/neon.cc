// NEON: 16-byte loads into eight sums.
#include "machine_limits/machine_limits.h"

#if defined(__ARM_NEON) && defined(__aarch64__)
#include <arm_neon.h>

namespace bantamweight {
namespace {

constexpr int64_t kSums = 8;

uint64_t read_words(const uint64_t* words, int64_t count) {
  uint64x2_t sums[kSums];
  for (int64_t j = 0; j < kSums; ++j) sums[j] = vdupq_n_u64(0);
  int64_t i = 0;
  for (; i + 2 * kSums <= count; i += 2 * kSums) {
    for (int64_t j = 0; j < kSums; ++j) sums[j] = vaddq_u64(sums[j], vld1q_u64(words + i + 2 * j));
  }
  uint64_t sum = 0;
  for (int64_t j = 0; j < kSums; ++j) sum += vaddvq_u64(sums[j]);
  for (; i < count; ++i) sum += words[i];
  return sum;
}

constexpr ReadMemoryKernel kRead = {Isa::neon, read_words};

}  // namespace

const ReadMemoryKernel* read_memory_neon() { return &kRead; }

}  // namespace bantamweight
#else
namespace bantamweight {
const ReadMemoryKernel* read_memory_neon() { return nullptr; }
}  // namespace bantamweight
#endif
