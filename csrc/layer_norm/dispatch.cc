// Picks the variant and shares the rows out over OpenMP's threads.
#include <algorithm>

#include "layer_norm/layer_norm.h"
#include "runtime/threads.h"
#include "runtime/variants.h"

namespace bantamweight {
namespace {

const VariantList<LayerNormKernel>& variants() {
  static const VariantList<LayerNormKernel> list = {layer_norm_avx512(), layer_norm_avx2(), layer_norm_neon(),
                                                    layer_norm_reference()};
  return list;
}

// Below this many floats a second thread costs more than it saves.
constexpr int64_t kFloatsPerThread = 32768;

}  // namespace

const Isa* layer_norm_variants(std::size_t* count) { return variants().isas(count); }

Status layer_norm(const LayerNormArgs& args, Isa ceiling) {
  if (args.m < 0 || args.n < 0 || args.ldx < args.n || args.ldy < args.n) return Status::invalid_argument;
  if (args.residual != nullptr && args.ldr < args.n) return Status::invalid_argument;
  if (args.m == 0 || args.n == 0) return Status::ok;
  const LayerNormKernel* kernel = variants().pick(ceiling);
  const int64_t rows_per_chunk = std::max<int64_t>(1, kFloatsPerThread / args.n);
  const int64_t chunks = (args.m + rows_per_chunk - 1) / rows_per_chunk;
  for_each_shared(chunks, true, [&](int64_t c) {
    const int64_t begin = c * rows_per_chunk;
    LayerNormArgs part = args;
    part.m = std::min(rows_per_chunk, args.m - begin);
    part.x += begin * args.ldx;
    part.y += begin * args.ldy;
    if (args.residual != nullptr) part.residual += begin * args.ldr;
    kernel->run(part);
  });
  return Status::ok;
}

}  // namespace bantamweight
