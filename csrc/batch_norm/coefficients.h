// One channel's results as linear functions of its values, from its sums. Everything is static: each file that
// includes it keeps a copy with its own flags.
#pragma once

#include "batch_norm/batch_norm.h"

namespace bantamweight {

struct BatchNormSums {
  double u = 0.0, u_d = 0.0, u_dy = 0.0;  // of u, u (x - mean) and u dy
};

struct BatchNormCoefficients {
  float dy_u, dy_d, dy_1;     // to_dy = dy_u u + dy_d (x - mean) + dy_1
  float x_u, x_dy, x_d, x_1;  // to_x = x_u u + x_dy dy + x_d (x - mean) + x_1
  float weight;               // to_weight
};

static inline BatchNormCoefficients batch_norm_coefficients(const BatchNormSecondArgs& args, int64_t c,
                                                            const BatchNormSums& sums) {
  const double count = static_cast<double>(args.n) * static_cast<double>(args.length);
  const double r = args.r[c], weight = args.weight == nullptr ? 1.0 : args.weight[c];
  const double p = args.p == nullptr ? 0.0 : args.p[c], q = args.q == nullptr ? 0.0 : args.q[c];
  const double dweight = args.dweight[c], dbias = args.dbias[c];
  const double u_xhat = r * sums.u_d;
  const double inner = sums.u_dy - (sums.u * dbias + u_xhat * dweight) / count;
  const double stretch = -weight * r * r * inner / count;
  const double h_u = -weight * r * dweight / count, h_dy = p - weight * r * u_xhat / count;  // h = h_u u + h_dy dy
  const double h = h_u * sums.u + h_dy * dbias, h_xhat = h_u * u_xhat + h_dy * dweight;      // its sums
  BatchNormCoefficients to;
  to.dy_u = static_cast<float>(weight * r);
  to.dy_d = static_cast<float>((p - weight * r * u_xhat / count) * r);
  to.dy_1 = static_cast<float>(q - weight * r * sums.u / count);
  to.x_u = static_cast<float>(r * h_u);
  to.x_dy = static_cast<float>(r * h_dy);
  to.x_d = static_cast<float>((stretch - r * h_xhat / count) * r);
  to.x_1 = static_cast<float>(-r * h / count);
  to.weight = static_cast<float>(r * inner);
  return to;
}

}  // namespace bantamweight
