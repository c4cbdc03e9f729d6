// NEON with dot products: sdot, 16 products an instruction, into sixteen sums.
#include "machine_limits/machine_limits.h"

#if defined(__ARM_FEATURE_DOTPROD) && defined(__aarch64__)
#include <arm_neon.h>

namespace bantamweight {
namespace {

constexpr int64_t kSums = 16;
constexpr int64_t kBurst = int64_t{1} << 26;  // steps until an int32 sum is at 2^29 at most

int64_t multiply(int64_t steps) {
  int8x16_t ones = vdupq_n_s8(1);
  int64_t total = 0;
  for (int64_t done = 0; done < steps; done += kBurst) {
    const int64_t burst = steps - done < kBurst ? steps - done : kBurst;
    int32x4_t sums[kSums];
    for (int64_t j = 0; j < kSums; ++j) sums[j] = vdupq_n_s32(0);
    for (int64_t i = 0; i < burst; ++i) {
      __asm__ volatile("" : "+w"(ones));  // otherwise the loop is folded into one product
      for (int64_t j = 0; j < kSums; ++j) sums[j] = vdotq_s32(sums[j], ones, ones);
    }
    for (int64_t j = 0; j < kSums; ++j) total += vaddlvq_s32(sums[j]);
  }
  return total;
}

constexpr MultiplyInt8Kernel kMultiply = {Isa::neon_dotprod, 16 * kSums, multiply};

}  // namespace

const MultiplyInt8Kernel* multiply_int8_neon_dotprod() { return &kMultiply; }

}  // namespace bantamweight
#else
namespace bantamweight {
const MultiplyInt8Kernel* multiply_int8_neon_dotprod() { return nullptr; }
}  // namespace bantamweight
#endif
