// The obvious loops: the oracle of every other variant.
#include <cmath>
#include <cstring>
#include <limits>

#include "attention/attention.h"
#include "attention/exponential.h"
#include "runtime/fold.h"

namespace bantamweight {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

float exponential(float x) {
  x = x > kExpLowest ? x : kExpLowest;
  const float shifted = std::fma(x, kLog2E, kRoundToExponent), n = shifted - kRoundToExponent;
  const float r = std::fma(-n, kLn2Low, std::fma(-n, kLn2High, x));
  float p = kExpPolynomial[0];
  for (int i = 1; i < 6; ++i) p = std::fma(p, r, kExpPolynomial[i]);
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits <<= 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return (std::fma(p, r * r, r) + 1.0f) * power;
}

bool run(const AttentionTask& task) {
  float* scores = task.scratch;
  for (int64_t i = 0; i < task.queries; ++i) {
    float largest = -kInfinity;
    for (int64_t j = 0; j < task.keys; ++j) {
      float score = 0.0f;
      for (int64_t e = 0; e < task.head_size; ++e) {
        score = std::fma(task.q[i * task.ldq + e], task.k[j * task.ldk + e], score);
      }
      if (!std::isfinite(score)) return false;
      const float mask = task.mask == nullptr ? 0.0f : task.mask[i * task.ldm + j];
      if (!(mask < kInfinity)) return false;
      scores[j] = std::fma(score, task.scale, mask);
      largest = scores[j] > largest ? scores[j] : largest;
    }
    float lanes[kAttentionLanes] = {};
    for (int64_t j = 0; j < task.keys && largest > -kInfinity; ++j) {
      scores[j] = exponential(scores[j] - largest);
      lanes[j % kAttentionLanes] += scores[j];
    }
    const float inverse = 1.0f / fold_lanes<kAttentionLanes>(lanes);
    for (int64_t e = 0; e < task.head_size; ++e) {
      float out = 0.0f;
      for (int64_t j = 0; j < task.keys; ++j) out = std::fma(scores[j], task.v[j * task.ldv + e], out);
      task.out[i * task.ldo + e] = largest > -kInfinity ? out * inverse : 0.0f;
    }
  }
  return true;
}

int64_t scratch_floats(int64_t keys, int64_t) { return keys; }

constexpr AttentionKernel kernel = {Isa::reference, scratch_floats, run};

}  // namespace

const AttentionKernel* attention_reference() { return &kernel; }

}  // namespace bantamweight
