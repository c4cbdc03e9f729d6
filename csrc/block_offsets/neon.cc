// NEON: four rows of 8 columns take 2 loads, 4 broadcasts and 8 multiply-adds a block of activations.
#include "block_offsets/block_offsets.h"

#if defined(__aarch64__)
#include "block_offsets/rows.h"
#include "runtime/floats_neon.h"

namespace bantamweight {
namespace {

constexpr BlockOffsetsKernel kernel = {Isa::neon, add_block_offsets<Floats>};

}  // namespace

const BlockOffsetsKernel* block_offsets_neon() { return &kernel; }

}  // namespace bantamweight

#else

namespace bantamweight {
const BlockOffsetsKernel* block_offsets_neon() { return nullptr; }
}  // namespace bantamweight

#endif
