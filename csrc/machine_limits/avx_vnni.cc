// AVX-VNNI: vpdpbusd on 256 bits, 32 products an instruction, into ten sums (latency 5, two ports).
#include "machine_limits/machine_limits.h"

#if defined(__AVXVNNI__)
#include <immintrin.h>

namespace bantamweight {
namespace {

constexpr int64_t kSums = 10;
constexpr int64_t kBurst = int64_t{1} << 28;  // steps until an int32 sum is at 2^30

int64_t multiply(int64_t steps) {
  const __m256i ones = _mm256_set1_epi8(1);
  int64_t total = 0;
  for (int64_t done = 0; done < steps; done += kBurst) {
    const int64_t burst = steps - done < kBurst ? steps - done : kBurst;
    __m256i s0 = _mm256_setzero_si256(), s1 = s0, s2 = s0, s3 = s0, s4 = s0, s5 = s0, s6 = s0, s7 = s0, s8 = s0,
            s9 = s0;
    for (int64_t i = 0; i < burst; ++i) {
      // Assembly, because GCC 12 copies the sums around the intrinsic.
      __asm__ volatile(
          "%{vex%} vpdpbusd %10, %10, %0\n\t"
          "%{vex%} vpdpbusd %10, %10, %1\n\t"
          "%{vex%} vpdpbusd %10, %10, %2\n\t"
          "%{vex%} vpdpbusd %10, %10, %3\n\t"
          "%{vex%} vpdpbusd %10, %10, %4\n\t"
          "%{vex%} vpdpbusd %10, %10, %5\n\t"
          "%{vex%} vpdpbusd %10, %10, %6\n\t"
          "%{vex%} vpdpbusd %10, %10, %7\n\t"
          "%{vex%} vpdpbusd %10, %10, %8\n\t"
          "%{vex%} vpdpbusd %10, %10, %9"
          : "+x"(s0), "+x"(s1), "+x"(s2), "+x"(s3), "+x"(s4), "+x"(s5), "+x"(s6), "+x"(s7), "+x"(s8), "+x"(s9)
          : "x"(ones));
    }
    const __m256i sums[kSums] = {s0, s1, s2, s3, s4, s5, s6, s7, s8, s9};
    alignas(32) int32_t lanes[8];
    for (int64_t j = 0; j < kSums; ++j) {
      _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), sums[j]);
      for (int32_t lane : lanes) total += lane;
    }
  }
  return total;
}

constexpr MultiplyInt8Kernel kMultiply = {Isa::avx_vnni, 32 * kSums, multiply};

}  // namespace

const MultiplyInt8Kernel* multiply_int8_avx_vnni() { return &kMultiply; }

}  // namespace bantamweight
#else
namespace bantamweight {
const MultiplyInt8Kernel* multiply_int8_avx_vnni() { return nullptr; }
}  // namespace bantamweight
#endif
