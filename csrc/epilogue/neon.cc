// NEON: 4 elements a vector; the operations of avx512.cc. minnm and maxnm return the number beside a
// NaN, as the comparisons of the reference do.
#include "epilogue/epilogue.h"

#if defined(__aarch64__)
#include <arm_neon.h>

namespace bantamweight {
namespace {

template <int kDegree>
inline float32x4_t gelu(float32x4_t y, const float* coefficients, float end) {
  const float32x4_t a = vminnmq_f32(vabsq_f32(y), vdupq_n_f32(end));
  float32x4_t p = vdupq_n_f32(coefficients[kDegree]);
#pragma GCC unroll 8
  for (int i = kDegree - 1; i >= 0; --i) p = vfmaq_f32(vdupq_n_f32(coefficients[i]), p, a);
  const float32x4_t p2 = vmulq_f32(p, p), p4 = vmulq_f32(p2, p2);
  return vfmsq_f32(vmaxnmq_f32(y, vdupq_n_f32(0.0f)), vmulq_f32(p4, p4), a);
}

template <Activation kActivation>
inline float32x4_t activate(float32x4_t y) {
  if constexpr (kActivation == Activation::relu) return vmaxnmq_f32(y, vdupq_n_f32(0.0f));
  if constexpr (kActivation == Activation::gelu) return gelu<kGeluDegree>(y, kGelu, kGeluEnd);
  if constexpr (kActivation == Activation::gelu_tanh) return gelu<kGeluTanhDegree>(y, kGeluTanh, kGeluTanhEnd);
  return y;
}

template <Activation kActivation, bool kResidual>
void run_as(const EpilogueArgs& args) {
  for (int64_t r = 0; r < args.m; ++r) {
    float* y = args.y + r * args.ldy;
    const float* residual = kResidual ? args.epilogue.residual + r * args.epilogue.ldr : y;
    const auto step = [](float* to, const float* add) __attribute__((always_inline)) {
      float32x4_t out = activate<kActivation>(vld1q_f32(to));
      if constexpr (kResidual) out = vaddq_f32(out, vld1q_f32(add));
      vst1q_f32(to, out);
    };
    int64_t i = 0;
    for (; i + 16 <= args.n; i += 16) {
#pragma GCC unroll 4
      for (int64_t j = 0; j < 16; j += 4) step(y + i + j, residual + i + j);
    }
    for (; i + 4 <= args.n; i += 4) step(y + i, residual + i);
    if (i < args.n) {
      float tail[4] = {}, tail_residual[4] = {};
      for (int64_t j = i; j < args.n; ++j) {
        tail[j - i] = y[j];
        tail_residual[j - i] = residual[j];
      }
      step(tail, tail_residual);
      for (int64_t j = i; j < args.n; ++j) y[j] = tail[j - i];
    }
  }
}

template <Activation kActivation>
void run_activation(const EpilogueArgs& args) {
  if (args.epilogue.residual != nullptr)
    run_as<kActivation, true>(args);
  else
    run_as<kActivation, false>(args);
}

void run(const EpilogueArgs& args) {
  switch (args.epilogue.activation) {
    case Activation::none:
      if (args.epilogue.residual != nullptr) run_as<Activation::none, true>(args);
      return;
    case Activation::relu:
      return run_activation<Activation::relu>(args);
    case Activation::gelu:
      return run_activation<Activation::gelu>(args);
    case Activation::gelu_tanh:
      return run_activation<Activation::gelu_tanh>(args);
  }
}

constexpr EpilogueKernel kernel = {Isa::neon, run};

}  // namespace

const EpilogueKernel* epilogue_neon() { return &kernel; }

}  // namespace bantamweight

#else

namespace bantamweight {
const EpilogueKernel* epilogue_neon() { return nullptr; }
}  // namespace bantamweight

#endif
