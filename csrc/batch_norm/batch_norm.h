// The second derivative of batch normalisation in training mode (Ioffe & Szegedy 2015, arXiv 1502.03167): the
// gradient of its gradient, as a Hessian-vector product needs it. For every channel of N values
//
//   y = weight xhat + bias,  xhat = (x - mean) r,  r = 1 / sqrt(var + eps)
//   dx = weight r P dy,      P t = t - <t> - xhat <t xhat>       <.> the mean over the channel's values
//   dweight = sum dy xhat,   dbias = sum dy
//
// and what is differentiated, by dy, x and weight, is sum u dx + p dweight + q dbias:
//
//   to_dy = weight r P u + p xhat + q
//   to_x = r P h + stretch xhat,   h = (p - weight r <u xhat>) dy - weight r <dy xhat> u
//   to_weight = r inner,  inner = sum u dy - N (<u> <dy> + <u xhat> <dy xhat>),  stretch = -weight r^2 inner / N
//
// The sums over h follow from those over u and dy, so a channel is read twice: for its sums, and, out of the L2
// where a channel's share of the batch fits it, for its results.
#pragma once

#include <cstddef>
#include <cstdint>

#include "runtime/isa.h"
#include "runtime/status.h"

namespace bantamweight {

// A channel's sums are taken in 32 lanes (element i of a row in lane i % 32), which are folded in halves and added
// to a double after each row that fills this many elements; so that every variant gives the same bits.
constexpr int64_t kBatchNormLanes = 32, kBatchNormBlock = 4096;

struct BatchNormSecondArgs {
  const float* u = nullptr;  // [n, channels, length] like dy and x, or null for zeros
  const float* dy = nullptr;
  const float* x = nullptr;
  int64_t n = 0, channels = 0, length = 0;
  const float* mean = nullptr;     // [channels], as all that follow
  const float* r = nullptr;        //
  const float* weight = nullptr;   // or null for ones
  const float* dweight = nullptr;  //
  const float* dbias = nullptr;    //
  const float* p = nullptr;        // or null for zeros
  const float* q = nullptr;        // or null for zeros
  float* to_dy = nullptr;          // out [n, channels, length]
  float* to_x = nullptr;           // out [n, channels, length]
  float* to_weight = nullptr;      // out [channels]
};

// Threads: OpenMP's current setting.
Status batch_norm_second(const BatchNormSecondArgs& args, Isa ceiling);

struct BatchNormSecondKernel {
  Isa isa;
  void (*run)(const BatchNormSecondArgs& args, int64_t channel);  // one thread
};

const BatchNormSecondKernel* batch_norm_second_reference();
const BatchNormSecondKernel* batch_norm_second_avx2();
const BatchNormSecondKernel* batch_norm_second_avx512();
const BatchNormSecondKernel* batch_norm_second_neon();

// Variants this op has in this build, best first.
const Isa* batch_norm_second_variants(std::size_t* count);

}  // namespace bantamweight
