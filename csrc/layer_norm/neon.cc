// NEON: 32 elements a step in eight vectors; the last n % 32 one by one, each in its lane.
#include "layer_norm/layer_norm.h"

#if defined(__aarch64__)
#include "layer_norm/rows.h"
#include "runtime/floats_neon.h"

namespace bantamweight {
namespace {

constexpr LayerNormKernel kernel = {Isa::neon, layer_norm_rows<Floats>};

}  // namespace

const LayerNormKernel* layer_norm_neon() { return &kernel; }

}  // namespace bantamweight

#else

namespace bantamweight {
const LayerNormKernel* layer_norm_neon() { return nullptr; }
}  // namespace bantamweight

#endif
