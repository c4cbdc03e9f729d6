// The linear layer from rows, float or rounded before, to float rows.
#include <algorithm>

#include "lowbit_linear/lowbit_linear.h"
#include "runtime/scratch.h"

namespace bantamweight {

Status linear_forward(const void* layout, int64_t layout_bytes, const LinearArgs& args) {
  LinearShape shape;
  PackedView view;
  const Status status = linear_read(layout, layout_bytes, &shape, &view);
  if (status != Status::ok) return status;
  const int64_t m = args.m, k = shape.k, group_size = std::min(shape.group_size, kMaxGroupK);
  if (m < 0 || args.ldy < shape.n || (args.x != nullptr && args.ldx < k)) return Status::invalid_argument;
  if (args.epilogue.residual != nullptr && args.epilogue.ldr < shape.n) return Status::invalid_argument;
  if (args.x == nullptr && args.rows.q == nullptr && m > 0 && k > 0) return Status::invalid_argument;
  if (m == 0 || shape.n == 0) return Status::ok;

  const int64_t row_bytes = padded_row_bytes(k);
  const bool rounded = args.x == nullptr && args.rows.q != nullptr;
  const bool summed = rounded && std::min(args.rows.group_size, k) == std::min(group_size, k);
  ScratchPlan plan;
  const int64_t rows_at = plan.add<const int8_t*>(m);
  const int64_t sums_at = plan.add<int32_t>(summed ? 0 : m * view.groups);
  const int64_t scale_at = plan.add<float>(rounded ? 0 : m);
  const int64_t q_at = plan.add<int8_t>(rounded ? 0 : m * row_bytes + kRowAlign);
  thread_local Scratch scratch;
  uint8_t* memory = scratch.get(plan.bytes());
  if (memory == nullptr) return Status::out_of_memory;
  auto** rows = reinterpret_cast<const int8_t**>(memory + rows_at);
  auto* sums = reinterpret_cast<int32_t*>(memory + sums_at);

  QuantizedRows from = args.rows;
  if (!rounded) {
    QuantizeRowsArgs round;
    round.x = args.x;
    round.ldx = args.ldx;
    round.m = m;
    round.k = k;
    round.group_size = group_size;
    from.q = round.q = reinterpret_cast<int8_t*>(memory + q_at);
    from.scale = round.scale = reinterpret_cast<float*>(memory + scale_at);
    from.sums = round.sums = sums;
    const Status quantized = quantize_rows(round, view.kernel->isa);
    if (quantized != Status::ok) return quantized;
  } else if (!summed) {
    sum_rows(from.q, m, k, group_size, sums);
    from.sums = sums;
  }
  for (int64_t r = 0; r < m; ++r) rows[r] = from.q + r * row_bytes;
  packed_view_run(view, rows, from.scale, from.sums, m, args.bias, args.y, args.ldy, args.epilogue);
  return Status::ok;
}

}  // namespace bantamweight
