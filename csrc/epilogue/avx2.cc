// AVX2: 8 elements a vector; the operations of avx512.cc, 14 on ports 0, 1 and 5 a vector of GELU.
#include "epilogue/epilogue.h"

#if defined(__AVX2__) && defined(__FMA__)
#include "epilogue/rows.h"
#include "runtime/floats_avx2.h"

namespace bantamweight {
namespace {

constexpr EpilogueKernel kernel = {Isa::avx2, epilogue_rows<Floats>};

}  // namespace

const EpilogueKernel* epilogue_avx2() { return &kernel; }

}  // namespace bantamweight

#else

namespace bantamweight {
const EpilogueKernel* epilogue_avx2() { return nullptr; }
}  // namespace bantamweight

#endif
