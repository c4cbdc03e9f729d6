// AVX-512: eight rows by two registers, sixteen accumulators; a run of columns is a whole slice.
#include "gpfq/gpfq.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__)
#include "gpfq/block.h"
#include "runtime/floats_avx512.h"

namespace bantamweight {
namespace {

struct Lanes : Floats {
  static inline void store_codes(uint8_t* to, Vector codes, Part part) {
    _mm512_mask_cvtepi32_storeu_epi8(to, part, _mm512_cvttps_epi32(codes));
  }

  static inline Vector floor(Vector v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
  static inline Vector with_sign_of(Vector magnitude, Vector sign) {
    return _mm512_or_ps(magnitude, _mm512_and_ps(sign, all(-0.0f)));
  }
  static inline Vector where_larger(Vector a, Vector b, Vector value) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), value);
  }

  static inline __m512i words(uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
  static inline __m512i shifted_in(__m512i x, unsigned by) { return _mm512_xor_si512(x, _mm512_srli_epi32(x, by)); }
  static inline Vector uniform(uint32_t key, int64_t column) {  // gpfq_mix, sixteen columns at a time
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i counter = _mm512_add_epi32(words(static_cast<uint32_t>(column)), lane);
    __m512i x = _mm512_add_epi32(words(key), _mm512_mullo_epi32(counter, words(kGpfqColumnStride)));
    x = _mm512_mullo_epi32(shifted_in(x, 16), words(0x85ebca6bu));
    x = _mm512_mullo_epi32(shifted_in(x, 13), words(0xc2b2ae35u));
    x = _mm512_srli_epi32(shifted_in(x, 16), 8);
    return multiply(_mm512_cvtepi32_ps(x), all(1.0f / 16777216.0f));
  }
};

constexpr GpfqKernel kernel = {Isa::avx512, gpfq_run<Lanes, 8, 2>};

}  // namespace

const GpfqKernel* gpfq_kernel_avx512() { return &kernel; }

}  // namespace bantamweight

#else

namespace bantamweight {
const GpfqKernel* gpfq_kernel_avx512() { return nullptr; }
}  // namespace bantamweight

#endif
