// AMX-INT8: tdpbsud on whole tiles (16 x 64 by 64 x 16, 16,384 products in 16 cycles) into four sums, which hide the
// latency of 52 cycles.
#include "machine_limits/machine_limits.h"

#if defined(__AMX_TILE__) && defined(__AMX_INT8__)

namespace bantamweight {
namespace {

constexpr int64_t kSums = 4, kTileBytes = 1024;
constexpr int64_t kBurst = int64_t{1} << 23;  // steps until an int32 sum, 64 a step, is at 2^29

int64_t multiply(int64_t steps) {
  alignas(64) uint8_t config[64] = {};
  config[0] = 1;  // palette
  for (int t = 0; t < 6; ++t) {
    config[16 + 2 * t] = 64;  // bytes a row
    config[48 + t] = 16;      // rows
  }
  alignas(64) uint8_t ones[kTileBytes];
  for (uint8_t& one : ones) one = 1;
  alignas(64) int32_t sums[kTileBytes / 4];
  int64_t total = 0;
  __asm__ volatile("ldtilecfg %0" ::"m"(config) : "memory");
  __asm__ volatile(
      "tileloadd (%0,%1,1), %%tmm4\n\t"
      "tileloadd (%0,%1,1), %%tmm5" ::"r"(ones),
      "r"(int64_t{64})
      : "memory");
  for (int64_t done = 0; done < steps; done += kBurst) {
    const int64_t burst = steps - done < kBurst ? steps - done : kBurst;
    __asm__ volatile("tilezero %%tmm0\n\ttilezero %%tmm1\n\ttilezero %%tmm2\n\ttilezero %%tmm3" ::: "memory");
    for (int64_t i = 0; i < burst; ++i) {
      __asm__ volatile(
          "tdpbsud %%tmm5, %%tmm4, %%tmm0\n\t"
          "tdpbsud %%tmm5, %%tmm4, %%tmm1\n\t"
          "tdpbsud %%tmm5, %%tmm4, %%tmm2\n\t"
          "tdpbsud %%tmm5, %%tmm4, %%tmm3" ::
              : "memory");
    }
#define ADD_UP(tile)                                                                                 \
  __asm__ volatile("tilestored %%tmm" #tile ", (%0,%1,1)" ::"r"(sums), "r"(int64_t{64}) : "memory"); \
  for (int32_t sum : sums) total += sum;
    ADD_UP(0)
    ADD_UP(1)
    ADD_UP(2)
    ADD_UP(3)
#undef ADD_UP
  }
  __asm__ volatile("tilerelease" ::: "memory");
  return total;
}

constexpr MultiplyInt8Kernel kMultiply = {Isa::amx, 16 * 16 * 64 * kSums, multiply};

}  // namespace

const MultiplyInt8Kernel* multiply_int8_amx() { return &kMultiply; }

}  // namespace bantamweight
#else
namespace bantamweight {
const MultiplyInt8Kernel* multiply_int8_amx() { return nullptr; }
}  // namespace bantamweight
#endif
