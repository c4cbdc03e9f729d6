#include "block_offsets/block_offsets.h"
#include "runtime/variants.h"

namespace bantamweight {
namespace {

const VariantList<BlockOffsetsKernel>& variants() {
  static const VariantList<BlockOffsetsKernel> list = {block_offsets_avx512(), block_offsets_avx2(),
                                                       block_offsets_neon(), block_offsets_reference()};
  return list;
}

}  // namespace

const BlockOffsetsKernel* block_offsets_kernel(Isa ceiling) { return variants().pick(ceiling); }

const Isa* block_offsets_variants(std::size_t* count) { return variants().isas(count); }

}  // namespace bantamweight
