#include "depthwise_conv/depthwise_conv.h"
#include "runtime/variants.h"

namespace bantamweight {
namespace {

const VariantList<DepthwiseKernel>& variants() {
  static const VariantList<DepthwiseKernel> list = {depthwise_avx512(), depthwise_avx2(), depthwise_neon(),
                                                    depthwise_reference()};
  return list;
}

}  // namespace

const Isa* depthwise_variants(std::size_t* count) { return variants().isas(count); }

const DepthwiseKernel* depthwise_pick(Isa ceiling) { return variants().pick(ceiling); }

}  // namespace bantamweight
