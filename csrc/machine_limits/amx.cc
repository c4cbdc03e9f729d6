// AMX-INT8: tdpbsud on whole tiles (16 x 64 by 64 x 16, 16,384 products in 16 cycles) into four sums, which hide the
// latency of 52 cycles.
#include "machine_limits/machine_limits.h"

#if defined(__AMX_TILE__) && defined(__AMX_INT8__)
#include "runtime/tiles_amx.h"

namespace bantamweight {
namespace {

constexpr int64_t kSums = 4;
constexpr int64_t kBurst = int64_t{1} << 23;  // steps until an int32 sum, 64 a step, is at 2^29

int64_t multiply(int64_t steps) {
  alignas(64) uint8_t ones[kTileBytes];
  for (uint8_t& one : ones) one = 1;
  alignas(64) int32_t sums[kTileInts];
  int64_t total = 0;
  configure(kTileRows);
  TILE_LOAD(4, ones, 64);
  TILE_LOAD(5, ones, 64);
  for (int64_t done = 0; done < steps; done += kBurst) {
    const int64_t burst = steps - done < kBurst ? steps - done : kBurst;
    TILE_ZERO(0);
    TILE_ZERO(1);
    TILE_ZERO(2);
    TILE_ZERO(3);
    for (int64_t i = 0; i < burst; ++i) {
      TILE_MULTIPLY(0, 4, 5);
      TILE_MULTIPLY(1, 4, 5);
      TILE_MULTIPLY(2, 4, 5);
      TILE_MULTIPLY(3, 4, 5);
    }
#define ADD_UP(tile)          \
  TILE_STORE(tile, sums, 64); \
  for (int32_t sum : sums) total += sum;
    ADD_UP(0)
    ADD_UP(1)
    ADD_UP(2)
    ADD_UP(3)
#undef ADD_UP
  }
  release_tiles();
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
