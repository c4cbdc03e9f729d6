// AVX2: 16 channels of four pixels stay in eight registers while the taps go by. What is left of the
// channels runs in scalar fused multiply-adds.
#include "depthwise_conv/depthwise_conv.h"

#if defined(__AVX2__) && defined(__FMA__)
#include "depthwise_conv/row.h"
#include "runtime/floats_avx2.h"

namespace bantamweight {
namespace {

constexpr DepthwiseKernel kernel = {Isa::avx2, depthwise_row<Floats>};

}  // namespace

const DepthwiseKernel* depthwise_avx2() { return &kernel; }

}  // namespace bantamweight

#else
namespace bantamweight {
const DepthwiseKernel* depthwise_avx2() { return nullptr; }
}  // namespace bantamweight
#endif
