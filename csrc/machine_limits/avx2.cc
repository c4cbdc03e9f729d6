// AVX2: 32-byte loads into eight sums; vpmaddubsw + vpaddw, the fastest way to add up int8 products before VNNI.
//
// vpmaddubsw takes one of two ports a cycle and adds pairs of products into int16; with vpaddw that is 32 products
// for two instructions. The int16 sums are emptied before they could overflow (2 a step).
#include "machine_limits/machine_limits.h"

#if defined(__AVX2__)
#include <immintrin.h>

namespace bantamweight {
namespace {

constexpr int64_t kSums = 8;

uint64_t read_words(const uint64_t* words, int64_t count) {
  __m256i sums[kSums];
  for (int64_t j = 0; j < kSums; ++j) sums[j] = _mm256_setzero_si256();
  int64_t i = 0;
  for (; i + 4 * kSums <= count; i += 4 * kSums) {
    for (int64_t j = 0; j < kSums; ++j) {
      const __m256i word = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words + i + 4 * j));
      sums[j] = _mm256_add_epi64(sums[j], word);
    }
  }
  alignas(32) uint64_t lanes[4];
  uint64_t sum = 0;
  for (int64_t j = 0; j < kSums; ++j) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), sums[j]);
    sum += lanes[0] + lanes[1] + lanes[2] + lanes[3];
  }
  for (; i < count; ++i) sum += words[i];
  return sum;
}

constexpr int64_t kBurst = 8192;  // steps until an int16 sum is at 2^14

int64_t multiply(int64_t steps) {
  __m256i ones = _mm256_set1_epi8(1);
  const __m256i pairs = _mm256_set1_epi16(1);
  int64_t total = 0;
  for (int64_t done = 0; done < steps; done += kBurst) {
    const int64_t burst = steps - done < kBurst ? steps - done : kBurst;
    __m256i sums[kSums];
    for (int64_t j = 0; j < kSums; ++j) sums[j] = _mm256_setzero_si256();
    for (int64_t i = 0; i < burst; ++i) {
      for (int64_t j = 0; j < kSums; ++j) {
        __asm__ volatile("" : "+x"(ones));  // otherwise the product is computed once, before the loop
        sums[j] = _mm256_add_epi16(sums[j], _mm256_maddubs_epi16(ones, ones));
      }
    }
    alignas(32) int32_t lanes[8];
    for (int64_t j = 0; j < kSums; ++j) {
      _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), _mm256_madd_epi16(sums[j], pairs));
      for (int32_t lane : lanes) total += lane;
    }
  }
  return total;
}

constexpr ReadMemoryKernel kRead = {Isa::avx2, read_words};
constexpr MultiplyInt8Kernel kMultiply = {Isa::avx2, 32 * kSums, multiply};

}  // namespace

const ReadMemoryKernel* read_memory_avx2() { return &kRead; }
const MultiplyInt8Kernel* multiply_int8_avx2() { return &kMultiply; }

}  // namespace bantamweight
#else
namespace bantamweight {
const ReadMemoryKernel* read_memory_avx2() { return nullptr; }
const MultiplyInt8Kernel* multiply_int8_avx2() { return nullptr; }
}  // namespace bantamweight
#endif
