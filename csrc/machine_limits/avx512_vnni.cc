// AVX-512 VNNI: vpdpbusd on 512 bits, 64 products an instruction, into ten sums (latency 5, two ports at most).
#include "machine_limits/machine_limits.h"

#if defined(__AVX512VNNI__) && defined(__AVX512F__)
#include <immintrin.h>

namespace bantamweight {
namespace {

constexpr int64_t kSums = 10;
constexpr int64_t kBurst = int64_t{1} << 28;  // steps until an int32 sum is at 2^30

int64_t multiply(int64_t steps) {
  const __m512i ones = _mm512_set1_epi8(1);
  int64_t total = 0;
  for (int64_t done = 0; done < steps; done += kBurst) {
    const int64_t burst = steps - done < kBurst ? steps - done : kBurst;
    __m512i s0 = _mm512_setzero_si512(), s1 = s0, s2 = s0, s3 = s0, s4 = s0, s5 = s0, s6 = s0, s7 = s0, s8 = s0,
            s9 = s0;
    for (int64_t i = 0; i < burst; ++i) {
      // Assembly, because GCC 12 copies the sums around the intrinsic.
      __asm__ volatile(
          "vpdpbusd %10, %10, %0\n\t"
          "vpdpbusd %10, %10, %1\n\t"
          "vpdpbusd %10, %10, %2\n\t"
          "vpdpbusd %10, %10, %3\n\t"
          "vpdpbusd %10, %10, %4\n\t"
          "vpdpbusd %10, %10, %5\n\t"
          "vpdpbusd %10, %10, %6\n\t"
          "vpdpbusd %10, %10, %7\n\t"
          "vpdpbusd %10, %10, %8\n\t"
          "vpdpbusd %10, %10, %9"
          : "+v"(s0), "+v"(s1), "+v"(s2), "+v"(s3), "+v"(s4), "+v"(s5), "+v"(s6), "+v"(s7), "+v"(s8), "+v"(s9)
          : "v"(ones));
    }
    const __m512i sums[kSums] = {s0, s1, s2, s3, s4, s5, s6, s7, s8, s9};
    alignas(64) int32_t lanes[16];
    for (int64_t j = 0; j < kSums; ++j) {
      _mm512_store_si512(lanes, sums[j]);
      for (int32_t lane : lanes) total += lane;
    }
  }
  return total;
}

constexpr MultiplyInt8Kernel kMultiply = {Isa::avx512_vnni, 64 * kSums, multiply};

}  // namespace

const MultiplyInt8Kernel* multiply_int8_avx512_vnni() { return &kMultiply; }

}  // namespace bantamweight
#else
namespace bantamweight {
const MultiplyInt8Kernel* multiply_int8_avx512_vnni() { return nullptr; }
}  // namespace bantamweight
#endif
