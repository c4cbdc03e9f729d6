// NEON: six queries by four vectors, 24 sums.
#include "attention/attention.h"

#if defined(__aarch64__)
#include "attention/heads.h"
#include "runtime/floats_neon.h"

namespace bantamweight {
namespace {

constexpr AttentionKernel kernel = {Isa::neon, attention_scratch_floats, attention_queries<Floats>};

}  // namespace

const AttentionKernel* attention_neon() { return &kernel; }

}  // namespace bantamweight

#else

namespace bantamweight {
const AttentionKernel* attention_neon() { return nullptr; }
}  // namespace bantamweight

#endif
