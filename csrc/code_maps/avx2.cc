// AVX2: 8 elements a vector.
#include "code_maps/code_maps.h"

#if defined(__AVX2__) && defined(__FMA__)
#include "code_maps/rows.h"
#include "runtime/floats_avx2.h"

namespace bantamweight {
namespace {

struct Codes {
  static inline __m256 load(const int8_t* from) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
  }
  static inline void store(int8_t* to, __m256 v) {
    const __m256i wide = _mm256_cvtps_epi32(v);
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packs_epi16(words, words));
  }

  static constexpr int64_t kBytes = 32;
  static inline __m256i load_bytes(const int8_t* from) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  }
  static inline void store_bytes(int8_t* to, __m256i v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), v); }
  static inline __m256i larger(__m256i a, __m256i b) { return _mm256_max_epi8(a, b); }
};

constexpr CodeMapsKernel kernel = {Isa::avx2, to_codes<Floats, Codes>, to_floats<Floats, Codes>, largest<Codes>};

}  // namespace

const CodeMapsKernel* code_maps_avx2() { return &kernel; }

}  // namespace bantamweight

#else

namespace bantamweight {
const CodeMapsKernel* code_maps_avx2() { return nullptr; }
}  // namespace bantamweight

#endif
