#include "epilogue/epilogue.h"
#include "runtime/variants.h"

namespace bantamweight {
namespace {

const VariantList<EpilogueKernel>& variants() {
  static const VariantList<EpilogueKernel> list = {epilogue_avx512(), epilogue_avx2(), epilogue_neon(),
                                                   epilogue_reference()};
  return list;
}

}  // namespace

const EpilogueKernel* epilogue_kernel(Isa ceiling) { return variants().pick(ceiling); }

const Isa* epilogue_variants(std::size_t* count) { return variants().isas(count); }

}  // namespace bantamweight
