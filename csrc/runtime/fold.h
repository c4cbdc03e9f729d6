// A sum kept in lanes, folded in halves (16, 8, 4, 2, 1), so that vectors of any width give the same bits. Static:
// each file that includes it keeps a copy with its own flags.
#pragma once

#include <cstdint>

namespace bantamweight {

template <int64_t kLanes>
static inline float fold_lanes(float* lanes) {
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

}  // namespace bantamweight
