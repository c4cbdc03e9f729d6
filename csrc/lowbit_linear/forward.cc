// Linear layers from rows, float or rounded before, to float rows: one, or several over the same rows.
#include <algorithm>

#include "lowbit_linear/lowbit_linear.h"
#include "runtime/scratch.h"

namespace bantamweight {
namespace {

int64_t summed_group_size(const LinearShape& shape) { return std::min(shape.group_size, kMaxGroupK); }

// True if sums over groups of `a` are sums over groups of `b`.
bool same_groups(int64_t a, int64_t b, int64_t k) { return std::min(a, k) == std::min(b, k); }

// Checks every weight against the first and the arguments; the widest number of groups and all of n.
Status check(const LinearWeight* weights, int64_t count, const LinearArgs& args, int64_t* groups, int64_t* n) {
  int64_t k = 0;
  *groups = *n = 0;
  for (int64_t i = 0; i < count; ++i) {
    LinearShape shape;
    PackedView view;
    const Status status = linear_read(weights[i].layout, weights[i].layout_bytes, &shape, &view);
    if (status != Status::ok) return status;
    if (i == 0) k = shape.k;
    if (shape.k != k) return Status::invalid_argument;
    *n += shape.n;
    *groups = std::max(*groups, view.groups);
  }
  if (args.m < 0 || args.ldy < *n || (args.x != nullptr && args.ldx < k)) return Status::invalid_argument;
  if (args.epilogue.residual != nullptr && args.epilogue.ldr < *n) return Status::invalid_argument;
  if (args.x == nullptr && args.rows.q == nullptr && args.m > 0 && k > 0) return Status::invalid_argument;
  return Status::ok;
}

}  // namespace

Status linear_forward(const void* layout, int64_t layout_bytes, const LinearArgs& args) {
  const LinearWeight weight = {layout, layout_bytes, args.bias};
  return linears_forward(&weight, 1, args);
}

Status linears_forward(const LinearWeight* weights, int64_t count, const LinearArgs& args) {
  int64_t max_groups = 0, all_n = 0;
  const Status status = check(weights, count, args, &max_groups, &all_n);
  if (status != Status::ok) return status;
  if (args.m == 0 || all_n == 0) return Status::ok;

  const int64_t m = args.m;
  const bool rounded = args.x == nullptr && args.rows.q != nullptr;
  uint8_t* memory = nullptr;
  const int8_t** rows = nullptr;
  int32_t* sums = nullptr;
  QuantizedRows from = args.rows;
  int64_t first_column = 0;
  for (int64_t i = 0; i < count; ++i) {
    LinearShape shape;
    PackedView view;
    linear_read(weights[i].layout, weights[i].layout_bytes, &shape, &view);
    const int64_t k = shape.k, group_size = summed_group_size(shape);
    if (i == 0) {
      const int64_t row_bytes = padded_row_bytes(k);
      ScratchPlan plan;
      const int64_t rows_at = plan.add<const int8_t*>(m);
      const int64_t sums_at = plan.add<int32_t>(m * max_groups);
      const int64_t scale_at = plan.add<float>(rounded ? 0 : m);
      const int64_t q_at = plan.add<int8_t>(rounded ? 0 : m * row_bytes + kRowAlign);
      thread_local Scratch scratch;
      memory = scratch.get(plan.bytes());
      if (memory == nullptr) return Status::out_of_memory;
      rows = reinterpret_cast<const int8_t**>(memory + rows_at);
      sums = reinterpret_cast<int32_t*>(memory + sums_at);
      if (!rounded) {
        QuantizeRowsArgs round;
        round.x = args.x;
        round.ldx = args.ldx;
        round.m = m;
        round.k = k;
        round.group_size = from.group_size = group_size;
        from.q = round.q = reinterpret_cast<int8_t*>(memory + q_at);
        from.scale = round.scale = reinterpret_cast<float*>(memory + scale_at);
        from.sums = round.sums = sums;
        const Status finite = quantize_rows(round, view.kernel->isa);
        if (finite != Status::ok) return finite;
      }
      for (int64_t r = 0; r < m; ++r) rows[r] = from.q + r * row_bytes;
    }
    if (!same_groups(from.group_size, group_size, k)) {
      sum_rows(from.q, m, k, group_size, sums);
      from.sums = sums;
      from.group_size = group_size;
    }
    Epilogue epilogue = args.epilogue;
    if (epilogue.residual != nullptr) epilogue.residual += first_column;
    packed_view_run(view, rows, from.scale, from.sums, m, weights[i].bias, args.y + first_column, args.ldy, epilogue);
    first_column += shape.n;
  }
  return Status::ok;
}

}  // namespace bantamweight
