// AVX2: 32 elements a step in four vectors; the last n % 32 one by one, each in its lane.
#include "layer_norm/layer_norm.h"

#if defined(__AVX2__) && defined(__FMA__)
#include "layer_norm/rows.h"
#include "runtime/floats_avx2.h"

namespace bantamweight {
namespace {

constexpr LayerNormKernel kernel = {Isa::avx2, layer_norm_rows<Floats>};

}  // namespace

const LayerNormKernel* layer_norm_avx2() { return &kernel; }

}  // namespace bantamweight

#else

namespace bantamweight {
const LayerNormKernel* layer_norm_avx2() { return nullptr; }
}  // namespace bantamweight

#endif
