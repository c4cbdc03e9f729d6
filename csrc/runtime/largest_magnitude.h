// Over the vectors of floats_*.h. Static: each file that includes it keeps a copy with its own flags.
#pragma once

#include <cstdint>

namespace bantamweight {

// The largest |x|, infinity or NaN if one is not finite.
template <class F>
static float largest_magnitude(const float* x, int64_t k) {
  constexpr int64_t kLanes = F::kLanes;
  const auto nothing = F::all(0.0f);
  typename F::Vector largest[4] = {nothing, nothing, nothing, nothing};
  int64_t i = 0;
  for (; i + 4 * kLanes <= k; i += 4 * kLanes) {
#pragma GCC unroll 4
    for (int64_t j = 0; j < 4; ++j) largest[j] = F::larger_magnitude(largest[j], F::load(x + i + j * kLanes));
  }
  for (; i + kLanes <= k; i += kLanes) largest[0] = F::larger_magnitude(largest[0], F::load(x + i));
  if (i < k) largest[1] = F::larger_magnitude(largest[1], F::load(x + i, F::part(k - i)));
  largest[0] = F::larger_magnitude(largest[0], largest[1]);
  largest[2] = F::larger_magnitude(largest[2], largest[3]);
  return F::largest_lane(F::larger_magnitude(largest[0], largest[2]));
}

}  // namespace bantamweight
