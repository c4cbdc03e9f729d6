// Picks the variant and shares the channels out over OpenMP's threads.
#include "batch_norm/batch_norm.h"
#include "runtime/threads.h"
#include "runtime/variants.h"

namespace bantamweight {
namespace {

const VariantList<BatchNormSecondKernel>& variants() {
  static const VariantList<BatchNormSecondKernel> list = {batch_norm_second_avx512(), batch_norm_second_avx2(),
                                                          batch_norm_second_neon(), batch_norm_second_reference()};
  return list;
}

// Below this many values a second thread costs more than it saves.
constexpr int64_t kValuesForThreads = 32768;

}  // namespace

const Isa* batch_norm_second_variants(std::size_t* count) { return variants().isas(count); }

Status batch_norm_second(const BatchNormSecondArgs& args, Isa ceiling) {
  if (args.n < 0 || args.channels < 0 || args.length < 0) return Status::invalid_argument;
  if (args.n == 0 || args.channels == 0 || args.length == 0) return Status::ok;
  const void* const needed[] = {args.dy,    args.x,     args.mean, args.r,        args.dweight,
                                args.dbias, args.to_dy, args.to_x, args.to_weight};
  for (const void* pointer : needed) {
    if (pointer == nullptr) return Status::invalid_argument;
  }
  const BatchNormSecondKernel* kernel = variants().pick(ceiling);
  for_each_shared(args.channels, args.n * args.channels * args.length >= kValuesForThreads,
                  [&](int64_t c) { kernel->run(args, c); });
  return Status::ok;
}

}  // namespace bantamweight
