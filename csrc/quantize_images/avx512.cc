// AVX-512: 64 contiguous floats to 64 codes in 4 multiplies, 4 conversions, 3 packs and a permute;
// channel planes in tiles of 16 pixels by 16 channels, transposed in registers (0.4 instructions an
// element).
#include "quantize_images/quantize_images.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#include "runtime/floats_avx512.h"
#include "runtime/largest_magnitude.h"

namespace bantamweight {
namespace {

constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

__m512i to_codes(__m512 x, __m512 to_code) { return _mm512_cvt_roundps_epi32(_mm512_mul_ps(x, to_code), kNearest); }

uint32_t absmax_bits(const float* x, int64_t count) {
  const float largest = largest_magnitude<Floats>(x, count);
  uint32_t bits;
  __builtin_memcpy(&bits, &largest, sizeof bits);
  return bits;
}

void quantize_run(const float* x, int64_t count, float to_code, int8_t* q) {
  const __m512 factor = _mm512_set1_ps(to_code);
  // Packing works within 128-bit lanes; this puts the dwords back in order.
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  int64_t i = 0;
  for (; i + 64 <= count; i += 64) {
    const __m512i a = to_codes(_mm512_loadu_ps(x + i), factor), b = to_codes(_mm512_loadu_ps(x + i + 16), factor);
    const __m512i c = to_codes(_mm512_loadu_ps(x + i + 32), factor), d = to_codes(_mm512_loadu_ps(x + i + 48), factor);
    const __m512i packed = _mm512_packs_epi16(_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d));
    _mm512_storeu_si512(q + i, _mm512_permutexvar_epi32(order, packed));
  }
  for (; i < count; i += 16) {
    const __mmask16 lanes = Floats::part(count - i);
    const __m512i codes = to_codes(_mm512_maskz_loadu_ps(lanes, x + i), factor);
    _mm_mask_storeu_epi8(q + i, lanes, _mm512_cvtepi32_epi8(codes));
  }
}

// Byte j of dword w is channel first + j of pixel w, zero for channels from `count` on.
__m512i four_channels(const ImageRow& row, const float* x, int64_t count, __mmask16 pixels, __m512 factor) {
  __m512i codes[4];
  for (int j = 0; j < 4; ++j) {
    codes[j] =
        j < count ? to_codes(_mm512_maskz_loadu_ps(pixels, x + j * row.stride_c), factor) : _mm512_setzero_si512();
  }
  const __m512i low = _mm512_mask_blend_epi8(0x2222222222222222u, codes[0], _mm512_slli_epi32(codes[1], 8));
  const __m512i high =
      _mm512_mask_blend_epi8(0x8888888888888888u, _mm512_slli_epi32(codes[2], 16), _mm512_slli_epi32(codes[3], 24));
  return _mm512_mask_blend_epi16(0xaaaaaaaau, low, high);
}

template <int lane>
void store_lane(__m512i tile, int8_t* q, __mmask16 bytes) {
  _mm_mask_storeu_epi8(q, bytes, _mm512_extracti32x4_epi32(tile, lane));
}

// 16 pixels (or the first `width` of them) by 16 channels (or the first `depth`).
void transpose_tile(const ImageRow& row, const float* x, int64_t depth, int64_t width, __m512 factor, int8_t* q) {
  const __mmask16 pixels = Floats::part(width), bytes = Floats::part(depth);
  __m512i d[4];
  for (int j = 0; j < 4; ++j) d[j] = four_channels(row, x + 4 * j * row.stride_c, depth - 4 * j, pixels, factor);
  const __m512i a = _mm512_unpacklo_epi32(d[0], d[1]), b = _mm512_unpackhi_epi32(d[0], d[1]);
  const __m512i c = _mm512_unpacklo_epi32(d[2], d[3]), e = _mm512_unpackhi_epi32(d[2], d[3]);
  // Lane l of tile[i] is pixel 4 l + i.
  const __m512i tile[4] = {_mm512_unpacklo_epi64(a, c), _mm512_unpackhi_epi64(a, c), _mm512_unpacklo_epi64(b, e),
                           _mm512_unpackhi_epi64(b, e)};
  for (int64_t i = 0; i < 4 && i < width; ++i) {
    const int64_t step = 4 * row.channels;
    int8_t* to = q + i * row.channels;
    store_lane<0>(tile[i], to, bytes);
    if (i + 4 < width) store_lane<1>(tile[i], to + step, bytes);
    if (i + 8 < width) store_lane<2>(tile[i], to + 2 * step, bytes);
    if (i + 12 < width) store_lane<3>(tile[i], to + 3 * step, bytes);
  }
}

// Three planes, as every colour image has them, to 48 bytes at a time.
void interleave_three(const ImageRow& row, __m512 factor) {
  const __m512i drop_fourth =
      _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1));
  const __m512i close_up = _mm512_setr_epi32(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, 15, 15, 15, 15);
  for (int64_t w = 0; w < row.width; w += 16) {
    const int64_t width = row.width - w < 16 ? row.width - w : 16;
    const __m512i pixels = four_channels(row, row.x + w, 3, Floats::part(width), factor);
    const __m512i bytes = _mm512_permutexvar_epi32(close_up, _mm512_shuffle_epi8(pixels, drop_fourth));
    _mm512_mask_storeu_epi8(row.q + 3 * w, (__mmask64{1} << (3 * width)) - 1, bytes);
  }
}

void quantize_row(const ImageRow& row) {
  const __m512 factor = _mm512_set1_ps(row.to_code);
  const bool one_channel = row.channels == 1 && row.stride_w == 1;
  if (one_channel || (row.stride_c == 1 && row.stride_w == row.channels)) {
    quantize_run(row.x, row.width * row.channels, row.to_code, row.q);
  } else if (row.stride_c == 1) {
    for (int64_t w = 0; w < row.width; ++w) {
      quantize_run(row.x + w * row.stride_w, row.channels, row.to_code, row.q + w * row.channels);
    }
  } else if (row.stride_w == 1 && row.channels == 3) {
    interleave_three(row, factor);
  } else if (row.stride_w == 1) {
    for (int64_t w = 0; w < row.width; w += 16) {
      for (int64_t c = 0; c < row.channels; c += 16) {
        transpose_tile(row, row.x + c * row.stride_c + w, row.channels - c, row.width - w, factor,
                       row.q + w * row.channels + c);
      }
    }
  } else {
    for (int64_t w = 0; w < row.width; ++w) {
      for (int64_t c = 0; c < row.channels; ++c) {
        quantize_run(row.x + c * row.stride_c + w * row.stride_w, 1, row.to_code, row.q + w * row.channels + c);
      }
    }
  }
}

// Sums of four bytes each.
__m512i sum_quads(const int8_t* q, __mmask64 bytes) {
  const __m512i pairs = _mm512_maddubs_epi16(_mm512_set1_epi8(1), _mm512_maskz_loadu_epi8(bytes, q));
  return _mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
}

__m512i sum_slice(const int8_t* q, int64_t slice_size) {
  __m512i sum = _mm512_setzero_si512();
  for (; slice_size >= 64; slice_size -= 64, q += 64) sum = _mm512_add_epi32(sum, sum_quads(q, ~__mmask64{0}));
  if (slice_size > 0) sum = _mm512_add_epi32(sum, sum_quads(q, (__mmask64{1} << slice_size) - 1));
  return sum;
}

// Dword j of each 128-bit lane: the sum of that lane of a, b, c or d.
__m512i sum_lanes(__m512i a, __m512i b, __m512i c, __m512i d) {
  const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
  return _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
}

// The sums of a, b, c and d.
__m128i reduce_four(__m512i a, __m512i b, __m512i c, __m512i d) {
  const __m512i lanes = sum_lanes(a, b, c, d);
  const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(lanes), _mm512_extracti64x4_epi64(lanes, 1));
  return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

// Sixteen slices of sixteen bytes that follow one another.
__m512i sum_sixteen_slices(const int8_t* q) {
  const __mmask64 all = ~__mmask64{0};
  const __m512i lanes =
      sum_lanes(sum_quads(q, all), sum_quads(q + 64, all), sum_quads(q + 128, all), sum_quads(q + 192, all));
  return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), lanes);
}

void sum_slices(const int8_t* q, int64_t count, int64_t stride, int64_t slice_size, int32_t* sums, int64_t sum_stride) {
  int64_t i = 0;
  if (slice_size == 16 && stride == 16 && sum_stride == 1) {
    for (; i + 16 <= count; i += 16, q += 256) _mm512_storeu_si512(sums + i, sum_sixteen_slices(q));
  }
  for (; i + 4 <= count; i += 4, q += 4 * stride) {
    alignas(16) int32_t four[4];
    _mm_store_si128(reinterpret_cast<__m128i*>(four),
                    reduce_four(sum_slice(q, slice_size), sum_slice(q + stride, slice_size),
                                sum_slice(q + 2 * stride, slice_size), sum_slice(q + 3 * stride, slice_size)));
    for (int64_t j = 0; j < 4; ++j) sums[(i + j) * sum_stride] = four[j];
  }
  for (; i < count; ++i, q += stride) sums[i * sum_stride] = _mm512_reduce_add_epi32(sum_slice(q, slice_size));
}

constexpr QuantizeImagesKernel kernel = {Isa::avx512, absmax_bits, quantize_row, sum_slices};

}  // namespace

const QuantizeImagesKernel* quantize_images_avx512() { return &kernel; }

}  // namespace bantamweight

#else
namespace bantamweight {
const QuantizeImagesKernel* quantize_images_avx512() { return nullptr; }
}  // namespace bantamweight
#endif
