// AVX2: four rows of 16 columns take 2 loads, 4 broadcasts and 8 multiply-adds a block of activations.
#include "block_offsets/block_offsets.h"

#if defined(__AVX2__) && defined(__FMA__)
#include "block_offsets/rows.h"
#include "runtime/floats_avx2.h"

namespace bantamweight {
namespace {

constexpr BlockOffsetsKernel kernel = {Isa::avx2, add_block_offsets<Floats>};

}  // namespace

const BlockOffsetsKernel* block_offsets_avx2() { return &kernel; }

}  // namespace bantamweight

#else

namespace bantamweight {
const BlockOffsetsKernel* block_offsets_avx2() { return nullptr; }
}  // namespace bantamweight

#endif
