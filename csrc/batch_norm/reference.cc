// The obvious loops: the oracle of every other variant.
#include <cmath>

#include "batch_norm/coefficients.h"
#include "runtime/fold.h"

namespace bantamweight {
namespace {

BatchNormSums sums_of(const BatchNormSecondArgs& args, int64_t c) {
  BatchNormSums sums;
  float u_lanes[kBatchNormLanes] = {}, d_lanes[kBatchNormLanes] = {}, dy_lanes[kBatchNormLanes] = {};
  int64_t filled = 0;
  for (int64_t row = 0; row < args.n; ++row) {
    for (int64_t i = 0; i < args.length; ++i) {
      const int64_t at = (row * args.channels + c) * args.length + i, lane = i % kBatchNormLanes;
      const float u = args.u[at];
      u_lanes[lane] += u;
      d_lanes[lane] = std::fma(u, args.x[at] - args.mean[c], d_lanes[lane]);
      dy_lanes[lane] = std::fma(u, args.dy[at], dy_lanes[lane]);
    }
    filled += args.length;
    if (filled < kBatchNormBlock && row + 1 < args.n) continue;
    sums.u += fold_lanes<kBatchNormLanes>(u_lanes);
    sums.u_d += fold_lanes<kBatchNormLanes>(d_lanes);
    sums.u_dy += fold_lanes<kBatchNormLanes>(dy_lanes);
    for (int64_t lane = 0; lane < kBatchNormLanes; ++lane) u_lanes[lane] = d_lanes[lane] = dy_lanes[lane] = 0.0f;
    filled = 0;
  }
  return sums;
}

void run(const BatchNormSecondArgs& args, int64_t c) {
  const BatchNormSums sums = args.u == nullptr ? BatchNormSums() : sums_of(args, c);
  const BatchNormCoefficients to = batch_norm_coefficients(args, c, sums);
  args.to_weight[c] = to.weight;
  for (int64_t row = 0; row < args.n; ++row) {
    for (int64_t i = 0; i < args.length; ++i) {
      const int64_t at = (row * args.channels + c) * args.length + i;
      const float d = args.x[at] - args.mean[c];
      args.to_dy[at] = std::fma(to.dy_d, d, to.dy_1);
      args.to_x[at] = std::fma(to.x_dy, args.dy[at], std::fma(to.x_d, d, to.x_1));
      if (args.u != nullptr) {
        args.to_dy[at] = std::fma(to.dy_u, args.u[at], args.to_dy[at]);
        args.to_x[at] = std::fma(to.x_u, args.u[at], args.to_x[at]);
      }
    }
  }
}

constexpr BatchNormSecondKernel kernel = {Isa::reference, run};

}  // namespace

const BatchNormSecondKernel* batch_norm_second_reference() { return &kernel; }

}  // namespace bantamweight
