// Sharing a loop out over OpenMP's threads, which are torch's own when torch is imported first.
//
// Not `omp parallel if (..)`: a false clause still makes a team of one, which costs 0.2 us, and a
// parallel region inside that team counts as nested, for which libgomp starts fresh threads at every
// call instead of waking its pool (measured: 0.3 ms calls that took 4 ms).
//
// Not `schedule(dynamic)` either: it deals the same piece to another core at every call. Here each
// thread starts on the same share every time, which its own L2 then holds, and helps the others when
// it is done.
#pragma once

#include <atomic>
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
#if defined(_OPENMP)
  constexpr int64_t kMaxShares = 64;  // with more threads, several work on one
  struct alignas(64) Share {
    std::atomic<int64_t> next;
    int64_t end;
  };
  Share shares[kMaxShares];
  const int64_t share_count = available_threads() < kMaxShares ? available_threads() : kMaxShares;
  for (int64_t s = 0; s < share_count; ++s) {
    shares[s].next.store(count * s / share_count, std::memory_order_relaxed);
    shares[s].end = count * (s + 1) / share_count;
  }
#pragma omp parallel
  {
    const int64_t own = omp_get_thread_num();
    for (int64_t turn = 0; turn < share_count; ++turn) {
      Share& share = shares[(own + turn) % share_count];
      for (int64_t i; (i = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end;) body(i);
    }
  }
#endif
}

}  // namespace bantamweight
