// AVX2: 32 contiguous floats to 32 codes in 4 multiplies, 4 conversions, 3 packs and a permute;
// channel planes in tiles of 8 pixels by 16 channels, transposed in registers.
#include "quantize_images/quantize_images.h"

#if defined(__AVX2__)
#include "runtime/floats_avx2.h"
#include "runtime/largest_magnitude.h"

namespace bantamweight {
namespace {

// Conversions follow the control register's rounding, which is to nearest, ties to even.
__m256i to_codes(const float* x, __m256 to_code) {
  return _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x), to_code));
}

int8_t to_code_of(float x, float to_code) { return static_cast<int8_t>(_mm_cvtss_si32(_mm_set_ss(x * to_code))); }

uint32_t absmax_bits(const float* x, int64_t count) {
  const float largest = largest_magnitude<Floats>(x, count);
  uint32_t bits;
  __builtin_memcpy(&bits, &largest, sizeof bits);
  return bits;
}

void quantize_run(const float* x, int64_t count, float to_code, int8_t* q) {
  const __m256 factor = _mm256_set1_ps(to_code);
  // Packing works within 128-bit lanes; this puts the dwords back in order.
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  int64_t i = 0;
  for (; i + 32 <= count; i += 32) {
    const __m256i low = _mm256_packs_epi32(to_codes(x + i, factor), to_codes(x + i + 8, factor));
    const __m256i high = _mm256_packs_epi32(to_codes(x + i + 16, factor), to_codes(x + i + 24, factor));
    const __m256i packed = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(q + i), packed);
  }
  for (; i < count; ++i) q[i] = to_code_of(x[i], to_code);
}

// Byte j of dword w is channel first + j of pixel w, zero for channels from `count` on.
__m256i four_channels(const ImageRow& row, const float* x, int64_t count, __m256 factor) {
  __m256i codes[4];
  for (int j = 0; j < 4; ++j) codes[j] = j < count ? to_codes(x + j * row.stride_c, factor) : _mm256_setzero_si256();
  // Bytes 0 and 2, then 1 and 3, of every dword.
  const __m256i even = _mm256_blend_epi16(codes[0], _mm256_slli_epi32(codes[2], 16), 0xaa);
  const __m256i odd = _mm256_blend_epi16(_mm256_slli_epi32(codes[1], 8), _mm256_slli_epi32(codes[3], 24), 0xaa);
  return _mm256_blendv_epi8(even, odd, _mm256_set1_epi16(static_cast<int16_t>(0xff00)));
}

void store_channels(__m128i channels, int64_t depth, int8_t* q) {
  if (depth >= 16) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(q), channels);
    return;
  }
  int8_t bytes[16];
  _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes), channels);
  __builtin_memcpy(q, bytes, static_cast<unsigned long>(depth));
}

// 8 pixels by 16 channels, or the first `depth` of them.
void transpose_tile(const ImageRow& row, const float* x, int64_t depth, __m256 factor, int8_t* q) {
  __m256i d[4];
  for (int j = 0; j < 4; ++j) d[j] = four_channels(row, x + 4 * j * row.stride_c, depth - 4 * j, factor);
  const __m256i a = _mm256_unpacklo_epi32(d[0], d[1]), b = _mm256_unpackhi_epi32(d[0], d[1]);
  const __m256i c = _mm256_unpacklo_epi32(d[2], d[3]), e = _mm256_unpackhi_epi32(d[2], d[3]);
  // Lane l of tile[i] is pixel 4 l + i.
  const __m256i tile[4] = {_mm256_unpacklo_epi64(a, c), _mm256_unpackhi_epi64(a, c), _mm256_unpacklo_epi64(b, e),
                           _mm256_unpackhi_epi64(b, e)};
  for (int i = 0; i < 4; ++i) {
    store_channels(_mm256_castsi256_si128(tile[i]), depth, q + i * row.channels);
    store_channels(_mm256_extracti128_si256(tile[i], 1), depth, q + (4 + i) * row.channels);
  }
}

void quantize_pixels_one_by_one(const ImageRow& row, int64_t first) {
  for (int64_t w = first; w < row.width; ++w) {
    for (int64_t c = 0; c < row.channels; ++c) {
      row.q[w * row.channels + c] = to_code_of(row.x[c * row.stride_c + w * row.stride_w], row.to_code);
    }
  }
}

void quantize_row(const ImageRow& row) {
  const bool one_channel = row.channels == 1 && row.stride_w == 1;
  if (one_channel || (row.stride_c == 1 && row.stride_w == row.channels)) {
    quantize_run(row.x, row.width * row.channels, row.to_code, row.q);
  } else if (row.stride_c == 1) {
    for (int64_t w = 0; w < row.width; ++w) {
      quantize_run(row.x + w * row.stride_w, row.channels, row.to_code, row.q + w * row.channels);
    }
  } else if (row.stride_w == 1) {
    const __m256 factor = _mm256_set1_ps(row.to_code);
    int64_t w = 0;
    for (; w + 8 <= row.width; w += 8) {
      for (int64_t c = 0; c < row.channels; c += 16) {
        transpose_tile(row, row.x + c * row.stride_c + w, row.channels - c, factor, row.q + w * row.channels + c);
      }
    }
    quantize_pixels_one_by_one(row, w);
  } else {
    quantize_pixels_one_by_one(row, 0);
  }
}

void sum_slices(const int8_t* q, int64_t count, int64_t stride, int64_t slice_size, int32_t* sums, int64_t sum_stride) {
  const __m128i ones8 = _mm_set1_epi8(1), ones16 = _mm_set1_epi16(1);
  for (int64_t i = 0; i < count; ++i, q += stride) {
    __m128i sum = _mm_setzero_si128();
    int64_t c = 0;
    for (; c + 16 <= slice_size; c += 16) {
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(q + c));
      sum = _mm_add_epi32(sum, _mm_madd_epi16(_mm_maddubs_epi16(ones8, bytes), ones16));
    }
    sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4e));
    int32_t total = _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xb1)));
    for (; c < slice_size; ++c) total += q[c];
    sums[i * sum_stride] = total;
  }
}

constexpr QuantizeImagesKernel kernel = {Isa::avx2, absmax_bits, quantize_row, sum_slices};

}  // namespace

const QuantizeImagesKernel* quantize_images_avx2() { return &kernel; }

}  // namespace bantamweight

#else
namespace bantamweight {
const QuantizeImagesKernel* quantize_images_avx2() { return nullptr; }
}  // namespace bantamweight
#endif
