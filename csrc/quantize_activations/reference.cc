// The obvious loop: the oracle of every other variant.
#include <cmath>

#include "quantize_activations/quantize_activations.h"

namespace bantamweight {
namespace {

Status run(const QuantizeRowsArgs& args) {
  const int64_t padded = padded_row_bytes(args.k);
  const int64_t groups = args.k == 0 ? 0 : (args.k + args.group_size - 1) / args.group_size;
  for (int64_t m = 0; m < args.m; ++m) {
    const float* x = args.x + m * args.ldx;
    int8_t* q = args.q + m * padded;
    int32_t* sums = args.sums + m * groups;
    float max = 0.0f;
    for (int64_t k = 0; k < args.k; ++k) {
      if (!std::isfinite(x[k])) return Status::not_finite;
      max = std::fmax(max, std::fabs(x[k]));
    }
    // A maximum so small that 127 / max overflows is as good as zero.
    const float to_code = 127.0f / max;
    const bool zero_row = !std::isfinite(to_code);
    args.scale[m] = zero_row ? 0.0f : max / 127.0f;
    for (int64_t g = 0; g < groups; ++g) sums[g] = 0;
    for (int64_t k = 0; k < args.k; ++k) {
      q[k] = zero_row ? 0 : static_cast<int8_t>(std::nearbyint(x[k] * to_code));
      sums[k / args.group_size] += q[k];
    }
    for (int64_t k = args.k; k < padded; ++k) q[k] = 0;
  }
  return Status::ok;
}

constexpr QuantizeRowsKernel kernel = {Isa::reference, run};

}  // namespace

const QuantizeRowsKernel* quantize_rows_reference() { return &kernel; }

}  // namespace bantamweight
