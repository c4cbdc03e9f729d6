// One element at a time: the oracle of every other variant.
#include <cmath>

#include "epilogue/epilogue.h"

namespace bantamweight {
namespace {

// Written as comparisons, which send NaN where the vector instructions of every CPU can send it too.
float relu(float y) { return y > 0.0f ? y : 0.0f; }

float gelu(float y, const float* coefficients, int degree, float end) {
  const float magnitude = std::fabs(y), a = magnitude < end ? magnitude : end;
  float p = coefficients[degree];
  for (int i = degree - 1; i >= 0; --i) p = std::fma(p, a, coefficients[i]);
  const float p2 = p * p, p4 = p2 * p2;
  return std::fma(-(p4 * p4), a, relu(y));
}

float activate(float y, Activation activation) {
  switch (activation) {
    case Activation::none:
      return y;
    case Activation::relu:
      return relu(y);
    case Activation::gelu:
      return gelu(y, kGelu, kGeluDegree, kGeluEnd);
    case Activation::gelu_tanh:
      return gelu(y, kGeluTanh, kGeluTanhDegree, kGeluTanhEnd);
  }
  return y;
}

void run(const EpilogueArgs& args) {
  const Epilogue& epilogue = args.epilogue;
  for (int64_t r = 0; r < args.m; ++r) {
    float* y = args.y + r * args.ldy;
    for (int64_t i = 0; i < args.n; ++i) {
      y[i] = activate(y[i], epilogue.activation);
      if (epilogue.residual != nullptr) y[i] += epilogue.residual[r * epilogue.ldr + i];
    }
  }
}

constexpr EpilogueKernel kernel = {Isa::reference, run};

}  // namespace

const EpilogueKernel* epilogue_reference() { return &kernel; }

}  // namespace bantamweight
