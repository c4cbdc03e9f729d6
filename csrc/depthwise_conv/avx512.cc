#include "depthwise_conv/depthwise_conv.h"
namespace bantamweight {
const DepthwiseKernel* depthwise_avx512() { return nullptr; }
}  // namespace bantamweight
