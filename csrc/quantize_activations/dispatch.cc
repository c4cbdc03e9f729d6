// Picks the variant and shares the rows out over OpenMP's threads.
#include <algorithm>
#include <atomic>

#include "quantize_activations/quantize_activations.h"
#include "runtime/scratch.h"
#include "runtime/threads.h"
#include "runtime/variants.h"

namespace bantamweight {
namespace {

const VariantList<QuantizeRowsKernel>& variants() {
  static const VariantList<QuantizeRowsKernel> list = {quantize_rows_avx512(), quantize_rows_avx2(),
                                                       quantize_rows_neon(), quantize_rows_reference()};
  return list;
}

// Below this many floats a second thread costs more than it saves.
constexpr int64_t kFloatsPerThread = 65536;

}  // namespace

const Isa* quantize_rows_variants(std::size_t* count) { return variants().isas(count); }

void sum_rows(const int8_t* q, int64_t m, int64_t k, int64_t group_size, int32_t* sums) {
  for (int64_t r = 0; r < m; ++r, q += padded_row_bytes(k)) {
    for (int64_t begin = 0; begin < k; begin += group_size) {
      int32_t sum = 0;
      for (int64_t i = begin; i < std::min(k, begin + group_size); ++i) sum += q[i];
      *sums++ = sum;
    }
  }
}

Status quantize_rows(const QuantizeRowsArgs& args, Isa ceiling) {
  const bool finishes = !args.epilogue.empty();
  if (args.epilogue.residual != nullptr && args.epilogue.ldr < args.k) return Status::invalid_argument;
  if (args.m < 0 || args.k < 0 || args.ldx < args.k || (args.k > 0 && args.group_size <= 0)) {
    return Status::invalid_argument;
  }
  if (args.mode == Activations::int8_block && args.m * args.k > 0 && args.offset == nullptr)
    return Status::invalid_argument;
  const QuantizeRowsKernel* kernel = variants().pick(ceiling);
  const auto run = [&](QuantizeRowsArgs part) {
    if (finishes) {
      thread_local Scratch scratch;
      part.epilogue_row =
          reinterpret_cast<float*>(scratch.get(std::max<int64_t>(1, args.k) * static_cast<int64_t>(sizeof(float))));
      if (part.epilogue_row == nullptr) return Status::out_of_memory;
    }
    return kernel->run(part);
  };
  const int64_t floats =
      finishes ? kFloatsPerThread / 4 : kFloatsPerThread;  // an activation takes longer than rounding
  const int64_t rows_per_chunk = std::max<int64_t>(1, floats / std::max<int64_t>(1, args.k));
  const int64_t chunks = (args.m + rows_per_chunk - 1) / rows_per_chunk;
  if (chunks <= 1) return run(args);

  const int64_t padded = padded_row_bytes(args.k);
  const int64_t groups = (args.k + args.group_size - 1) / args.group_size;
  std::atomic<int> worst{static_cast<int>(Status::ok)};
  for_each_shared(chunks, true, [&](int64_t c) {
    const int64_t begin = c * rows_per_chunk;
    QuantizeRowsArgs part = args;
    part.m = std::min(rows_per_chunk, args.m - begin);
    part.x += begin * args.ldx;
    const int64_t row = begin * rows_per_row(args.mode);
    part.q += row * padded;
    part.scale += args.mode == Activations::int8_block ? row * groups : row;
    part.sums += row * groups;
    if (part.offset != nullptr) part.offset += row * groups;
    if (part.epilogue.residual != nullptr) part.epilogue.residual += begin * args.epilogue.ldr;
    const Status status = run(part);
    if (status != Status::ok) worst.store(static_cast<int>(status));
  });
  return static_cast<Status>(worst.load());
}

}  // namespace bantamweight
