// Sharing a loop out over OpenMP's threads, which are torch's own when torch is imported first.
//
// Not `omp parallel if (..)`: a false clause still makes a team of one, which costs 0.2 us, and a
// parallel region inside that team counts as nested, for which libgomp starts fresh threads at every
// call instead of waking its pool (measured: 0.3 ms calls that took 4 ms).
#pragma once

#include <cstdint>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace bantamweight {

// Threads a loop may use here: one inside another shared loop.
inline int64_t available_threads() {
#if defined(_OPENMP)
  return omp_in_parallel() ? 1 : omp_get_max_threads();
#else
  return 1;
#endif
}

// body(0) .. body(count - 1) in any order; on this thread alone unless threads are `worthwhile`.
// The body must not throw.
template <class Body>
void for_each_shared(int64_t count, bool worthwhile, const Body& body) {
  if (count <= 1 || !worthwhile || available_threads() == 1) {
    for (int64_t i = 0; i < count; ++i) body(i);
    return;
  }
#pragma omp parallel for schedule(dynamic)
  for (int64_t i = 0; i < count; ++i) body(i);
}

}  // namespace bantamweight
