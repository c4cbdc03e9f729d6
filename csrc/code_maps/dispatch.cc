#include "code_maps/code_maps.h"
#include "runtime/variants.h"

namespace bantamweight {
namespace {

const VariantList<CodeMapsKernel>& variants() {
  static const VariantList<CodeMapsKernel> list = {code_maps_avx512(), code_maps_avx2(), code_maps_neon(),
                                                   code_maps_reference()};
  return list;
}

}  // namespace

const CodeMapsKernel* code_maps_kernel(Isa ceiling) { return variants().pick(ceiling); }

const Isa* code_maps_variants(std::size_t* count) { return variants().isas(count); }

}  // namespace bantamweight
