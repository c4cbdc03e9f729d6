// NEON: 8 channels of four pixels stay in eight registers while the taps go by. What is left of the
// channels runs in scalar fused multiply-adds.
#include "depthwise_conv/depthwise_conv.h"

#if defined(__ARM_NEON) && defined(__aarch64__)
#include "depthwise_conv/row.h"
#include "runtime/floats_neon.h"

namespace bantamweight {
namespace {

constexpr DepthwiseKernel kernel = {Isa::neon, depthwise_row<Floats>};

}  // namespace

const DepthwiseKernel* depthwise_neon() { return &kernel; }

}  // namespace bantamweight

#else
namespace bantamweight {
const DepthwiseKernel* depthwise_neon() { return nullptr; }
}  // namespace bantamweight
#endif
