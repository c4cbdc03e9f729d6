// AVX2: six queries by two vectors, 12 sums in 16 registers.
#include "attention/attention.h"

#if defined(__AVX2__) && defined(__FMA__)
#include "attention/heads.h"
#include "runtime/floats_avx2.h"

namespace bantamweight {
namespace {

constexpr AttentionKernel kernel = {Isa::avx2, attention_scratch_floats, attention_queries<Floats>};

}  // namespace

const AttentionKernel* attention_avx2() { return &kernel; }

}  // namespace bantamweight

#else

namespace bantamweight {
const AttentionKernel* attention_avx2() { return nullptr; }
}  // namespace bantamweight

#endif
