#include "resident_conv/resident_conv.h"
#include "runtime/variants.h"

namespace bantamweight {
namespace {

const VariantList<ResidentConvKernel>& variants() {
  static const VariantList<ResidentConvKernel> list = {resident_conv_amx(), resident_conv_reference()};
  return list;
}

}  // namespace

const Isa* resident_conv_variants(std::size_t* count) { return variants().isas(count); }

const ResidentConvKernel* resident_conv_pick(Isa ceiling) { return variants().pick(ceiling); }

}  // namespace bantamweight
