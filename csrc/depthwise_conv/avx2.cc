#include "depthwise_conv/depthwise_conv.h"
namespace bantamweight {
const DepthwiseKernel* depthwise_avx2() { return nullptr; }
}  // namespace bantamweight
