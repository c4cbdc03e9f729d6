// AVX-512: a code is an index into a register that holds the values of its group.
//
// 16 codes at 2 and 4 bits: 1 broadcast load, 1 shift, 1 permutation, 1 store; the permutation reads
// only the low four bits of a lane, so nothing is masked. At 3 bits a second permutation writes the
// lanes whose third bit is set. At 8 bits 1 widening load, 1 conversion, 1 subtraction, 1 product.
// Bound by the stores (4 bytes out for at most 1 in) and, for tables beyond the caches, by the
// latency of a row's lines: rows are prefetched kAhead lookups before their use. Stores past the
// caches were tried: no gain for an output of 12 MB, and the next layer would read it from memory.
#include "embedding/embedding.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#include <immintrin.h>

#include "embedding/gather.h"

namespace bantamweight {
namespace {

// The values of one group: those of codes 0 .. 15 (repeated below 4 bits), or its step and zero.
template <int kBits>
struct Values {
  __m512 low, high;  // 8 bits: zero and step; 3 bits: codes 0 .. 3 and 4 .. 7; else only low is used

  Values(float step, float zero) {
    if constexpr (kBits == 8) {
      low = _mm512_set1_ps(zero);
      high = _mm512_set1_ps(step);
    } else {
      const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
      const __m512i codes = kBits == 4 ? lanes : _mm512_and_si512(lanes, _mm512_set1_epi32(3));
      const __m512 base = _mm512_sub_ps(_mm512_cvtepi32_ps(codes), _mm512_set1_ps(zero));
      low = _mm512_mul_ps(base, _mm512_set1_ps(step));
      if constexpr (kBits == 3) {
        const __m512i upper = _mm512_add_epi32(codes, _mm512_set1_epi32(4));
        const __m512 base_upper = _mm512_sub_ps(_mm512_cvtepi32_ps(upper), _mm512_set1_ps(zero));
        high = _mm512_mul_ps(base_upper, _mm512_set1_ps(step));
      }
    }
  }

  __m512 of(const uint8_t* unit) const {
    const __m512i twos = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    if constexpr (kBits == 2 || kBits == 3) {
      int32_t word;
      __builtin_memcpy(&word, unit, 4);
      const __m512i codes = _mm512_srlv_epi32(_mm512_set1_epi32(word), twos);
      const __m512 values = _mm512_permutexvar_ps(codes, low);
      if constexpr (kBits == 2) return values;
      uint16_t third;
      __builtin_memcpy(&third, unit + 4, 2);
      return _mm512_mask_permutexvar_ps(values, third, codes, high);
    } else if constexpr (kBits == 4) {
      int64_t word;
      __builtin_memcpy(&word, unit, 8);
      const __m512i fours = _mm512_setr_epi64(0, 4, 8, 12, 16, 20, 24, 28);
      return _mm512_permutexvar_ps(_mm512_srlv_epi64(_mm512_set1_epi64(word), fours), low);
    } else {
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(unit));
      return _mm512_mul_ps(_mm512_sub_ps(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes)), low), high);
    }
  }

  void store(const uint8_t* unit, float* y) const { _mm512_storeu_ps(y, of(unit)); }

  void store_part(const uint8_t* unit, float* y, int64_t count) const {
    _mm512_mask_storeu_ps(y, static_cast<__mmask16>((1u << count) - 1), of(unit));
  }
};

constexpr EmbeddingKernel kernel = {Isa::avx512, gather<Values>};

}  // namespace

const EmbeddingKernel* embedding_kernel_avx512() { return &kernel; }

}  // namespace bantamweight

#else

namespace bantamweight {
const EmbeddingKernel* embedding_kernel_avx512() { return nullptr; }
}  // namespace bantamweight

#endif
