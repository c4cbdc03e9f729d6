// AVX-512: 16 elements a vector, the tail under a mask.
//
// GELU, per vector: 1 load, 1 range, 7 fused multiply-adds (8 for tanh), 3 multiplications, max, 1
// fused multiply-add, 1 store: 13 operations on ports 0 and 5, 6.5 cycles, as long as several vectors
// are in flight (the chain of one is 45 cycles).
#include "epilogue/epilogue.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#include "epilogue/rows.h"
#include "runtime/floats_avx512.h"

namespace bantamweight {
namespace {

constexpr EpilogueKernel kernel = {Isa::avx512, epilogue_rows<Floats>};

}  // namespace

const EpilogueKernel* epilogue_avx512() { return &kernel; }

}  // namespace bantamweight

#else

namespace bantamweight {
const EpilogueKernel* epilogue_avx512() { return nullptr; }
}  // namespace bantamweight

#endif
