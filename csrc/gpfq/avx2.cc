// AVX2: four rows by two registers, eight accumulators.
#include "gpfq/gpfq.h"

#if defined(__AVX2__) && defined(__FMA__)
#include "gpfq/block.h"
#include "runtime/floats_avx2.h"

namespace bantamweight {
namespace {

struct Lanes : Floats {
  static inline void store_codes(uint8_t* to, Vector codes, Part part) {
    alignas(32) int32_t words[kLanes];
    _mm256_store_si256(reinterpret_cast<__m256i*>(words), _mm256_cvttps_epi32(codes));
    for (int64_t i = 0; i < part.count; ++i) to[i] = static_cast<uint8_t>(words[i]);
  }

  static inline Vector floor(Vector v) { return _mm256_floor_ps(v); }
  static inline Vector with_sign_of(Vector magnitude, Vector sign) {
    return _mm256_or_ps(magnitude, _mm256_and_ps(sign, all(-0.0f)));
  }
  static inline Vector where_larger(Vector a, Vector b, Vector value) {
    return _mm256_and_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ), value);
  }

  static inline __m256i words(uint32_t x) { return _mm256_set1_epi32(static_cast<int>(x)); }
  static inline __m256i shifted_in(__m256i x, int by) { return _mm256_xor_si256(x, _mm256_srli_epi32(x, by)); }
  static inline Vector uniform(uint32_t key, int64_t column) {  // gpfq_mix, eight columns at a time
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i counter = _mm256_add_epi32(words(static_cast<uint32_t>(column)), lane);
    __m256i x = _mm256_add_epi32(words(key), _mm256_mullo_epi32(counter, words(kGpfqColumnStride)));
    x = _mm256_mullo_epi32(shifted_in(x, 16), words(0x85ebca6bu));
    x = _mm256_mullo_epi32(shifted_in(x, 13), words(0xc2b2ae35u));
    x = _mm256_srli_epi32(shifted_in(x, 16), 8);
    return multiply(_mm256_cvtepi32_ps(x), all(1.0f / 16777216.0f));
  }
};

constexpr GpfqKernel kernel = {Isa::avx2, gpfq_run<Lanes, 4, 2>};

}  // namespace

const GpfqKernel* gpfq_kernel_avx2() { return &kernel; }

}  // namespace bantamweight

#else

namespace bantamweight {
const GpfqKernel* gpfq_kernel_avx2() { return nullptr; }
}  // namespace bantamweight

#endif
