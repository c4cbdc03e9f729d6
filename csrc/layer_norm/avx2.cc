// AVX2: 32 elements a step in four vectors; the last n % 32 one by one, each in its lane.
#include "layer_norm/layer_norm.h"

#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>

namespace bantamweight {
namespace {

constexpr int kVectors = 4, kLanes = 8;

inline float fold(float* lanes) {
  for (int half = kVectors * kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

void run(const LayerNormArgs& args) {
  const int64_t n = args.n, whole = n / kNormLanes * kNormLanes;
  const auto size = static_cast<float>(n);
  const float *weight = args.norm.weight, *bias = args.norm.bias;
  for (int64_t r = 0; r < args.m; ++r) {
    const float* x = args.x + r * args.ldx;
    const float* residual = args.residual == nullptr ? nullptr : args.residual + r * args.ldr;
    float* y = args.y + r * args.ldy;
    alignas(32) float lanes[kNormLanes];
    __m256 s[kVectors];

    for (int j = 0; j < kVectors; ++j) s[j] = _mm256_setzero_ps();
    for (int64_t i = 0; i < whole; i += kNormLanes) {
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) {
        const int64_t at = i + kLanes * j;
        __m256 z = _mm256_loadu_ps(x + at);
        if (residual != nullptr) z = _mm256_add_ps(z, _mm256_loadu_ps(residual + at));
        _mm256_storeu_ps(y + at, z);
        s[j] = _mm256_add_ps(s[j], z);
      }
    }
    for (int j = 0; j < kVectors; ++j) _mm256_store_ps(lanes + kLanes * j, s[j]);
    for (int64_t i = whole; i < n; ++i) {
      y[i] = residual == nullptr ? x[i] : x[i] + residual[i];
      lanes[i - whole] += y[i];
    }
    const float mean = fold(lanes) / size;
    const __m256 means = _mm256_set1_ps(mean);

    for (int j = 0; j < kVectors; ++j) s[j] = _mm256_setzero_ps();
    for (int64_t i = 0; i < whole; i += kNormLanes) {
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) {
        const __m256 d = _mm256_sub_ps(_mm256_loadu_ps(y + i + kLanes * j), means);
        s[j] = _mm256_fmadd_ps(d, d, s[j]);
      }
    }
    for (int j = 0; j < kVectors; ++j) _mm256_store_ps(lanes + kLanes * j, s[j]);
    for (int64_t i = whole; i < n; ++i) {
      const float d = y[i] - mean;
      lanes[i - whole] = __builtin_fmaf(d, d, lanes[i - whole]);
    }
    const __m128 variance = _mm_set_ss(fold(lanes) / size + args.norm.eps);
    const float inverse = 1.0f / _mm_cvtss_f32(_mm_sqrt_ss(variance));
    const __m256 inverses = _mm256_set1_ps(inverse);

    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
      const __m256 w = weight == nullptr ? _mm256_set1_ps(1.0f) : _mm256_loadu_ps(weight + i);
      const __m256 b = bias == nullptr ? _mm256_setzero_ps() : _mm256_loadu_ps(bias + i);
      const __m256 d = _mm256_sub_ps(_mm256_loadu_ps(y + i), means);
      _mm256_storeu_ps(y + i, _mm256_fmadd_ps(_mm256_mul_ps(d, inverses), w, b));
    }
    for (; i < n; ++i) {
      const float w = weight == nullptr ? 1.0f : weight[i], b = bias == nullptr ? 0.0f : bias[i];
      y[i] = __builtin_fmaf((y[i] - mean) * inverse, w, b);
    }
  }
}

constexpr LayerNormKernel kernel = {Isa::avx2, run};

}  // namespace

const LayerNormKernel* layer_norm_avx2() { return &kernel; }

}  // namespace bantamweight

#else

namespace bantamweight {
const LayerNormKernel* layer_norm_avx2() { return nullptr; }
}  // namespace bantamweight

#endif
