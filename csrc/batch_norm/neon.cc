// NEON: eight vectors to the 32 lanes.
#include "batch_norm/batch_norm.h"

#if defined(__aarch64__)
#include "batch_norm/rows.h"
#include "runtime/floats_neon.h"

namespace bantamweight {
namespace {

constexpr BatchNormSecondKernel kernel = {Isa::neon, batch_norm_channel<Floats>};

}  // namespace

const BatchNormSecondKernel* batch_norm_second_neon() { return &kernel; }

}  // namespace bantamweight

#else

namespace bantamweight {
const BatchNormSecondKernel* batch_norm_second_neon() { return nullptr; }
}  // namespace bantamweight

#endif
