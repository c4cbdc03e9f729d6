// AVX-512: 64-byte loads, two a cycle from L1, into eight sums.
#include "machine_limits/machine_limits.h"

#if defined(__AVX512F__)
#include <immintrin.h>

namespace bantamweight {
namespace {

constexpr int64_t kSums = 8;

uint64_t read_words(const uint64_t* words, int64_t count) {
  __m512i sums[kSums];
  for (int64_t j = 0; j < kSums; ++j) sums[j] = _mm512_setzero_si512();
  int64_t i = 0;
  for (; i + 8 * kSums <= count; i += 8 * kSums) {
    for (int64_t j = 0; j < kSums; ++j) {
      sums[j] = _mm512_add_epi64(sums[j], _mm512_loadu_si512(words + i + 8 * j));
    }
  }
  alignas(64) uint64_t lanes[8];
  uint64_t sum = 0;
  for (int64_t j = 0; j < kSums; ++j) {
    _mm512_store_si512(lanes, sums[j]);
    for (uint64_t lane : lanes) sum += lane;
  }
  for (; i < count; ++i) sum += words[i];
  return sum;
}

constexpr ReadMemoryKernel kRead = {Isa::avx512, read_words};

}  // namespace

const ReadMemoryKernel* read_memory_avx512() { return &kRead; }

}  // namespace bantamweight
#else
namespace bantamweight {
const ReadMemoryKernel* read_memory_avx512() { return nullptr; }
}  // namespace bantamweight
#endif
