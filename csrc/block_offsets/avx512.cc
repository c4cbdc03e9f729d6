// AVX-512: four rows of 32 columns take 2 loads, 4 broadcasts and 8 multiply-adds a block of activations.
#include "block_offsets/block_offsets.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#include "block_offsets/rows.h"
#include "runtime/floats_avx512.h"

namespace bantamweight {
namespace {

constexpr BlockOffsetsKernel kernel = {Isa::avx512, add_block_offsets<Floats>};

}  // namespace

const BlockOffsetsKernel* block_offsets_avx512() { return &kernel; }

}  // namespace bantamweight

#else

namespace bantamweight {
const BlockOffsetsKernel* block_offsets_avx512() { return nullptr; }
}  // namespace bantamweight

#endif
