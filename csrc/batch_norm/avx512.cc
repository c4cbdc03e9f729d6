// AVX-512: two vectors to the 32 lanes. Three loads, a subtraction, an addition and two multiply-adds for 16 values'
// sums; three loads, a subtraction, five multiply-adds and two stores for their results: the memory sets the pace.
#include "batch_norm/batch_norm.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#include "batch_norm/rows.h"
#include "runtime/floats_avx512.h"

namespace bantamweight {
namespace {

constexpr BatchNormSecondKernel kernel = {Isa::avx512, batch_norm_channel<Floats>};

}  // namespace

const BatchNormSecondKernel* batch_norm_second_avx512() { return &kernel; }

}  // namespace bantamweight

#else

namespace bantamweight {
const BatchNormSecondKernel* batch_norm_second_avx512() { return nullptr; }
}  // namespace bantamweight

#endif
