// AVX2: four vectors to the 32 lanes.
#include "batch_norm/batch_norm.h"

#if defined(__AVX2__) && defined(__FMA__)
#include "batch_norm/rows.h"
#include "runtime/floats_avx2.h"

namespace bantamweight {
namespace {

constexpr BatchNormSecondKernel kernel = {Isa::avx2, batch_norm_channel<Floats>};

}  // namespace

const BatchNormSecondKernel* batch_norm_second_avx2() { return &kernel; }

}  // namespace bantamweight

#else

namespace bantamweight {
const BatchNormSecondKernel* batch_norm_second_avx2() { return nullptr; }
}  // namespace bantamweight

#endif
