// Linear layers in a row, from the input's rows to the last layer's, without leaving the cache.
#include <algorithm>
#include <atomic>

#include "lowbit_linear/lowbit_linear.h"
#include "runtime/scratch.h"
#include "runtime/threads.h"

namespace bantamweight {
namespace {

constexpr int64_t kMaxStages = 8;

struct Plan {
  LinearShape shape[kMaxStages];
  Isa isa = Isa::reference;
  int64_t group_size[kMaxStages];  // of the sums of a stage's rounded inputs
  bool rounded[kMaxStages] = {};   // a stage's outputs are only read rounded to int8
  PackedView view[kMaxStages];
  int64_t weight_bytes = 0, macs_per_row = 0;
  int64_t floats_per_row = 0;                   // of every output that is not the chain's
  int64_t codes_per_row = 0, sums_per_row = 0;  // of the widest rounded one
};

// Checks the stages against each other and the arguments.
Status make_plan(const ChainStage* stages, int64_t count, const ChainArgs& args, Plan* plan) {
  if (count < 1 || count > kMaxStages || args.m < 0) return Status::invalid_argument;
  const bool no_x = args.x == nullptr && args.m > 0, no_residual = args.residual == nullptr && args.m > 0;
  for (int64_t i = 0; i < count; ++i) {
    PackedView& view = plan->view[i];
    const Status status = linear_read(stages[i].weight.layout, stages[i].weight.layout_bytes, &plan->shape[i], &view);
    if (status != Status::ok) return status;
    if (i == 0) plan->isa = view.kernel->isa;
    const LinearShape& shape = plan->shape[i];
    plan->group_size[i] = view.groups == 0 ? 1 : view.pieces[0].k_size;
    if (i > 0 && shape.k != plan->shape[i - 1].n) return Status::invalid_argument;
    const int residual = stages[i].residual;
    if (residual == ChainStage::kInput && (no_x || plan->shape[0].k != shape.n)) {
      return Status::invalid_argument;
    }
    if (residual == ChainStage::kGiven && (no_residual || args.ldr < shape.n)) {
      return Status::invalid_argument;
    }
    if (residual >= i || residual < ChainStage::kGiven) return Status::invalid_argument;
    if (residual >= 0 && plan->shape[residual].n != shape.n) return Status::invalid_argument;
    plan->weight_bytes += stages[i].weight.layout_bytes;
    plan->macs_per_row += shape.n * shape.k;
    if (i + 1 < count || args.y == nullptr) plan->floats_per_row += shape.n;
  }
  const LinearShape &first = plan->shape[0], &last = plan->shape[count - 1];
  if (no_x && args.rows.q == nullptr) return Status::invalid_argument;
  if (args.x != nullptr && args.ldx < first.k) return Status::invalid_argument;
  if (args.norm != nullptr) {
    if (no_x) return Status::invalid_argument;
    plan->floats_per_row += first.k;
  }
  if (args.y != nullptr && args.ldy < last.n) return Status::invalid_argument;
  if (args.q != nullptr && args.group_size <= 0) return Status::invalid_argument;
  for (int64_t i = 0; i < count; ++i) {
    const bool by_next = i + 1 < count && plan->shape[i + 1].activations == Activations::int8;
    plan->rounded[i] = stages[i].norm == nullptr && (by_next || (i + 1 == count && args.y == nullptr));
    for (int64_t later = i + 1; later < count; ++later) plan->rounded[i] &= stages[later].residual != i;
    if (!plan->rounded[i] || !by_next) continue;
    const int64_t n = plan->shape[i].n;
    plan->codes_per_row = std::max(plan->codes_per_row, padded_row_bytes(n));
    plan->sums_per_row = std::max(plan->sums_per_row, (n + plan->group_size[i + 1] - 1) / plan->group_size[i + 1]);
  }
  return Status::ok;
}

Status normalize(const float* x, int64_t ldx, int64_t m, int64_t n, const LayerNorm& norm, Isa isa, float* y,
                 int64_t ldy) {
  LayerNormArgs args;
  args.x = x;
  args.ldx = ldx;
  args.m = m;
  args.n = n;
  args.norm = norm;
  args.y = y;
  args.ldy = ldy;
  return layer_norm(args, isa);
}

// Rows begin .. begin + m - 1 through every stage.
//
// Outputs that are only read rounded get their epilogue row by row as they are rounded, which reads them
// once where an epilogue of their own would read and write them all, and rounding read them again. Not when
// threads share the channels of these rows: each has the outputs of its channels at hand. Nor where the kernel has
// the epilogue before it writes.
Status run_rows(const ChainStage* stages, int64_t count, const ChainArgs& args, const Plan& plan, int64_t begin,
                int64_t m) {
  ScratchPlan parts;
  const int64_t floats_at = parts.add<float>(m * plan.floats_per_row);
  const int64_t codes_at = parts.add<int8_t>(m * plan.codes_per_row + kRowAlign);
  const int64_t scale_at = parts.add<float>(m);
  const int64_t sums_at = parts.add<int32_t>(m * plan.sums_per_row);
  thread_local Scratch scratch;
  uint8_t* const base = scratch.get(parts.bytes());
  if (base == nullptr) return Status::out_of_memory;
  auto* memory = reinterpret_cast<float*>(base + floats_at);
  const bool alone = available_threads() == 1;
  const int64_t k = plan.shape[0].k;
  const float* const input = args.x == nullptr ? nullptr : args.x + begin * args.ldx;
  const float* h = input;
  int64_t ldh = args.ldx;
  if (args.norm != nullptr) {
    const Status status = normalize(input, args.ldx, m, k, *args.norm, plan.isa, memory, k);
    if (status != Status::ok) return status;
    h = memory;
    ldh = k;
    memory += m * k;
  }
  QuantizedRows rows;  // instead of h, where rows.q is not null
  if (args.rows.q != nullptr && args.norm == nullptr) {
    rows = args.rows;
    rows.q += begin * padded_row_bytes(k);
    rows.scale += begin;
    rows.sums += begin * ((k + args.rows.group_size - 1) / args.rows.group_size);
  }
  QuantizeRowsArgs round;  // of the last stage's outputs
  round.m = m;
  const float* outputs[kMaxStages];
  int64_t strides[kMaxStages];
  for (int64_t i = 0; i < count; ++i) {
    const ChainStage& stage = stages[i];
    const int64_t n = plan.shape[i].n;
    const bool last = i + 1 == count, writes_y = last && args.y != nullptr;
    LinearArgs linear;
    linear.x = rows.q == nullptr ? h : nullptr;
    linear.ldx = ldh;
    linear.rows = rows;
    linear.m = m;
    linear.bias = stage.weight.bias;
    Epilogue epilogue;
    epilogue.activation = stage.activation;
    if (stage.residual == ChainStage::kInput) {
      epilogue.residual = input;
      epilogue.ldr = args.ldx;
    } else if (stage.residual == ChainStage::kGiven) {
      epilogue.residual = args.residual + begin * args.ldr;
      epilogue.ldr = args.ldr;
    } else if (stage.residual >= 0) {
      epilogue.residual = outputs[stage.residual];
      epilogue.ldr = strides[stage.residual];
    }
    const bool rounds = plan.rounded[i] && alone && !epilogue.empty() && !packed_view_finishes(plan.view[i], m, n);
    if (!rounds) linear.epilogue = epilogue;
    linear.y = writes_y ? args.y + begin * args.ldy : memory;
    linear.ldy = writes_y ? args.ldy : n;
    Status status = linear_forward(stage.weight.layout, stage.weight.layout_bytes, linear);
    if (status == Status::ok && stage.norm != nullptr) {
      status = normalize(linear.y, linear.ldy, m, n, *stage.norm, plan.isa, linear.y, linear.ldy);
    }
    if (status != Status::ok) return status;
    outputs[i] = h = linear.y;
    strides[i] = ldh = linear.ldy;
    if (!writes_y) memory += m * n;
    round.x = h;
    round.ldx = ldh;
    round.k = n;
    rows = {};
    if (!rounds) continue;
    round.epilogue = epilogue;
    if (last) break;
    round.group_size = plan.group_size[i + 1];
    round.q = reinterpret_cast<int8_t*>(base + codes_at);
    round.scale = reinterpret_cast<float*>(base + scale_at);
    round.sums = reinterpret_cast<int32_t*>(base + sums_at);
    status = quantize_rows(round, plan.isa);
    if (status != Status::ok) return status;
    rows = {round.q, round.scale, round.sums, round.group_size};
    round.epilogue = {};
  }
  if (args.q == nullptr) return Status::ok;
  round.group_size = args.group_size;
  round.q = args.q + begin * padded_row_bytes(round.k);
  round.scale = args.scale + begin;
  round.sums = args.sums + begin * ((round.k + args.group_size - 1) / args.group_size);
  return quantize_rows(round, plan.isa);
}

}  // namespace

Status linear_chain(const ChainStage* stages, int64_t count, const ChainArgs& args) {
  // Intermediate outputs of a chunk share L2 with the weights, which stay there if they fit, or else stream
  // through it once a chunk.
  constexpr int64_t kKeptWeightBytes = 3 << 19, kChunkBytes = 384 << 10, kStreamingChunkBytes = 1 << 20;
  // Fewer rows a thread than this, and reading all weights on each costs more than sharing them.
  constexpr int64_t kMinRowsPerThread = 16, kMinStreamingRowsPerThread = 32;
  constexpr int64_t kMinParallelMacs = 1 << 20;  // less is done before a second thread is awake
  Plan plan;
  const Status status = make_plan(stages, count, args, &plan);
  if (status != Status::ok || args.m == 0) return status;

  const int64_t row_bytes = std::max<int64_t>(1, plan.floats_per_row * static_cast<int64_t>(sizeof(float)));
  const bool kept = plan.weight_bytes <= kKeptWeightBytes;
  const int64_t chunk_bytes = kept ? kChunkBytes : kStreamingChunkBytes;
  const int64_t min_rows = kept ? kMinRowsPerThread : kMinStreamingRowsPerThread;
  const int64_t threads = available_threads();
  int64_t rows = std::max<int64_t>(32, chunk_bytes / row_bytes / 16 * 16);
  const bool share_rows = threads > 1 && args.m >= threads * min_rows && args.m * plan.macs_per_row >= kMinParallelMacs;
  // A kernel that copies activations to unpack a weight once for many rows wants more of them, up to all of L2.
  constexpr int64_t kCopiedRows = 128, kCopiedChunkBytes = 2 << 20;
  if (linear_kernel(plan.isa)->scratch_bytes != nullptr) {
    rows = std::max(rows, std::min(kCopiedRows, kCopiedChunkBytes / row_bytes / 32 * 32));
  }
  if (share_rows) rows = std::min(rows, ((args.m + threads - 1) / threads + 15) / 16 * 16);
  const int64_t chunks = (args.m + rows - 1) / rows;
  std::atomic<int> worst{static_cast<int>(Status::ok)};
  for_each_shared(chunks, share_rows, [&](int64_t c) {
    const Status done = run_rows(stages, count, args, plan, c * rows, std::min(rows, args.m - c * rows));
    if (done != Status::ok) worst.store(static_cast<int>(done));
  });
  return static_cast<Status>(worst.load());
}

}  // namespace bantamweight
