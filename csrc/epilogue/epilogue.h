// What follows a matmul before its outputs leave the cache: y = activation(y) + residual, in place.
//
//   gelu:      y * Phi(y), Phi the normal distribution function (Hendrycks & Gimpel 2016, arXiv
//              1606.08415); gelu_tanh the paper's second form, with a logistic function for Phi
//
// Both are computed as max(y, 0) - a * p(a)^8 with a = min(|y|, end): the eighth root of Phi(-a) is so
// smooth that a short polynomial p gives Phi(-a) to 1e-7, without exp, erf or a division. Outputs lie
// within 3e-7 * max(1, |y|) of the exact ones. All variants agree to the last bit: p by Horner's rule
// in fused multiply-adds, then three squarings, a product and one fused multiply-add.
#pragma once

#include <cstddef>
#include <cstdint>

#include "runtime/isa.h"
#include "runtime/status.h"

namespace bantamweight {

enum class Activation : int { none = 0, relu = 1, gelu = 2, gelu_tanh = 3 };
constexpr int kActivationCount = 4;

// Coefficients of p, from the constant up, fitted for the smallest error of a * p(a)^8 on [0, end];
// beyond `end` the product is less than 6e-7.
constexpr int kGeluDegree = 7, kGeluTanhDegree = 8;
constexpr float kGeluEnd = 5.2f, kGeluTanhEnd = 5.0f;
constexpr float kGelu[kGeluDegree + 1] = {0.9170045852661133f,     -0.09146536141633987f,  -0.03189149871468544f,
                                          -0.0007504729437641799f, 0.0015943069010972977f, -2.364312604186125e-05f,
                                          -3.935220593120903e-05f, 3.559200422387221e-06f};
constexpr float kGeluTanh[kGeluTanhDegree + 1] = {
    0.9170047640800476f,      -0.09146548062562943f,  -0.03190857172012329f,
    -0.0005802646628580987f,  0.0014285960933193564f, 0.00022498384350910783f,
    -0.00022255396470427513f, 5.003155820304528e-05f, -3.864856353175128e-06f};

// The part that travels with a matmul.
struct Epilogue {
  Activation activation = Activation::none;
  const float* residual = nullptr;  // [m, n], rows ldr floats apart, or null
  int64_t ldr = 0;

  bool empty() const { return activation == Activation::none && residual == nullptr; }
};

struct EpilogueArgs {
  float* y;  // in and out [m, n], rows ldy floats apart
  int64_t ldy;
  int64_t m, n;
  Epilogue epilogue;
};

struct EpilogueKernel {
  Isa isa;
  void (*run)(const EpilogueArgs& args);  // one thread
};

const EpilogueKernel* epilogue_reference();
const EpilogueKernel* epilogue_avx2();
const EpilogueKernel* epilogue_avx512();
const EpilogueKernel* epilogue_neon();

// The best variant under `ceiling` that this CPU runs.
const EpilogueKernel* epilogue_kernel(Isa ceiling);

// Variants this op has in this build, best first.
const Isa* epilogue_variants(std::size_t* count);

}  // namespace bantamweight
