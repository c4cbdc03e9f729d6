// AVX-512: 16 elements a vector.
#include "code_maps/code_maps.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#include "code_maps/rows.h"
#include "runtime/floats_avx512.h"

namespace bantamweight {
namespace {

struct Codes {
  static inline __m512 load(const int8_t* from) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
  }
  static inline void store(int8_t* to, __m512 v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(v)));
  }

  static constexpr int64_t kBytes = 64;
  static inline __m512i load_bytes(const int8_t* from) { return _mm512_loadu_si512(from); }
  static inline void store_bytes(int8_t* to, __m512i v) { _mm512_storeu_si512(to, v); }
  static inline __m512i larger(__m512i a, __m512i b) { return _mm512_max_epi8(a, b); }
};

constexpr CodeMapsKernel kernel = {Isa::avx512, to_codes<Floats, Codes>, to_floats<Floats, Codes>, largest<Codes>};

}  // namespace

const CodeMapsKernel* code_maps_avx512() { return &kernel; }

}  // namespace bantamweight

#else

namespace bantamweight {
const CodeMapsKernel* code_maps_avx512() { return nullptr; }
}  // namespace bantamweight

#endif
