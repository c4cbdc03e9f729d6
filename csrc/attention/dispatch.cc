// Picks the variant and shares the heads, and the queries of long ones, out over OpenMP's threads.
#include <algorithm>
#include <atomic>

#include "attention/attention.h"
#include "runtime/scratch.h"
#include "runtime/threads.h"
#include "runtime/variants.h"

namespace bantamweight {
namespace {

const VariantList<AttentionKernel>& variants() {
  static const VariantList<AttentionKernel> list = {attention_amx(), attention_avx512(), attention_avx2(),
                                                    attention_neon(), attention_reference()};
  return list;
}

// Queries that share one transposition of their head's keys: it takes 1 / 16 of the time of so many.
constexpr int64_t kQueriesPerTask = 192;
// Below this many multiplications a second thread costs more than it saves.
constexpr int64_t kWorkPerThread = 1 << 18;

bool valid(const AttentionArgs& args) {
  const int64_t width = args.heads * args.head_size;
  const auto rows = [&](int64_t row, int64_t count) { return row >= width || count <= 1; };
  return args.batch >= 0 && args.heads >= 0 && args.queries >= 0 && args.keys >= 0 && args.head_size >= 0 &&
         rows(args.q.row, args.queries) && rows(args.k.row, args.keys) && rows(args.v.row, args.keys) &&
         rows(args.out_row, args.queries);
}

}  // namespace

const Isa* attention_variants(std::size_t* count) { return variants().isas(count); }

Status attention(const AttentionArgs& args, Isa ceiling) {
  if (!valid(args)) return Status::invalid_argument;
  if (args.batch == 0 || args.heads == 0 || args.queries == 0 || args.head_size == 0) return Status::ok;
  if (!args.bfloat16 && ceiling == Isa::amx) ceiling = Isa::avx512;
  const AttentionKernel* kernel = variants().pick(ceiling);
  const int64_t parts = (args.queries + kQueriesPerTask - 1) / kQueriesPerTask;
  const int64_t per_part = (args.queries + parts - 1) / parts,
                bytes = kernel->scratch_floats(args.keys, args.head_size) * static_cast<int64_t>(sizeof(float));
  std::atomic<Status> worst{Status::ok};
  const int64_t work = args.batch * args.heads * args.queries * args.keys * args.head_size;
  for_each_shared(args.batch * args.heads * parts, work > 2 * kWorkPerThread, [&](int64_t i) {
    static thread_local Scratch memory;
    const int64_t first = i % parts * per_part, h = i / parts % args.heads, b = i / parts / args.heads;
    const int64_t at = h * args.head_size;
    AttentionTask task;
    task.q = args.q.data + b * args.q.batch + first * args.q.row + at;
    task.k = args.k.data + b * args.k.batch + at;
    task.v = args.v.data + b * args.v.batch + at;
    task.ldq = args.q.row;
    task.ldk = args.k.row;
    task.ldv = args.v.row;
    task.mask =
        args.mask == nullptr ? nullptr : args.mask + b * args.mask_batch + h * args.mask_head + first * args.mask_query;
    task.ldm = args.mask_query;
    task.queries = std::min(per_part, args.queries - first);
    task.keys = args.keys;
    task.head_size = args.head_size;
    task.scale = args.scale;
    task.out = args.out + b * args.out_batch + first * args.out_row + at;
    task.ldo = args.out_row;
    task.scratch = reinterpret_cast<float*>(memory.get(bytes));
    if (task.scratch == nullptr && bytes > 0) {
      worst.store(Status::out_of_memory);
    } else if (task.queries > 0 && !kernel->run(task)) {
      worst.store(Status::not_finite);
    }
  });
  return worst.load();
}

}  // namespace bantamweight
