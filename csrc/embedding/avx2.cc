// AVX2: half a unit, 8 codes, a step: shifts bring the codes to their lanes, then arithmetic.
//
// 8 codes: 1 broadcast load for two steps, 1 shift, 1 and, 1 conversion, 1 subtraction, 1 product,
// 1 store (3 bits: 1 shift, 1 and, 1 or more). Tables in registers, as AVX-512 has them, would take
// two permutations and a blend at 4 bits, all on one port.
#include "embedding/embedding.h"

#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>

#include "embedding/gather.h"

namespace bantamweight {
namespace {

// Codes 8 * kHalf .. 8 * kHalf + 7 of a unit.
template <int kBits, int kHalf>
inline __m256i codes_of(const uint8_t* unit) {
  if constexpr (kBits == 2 || kBits == 3) {
    int32_t word;
    __builtin_memcpy(&word, unit, 4);
    const __m256i twos = _mm256_add_epi32(_mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14), _mm256_set1_epi32(16 * kHalf));
    const __m256i low = _mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32(word), twos), _mm256_set1_epi32(3));
    if constexpr (kBits == 2) return low;
    // The byte of this half starts at bit 2, so that lane i brings bit i of it down to bit 2.
    const __m256i third = _mm256_set1_epi32(unit[4 + kHalf] << 2);
    const __m256i ones = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_or_si256(low, _mm256_and_si256(_mm256_srlv_epi32(third, ones), _mm256_set1_epi32(4)));
  } else if constexpr (kBits == 4) {
    int64_t word;
    __builtin_memcpy(&word, unit, 8);
    const __m256i fours = _mm256_setr_epi64x(16 * kHalf, 16 * kHalf + 4, 16 * kHalf + 8, 16 * kHalf + 12);
    return _mm256_and_si256(_mm256_srlv_epi64(_mm256_set1_epi64x(word), fours), _mm256_set1_epi32(15));
  } else {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(unit + 8 * kHalf)));
  }
}

template <int kBits>
struct Values {
  __m256 step, zero;

  Values(float step, float zero) : step(_mm256_set1_ps(step)), zero(_mm256_set1_ps(zero)) {}

  template <int kHalf>
  __m256 half(const uint8_t* unit) const {
    return _mm256_mul_ps(_mm256_sub_ps(_mm256_cvtepi32_ps(codes_of<kBits, kHalf>(unit)), zero), step);
  }

  void store(const uint8_t* unit, float* y) const {
    _mm256_storeu_ps(y, half<0>(unit));
    _mm256_storeu_ps(y + 8, half<1>(unit));
  }

  void store_part(const uint8_t* unit, float* y, int64_t count) const {
    float last[kUnitCodes];
    store(unit, last);
    __builtin_memcpy(y, last, static_cast<size_t>(count) * sizeof(float));
  }
};

constexpr EmbeddingKernel kernel = {Isa::avx2, gather<Values>};

}  // namespace

const EmbeddingKernel* embedding_kernel_avx2() { return &kernel; }

}  // namespace bantamweight

#else

namespace bantamweight {
const EmbeddingKernel* embedding_kernel_avx2() { return nullptr; }
}  // namespace bantamweight

#endif
