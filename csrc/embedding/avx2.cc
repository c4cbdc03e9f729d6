// AVX2: half a unit, 8 codes, a step: shifts bring the codes to their lanes, then arithmetic.
//
// 8 codes: 1 broadcast load for two steps, 1 shift, 1 and, 1 conversion, 1 subtraction, 1 product,
// 1 store (3 bits: 1 shift, 1 and, 1 or more). Tables in registers, as AVX-512 has them, would take
// two permutations and a blend at 4 bits, all on one port.
#include "embedding/embedding.h"

#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>

namespace bantamweight {
namespace {

constexpr int64_t kAhead = 2;

inline float float_at(const uint8_t* memory, int64_t i) {
  float value;
  __builtin_memcpy(&value, memory + 4 * i, 4);
  return value;
}

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

template <int kBits, int kHalf>
inline __m256 values_of(const uint8_t* unit, __m256 step, __m256 zero) {
  return _mm256_mul_ps(_mm256_sub_ps(_mm256_cvtepi32_ps(codes_of<kBits, kHalf>(unit)), zero), step);
}

template <int kBits>
void run_bits(const EmbeddingTask& task) {
  for (int64_t i = 0; i < task.count; ++i) {
    if (i + kAhead < task.count) {
      const uint8_t* ahead = task.records + task.index[i + kAhead] * task.record_bytes;
      for (int64_t line = 0; line < task.record_bytes; line += 64) _mm_prefetch(ahead + line, _MM_HINT_T0);
    }
    const uint8_t* scale = task.records + task.index[i] * task.record_bytes;
    const uint8_t* zeros = scale + 4 * task.groups;
    const uint8_t* unit = task.uniform_zero ? zeros : zeros + 4 * task.groups;
    float* y = task.y + i * task.ldy;
    for (int64_t g = 0; g < task.groups; ++g) {
      const __m256 step = _mm256_set1_ps(float_at(scale, g));
      const __m256 zero = _mm256_set1_ps(task.uniform_zero ? task.zero : float_at(zeros, g));
      const int64_t begin = g * task.group_size;
      const int64_t end = task.dim - begin < task.group_size ? task.dim : begin + task.group_size;
      int64_t d = begin;
      for (; d + kUnitCodes <= end; d += kUnitCodes, unit += 2 * kBits) {
        _mm256_storeu_ps(y + d, values_of<kBits, 0>(unit, step, zero));
        _mm256_storeu_ps(y + d + 8, values_of<kBits, 1>(unit, step, zero));
      }
      if (d < end) {
        alignas(32) float last[kUnitCodes];
        _mm256_store_ps(last, values_of<kBits, 0>(unit, step, zero));
        _mm256_store_ps(last + 8, values_of<kBits, 1>(unit, step, zero));
        __builtin_memcpy(y + d, last, static_cast<size_t>(end - d) * sizeof(float));
        unit += 2 * kBits;
      }
    }
  }
}

void run(int bits, const EmbeddingTask& task) {
  switch (bits) {
    case 2:
      return run_bits<2>(task);
    case 3:
      return run_bits<3>(task);
    case 4:
      return run_bits<4>(task);
    default:
      return run_bits<8>(task);
  }
}

constexpr EmbeddingKernel kernel = {Isa::avx2, run};

}  // namespace

const EmbeddingKernel* embedding_kernel_avx2() { return &kernel; }

}  // namespace bantamweight

#else

namespace bantamweight {
const EmbeddingKernel* embedding_kernel_avx2() { return nullptr; }
}  // namespace bantamweight

#endif
