// AVX-512: six queries by four vectors, 24 sums.
#include "attention/attention.h"

#if defined(__AVX512F__) && defined(__AVX512DQ__)
#include "attention/heads.h"
#include "runtime/floats_avx512.h"

namespace bantamweight {
namespace {

constexpr AttentionKernel kernel = {Isa::avx512, attention_scratch_floats, attention_queries<Floats>};

}  // namespace

const AttentionKernel* attention_avx512() { return &kernel; }

}  // namespace bantamweight

#else

namespace bantamweight {
const AttentionKernel* attention_avx512() { return nullptr; }
}  // namespace bantamweight

#endif
