// NEON: 4 elements a vector; the operations of avx512.cc.
#include "epilogue/epilogue.h"

#if defined(__aarch64__)
#include "epilogue/rows.h"
#include "runtime/floats_neon.h"

namespace bantamweight {
namespace {

constexpr EpilogueKernel kernel = {Isa::neon, epilogue_rows<Floats>};

}  // namespace

const EpilogueKernel* epilogue_neon() { return &kernel; }

}  // namespace bantamweight

#else

namespace bantamweight {
const EpilogueKernel* epilogue_neon() { return nullptr; }
}  // namespace bantamweight

#endif
