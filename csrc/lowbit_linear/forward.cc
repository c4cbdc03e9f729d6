// Linear layers from rows, float or rounded before, to float rows: one, or several over the same rows.
#include <algorithm>

#include "lowbit_linear/lowbit_linear.h"
#include "runtime/scratch.h"

namespace bantamweight {
namespace {

// Columns that the kernel sums up before it scales.
int64_t summed_group_size(const PackedView& view) { return view.groups == 0 ? 1 : view.pieces[0].k_size; }

// True if sums over groups of `a` are sums over groups of `b`.
bool same_groups(int64_t a, int64_t b, int64_t k) { return std::min(a, k) == std::min(b, k); }

// A weight and what was read out of it. Reading walks its groups, which a small layer feels: once a call.
struct Weight {
  LinearShape shape;
  PackedView view;
};

// Checks every weight against the first and the arguments; the widest number of groups and all of n.
Status check(const LinearWeight* weights, int64_t count, const LinearArgs& args, Weight* first, int64_t* groups,
             int64_t* n) {
  int64_t k = 0;
  Activations mode = Activations::int8;
  *groups = *n = 0;
  for (int64_t i = 0; i < count; ++i) {
    Weight weight;
    Weight& read = i == 0 ? *first : weight;
    const Status status = linear_read(weights[i].layout, weights[i].layout_bytes, &read.shape, &read.view);
    if (status != Status::ok) return status;
    const LinearShape& shape = read.shape;
    if (i == 0) {
      k = shape.k;
      mode = shape.activations;
    }
    if (shape.k != k) return Status::invalid_argument;
    if (shape.activations != mode) return Status::unsupported;
    *n += shape.n;
    *groups = std::max(*groups, read.view.groups);
  }
  if (args.m < 0 || args.ldy < *n || (args.x != nullptr && args.ldx < k)) return Status::invalid_argument;
  if (args.epilogue.residual != nullptr && args.epilogue.ldr < *n) return Status::invalid_argument;
  if (args.x == nullptr && args.rows.q == nullptr && args.m > 0 && k > 0) return Status::invalid_argument;
  if (args.x == nullptr && args.rows.q != nullptr && mode != Activations::int8) return Status::unsupported;
  return Status::ok;
}

}  // namespace

Status linear_forward(const void* layout, int64_t layout_bytes, const LinearArgs& args) {
  const LinearWeight weight = {layout, layout_bytes, args.bias};
  return linears_forward(&weight, 1, args);
}

Status linears_forward(const LinearWeight* weights, int64_t count, const LinearArgs& args) {
  int64_t max_groups = 0, all_n = 0;
  Weight weight;
  const Status status = check(weights, count, args, &weight, &max_groups, &all_n);
  if (status != Status::ok) return status;
  if (args.m == 0 || all_n == 0) return Status::ok;

  const int64_t m = args.m;
  const bool rounded = args.x == nullptr && args.rows.q != nullptr;
  int64_t row_count = 0;
  uint8_t* memory = nullptr;
  const int8_t** rows = nullptr;
  int32_t* sums = nullptr;
  float *group_scale = nullptr, *group_offset = nullptr;
  QuantizeRowsArgs round;
  QuantizedRows from = args.rows;
  int64_t first_column = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (i > 0) linear_read(weights[i].layout, weights[i].layout_bytes, &weight.shape, &weight.view);
    const LinearShape& shape = weight.shape;
    const PackedView& view = weight.view;
    const Activations mode = shape.activations;
    const bool blocks = mode == Activations::int8_block;
    const int64_t k = shape.k, group_size = summed_group_size(view);
    if (i == 0) {
      const int64_t row_bytes = padded_row_bytes(k);
      row_count = m * rows_per_row(mode);
      ScratchPlan plan;
      const int64_t rows_at = plan.add<const int8_t*>(row_count);
      const int64_t sums_at = plan.add<int32_t>(row_count * max_groups);
      const int64_t scale_at = plan.add<float>(rounded ? 0 : row_count);
      const int64_t group_scale_at = plan.add<float>(blocks ? row_count * max_groups : 0);
      const int64_t group_offset_at = plan.add<float>(blocks ? row_count * max_groups : 0);
      const int64_t q_at = plan.add<int8_t>(rounded ? 0 : row_count * row_bytes + kRowAlign);
      thread_local Scratch scratch;
      memory = scratch.get(plan.bytes());
      if (memory == nullptr) return Status::out_of_memory;
      rows = reinterpret_cast<const int8_t**>(memory + rows_at);
      sums = reinterpret_cast<int32_t*>(memory + sums_at);
      if (!rounded) {
        auto* row_scale = reinterpret_cast<float*>(memory + scale_at);
        if (blocks) {
          group_scale = reinterpret_cast<float*>(memory + group_scale_at);
          round.offset = group_offset = reinterpret_cast<float*>(memory + group_offset_at);
          std::fill(row_scale, row_scale + row_count, 1.0f);
        }
        round.x = args.x;
        round.ldx = args.ldx;
        round.m = m;
        round.k = k;
        round.mode = mode;
        from.q = round.q = reinterpret_cast<int8_t*>(memory + q_at);
        from.scale = row_scale;
        round.scale = blocks ? group_scale : row_scale;
        from.sums = round.sums = sums;
      }
      for (int64_t r = 0; r < row_count; ++r) rows[r] = from.q + r * row_bytes;
    }
    const bool same = (i > 0 || rounded) && same_groups(from.group_size, group_size, k);
    if (!rounded && (i == 0 || (blocks && !same))) {  // blocks are rounded by themselves: others, other codes
      round.group_size = group_size;
      const Status finite = quantize_rows(round, view.kernel->isa);
      if (finite != Status::ok) return finite;
    } else if (!same) {
      sum_rows(from.q, row_count, k, group_size, sums);
      from.sums = sums;
    }
    from.group_size = group_size;
    Epilogue epilogue = args.epilogue;
    if (epilogue.residual != nullptr) epilogue.residual += first_column;
    const Status ran =
        packed_view_run(view, rows, from.scale, from.sums, row_count, weights[i].bias, args.y + first_column, args.ldy,
                        epilogue, group_scale, group_offset, mode == Activations::int16);
    if (ran != Status::ok) return ran;
    first_column += shape.n;
  }
  return Status::ok;
}

}  // namespace bantamweight
