// The multiplication, shared out over OpenMP's threads in tasks of output pixels by output channels;
// and the way from float images to float images.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <new>
#include <vector>

#include "code_maps/code_maps.h"
#include "epilogue/epilogue.h"
#include "lowbit_conv/conv_plan.h"
#include "quantize_images/quantize_images.h"
#include "runtime/fresh_pages.h"
#include "runtime/scratch.h"
#include "runtime/threads.h"

namespace bantamweight {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Output pixels [begin, end) of the quantized images, counted over all of them.
struct RowRange {
  int64_t begin, end;
};

// Calls visit(image, padded pixel under the first output pixel, number of output pixels, index of
// the first in the range) for each stretch of the range that lies in one output row.
template <class Visit>
void for_each_stretch(const ConvPlan& plan, RowRange range, Visit visit) {
  const ConvShape& s = plan.layout.run;
  for (int64_t row = range.begin; row < range.end;) {
    const int64_t image = row / plan.image_rows(), in_image = row % plan.image_rows();
    const int64_t oy = in_image / plan.out_w, ox = in_image % plan.out_w;
    const int64_t count = std::min(plan.out_w - ox, range.end - row);
    visit(image, plan.first_pixel + oy * s.stride_h * plan.padded_w + ox * s.stride_w, count, row - range.begin);
    row += count;
  }
}

void point_at_rows(const ConvPlan& plan, const ConvActivations& images, RowRange range, int64_t first_channel,
                   const int8_t** rows, float* row_scale) {
  const int64_t channels = plan.layout.run.in_channels, step = plan.layout.run.stride_w * channels;
  for_each_stretch(plan, range, [&](int64_t image, int64_t pixel, int64_t count, int64_t at) {
    const int8_t* q = images.q + image * plan.image_bytes() + pixel * channels + first_channel;
    for (int64_t i = 0; i < count; ++i) {
      rows[at + i] = q + i * step;
      row_scale[at + i] = images.scale[image];
    }
  });
}

// to[i] = sum over the entries of from[offset + i], sixteen at a time so that the sums stay in registers.
void sum_boxes(const std::vector<SumEntry>& entries, const int32_t* from, int64_t count, int32_t* to) {
  constexpr int64_t kAtOnce = 16;
  int64_t i = 0;
  for (; i + kAtOnce <= count; i += kAtOnce) {
    int32_t sums[kAtOnce] = {};
    for (const SumEntry& entry : entries) {
      for (int64_t j = 0; j < kAtOnce; ++j) sums[j] += from[entry.offset + i + j];
    }
    std::memcpy(to + i, sums, sizeof sums);
  }
  for (; i < count; ++i) {
    to[i] = 0;
    for (const SumEntry& entry : entries) to[i] += from[entry.offset + i];
  }
}

// Where each output pixel of the range lies in maps of the output's size.
template <class Byte>
void point_at_pixels(const ConvPlan& plan, const CodeMap& map, Byte* maps, RowRange range, Byte** rows) {
  for (int64_t row = range.begin; row < range.end;) {
    const int64_t image = row / plan.image_rows(), in_image = row % plan.image_rows();
    const int64_t oy = in_image / plan.out_w, ox = in_image % plan.out_w;
    const int64_t count = std::min(plan.out_w - ox, range.end - row);
    Byte* first = maps + map.at(image, oy, ox);
    for (int64_t i = 0; i < count; ++i) rows[row - range.begin + i] = first + i * map.channels;
    row += count;
  }
}

// sums [rows of the range][groups]: box sums of the slice sums.
void sum_rows(const ConvPlan& plan, const ConvActivations& images, RowRange range, int64_t channel_group,
              int32_t* sums) {
  const int64_t groups = plan.groups, slices = plan.slices();
  std::fill(sums, sums + (range.end - range.begin) * groups, 0);
  if (slices == 0) return;
  const int64_t first_slice = channel_group * (slices / plan.layout.run.groups);
  const int64_t step = plan.layout.run.stride_w * slices;
  for_each_stretch(plan, range, [&](int64_t image, int64_t pixel, int64_t count, int64_t at) {
    const int32_t* from = images.sums + (image * plan.padded_h * plan.padded_w + pixel) * slices + first_slice;
    if (groups == 1 && step == 1) {  // the common case
      sum_boxes(plan.entries, from, count, sums + at);
      return;
    }
    for (const SumEntry& entry : plan.entries) {
      int32_t* to = sums + at * groups + entry.group;
      for (int64_t i = 0; i < count; ++i) to[i * groups] += from[entry.offset + i * step];
    }
  });
}

// Copies the runs of each row together and points the row at its copy. Whole 16-byte words are copied:
// what lies behind a run is overwritten by the next run or row, or meets no code.
void copy_rows(const ConvPlan& plan, int64_t row_count, int64_t stride, int8_t* copies, const int8_t** rows) {
  for (int64_t r = 0; r < row_count; ++r) {
    int8_t* to = copies + r * stride;
    for (const KPiece& run : plan.runs) {
      const int8_t* from = rows[r] + run.row_offset;
      for (int64_t i = 0; i < run.k_size; i += 16) std::memcpy(to + run.k_begin + i, from + i, 16);
    }
    rows[r] = to;
  }
}

// sums [row_count][groups] of copied rows; their pieces are the groups.
void sum_copies(const ConvPlan& plan, const int8_t* copies, int64_t row_count, int64_t stride, int32_t* sums) {
  if (!plan.wants_sums) {
    std::fill(sums, sums + row_count * plan.groups, 0);
    return;
  }
  const auto sum_slices = quantize_images_pick(plan.layout.isa).sum_slices;
  for (const KPiece& piece : plan.pieces) {
    sum_slices(copies + piece.row_offset, row_count, stride, piece.k_size, sums + piece.group, plan.groups);
  }
}

// How the output of some images is cut into tasks.
struct Tasks {
  int64_t rows_per_task, blocks_per_task;
  int64_t row_chunks, block_chunks, channel_groups;
  bool worth_threads;

  int64_t count() const { return row_chunks * block_chunks * channel_groups; }
};

Tasks cut(const ConvPlan& plan, int64_t rows) {
  // A task is about two million multiply-adds: enough to pay for its row pointers and sums, and
  // small enough that a thread which was preempted holds the others up little.
  constexpr int64_t kRows = 256, kMacsPerTask = int64_t{2} << 20;
  constexpr int64_t kMacsAlone = int64_t{32} << 20;  // a thread that shares with none
  const int64_t macs_per_task = available_threads() == 1 ? kMacsAlone : kMacsPerTask;
  const ConvShape& s = plan.layout.run;
  Tasks tasks;
  // Whole output rows, so that neighbouring row pointers are equally spaced.
  tasks.rows_per_task = plan.out_w < kRows ? kRows / plan.out_w * plan.out_w : kRows;
  tasks.row_chunks = ceil_div(rows, tasks.rows_per_task);
  tasks.channel_groups = s.groups;
  const int64_t block_n = plan.views[0].kernel->block_n, blocks = ceil_div(plan.views[0].n, block_n);
  const int64_t macs_per_block = std::min(rows, tasks.rows_per_task) * s.k() * block_n;
  tasks.blocks_per_task = std::clamp<int64_t>(macs_per_task / std::max<int64_t>(1, macs_per_block), 1, blocks);
  tasks.block_chunks = ceil_div(blocks, tasks.blocks_per_task);
  tasks.worth_threads = rows * s.k() * (s.out_channels / s.groups) >= 2 * kMacsPerTask;
  return tasks;
}

// Rows of floats and the codes that are added to them; y is channel 0's.
void add_codes(const ConvPlan& plan, const ConvEpilogue& epilogue, const int8_t* const* added, int64_t rows,
               int64_t first, int64_t channels, float* y) {
  const auto to_floats = code_maps_kernel(plan.layout.isa)->to_floats;
  for (int64_t r = 0; r < rows; ++r) {
    WeightedSum sum;
    sum.floats = y + r * plan.layout.run.out_channels + first;
    sum.a = added[r] + first;
    sum.factor_a = epilogue.added_factor;
    sum.count = channels;
    to_floats(sum, false, y + r * plan.layout.run.out_channels + first);
  }
}

// On `rows` output pixels by `channels` channels; y and residual are those of the first.
void follow_up(const ConvPlan& plan, const ConvEpilogue& epilogue, int64_t rows, int64_t channels,
               const float* residual, float* y) {
  const int64_t stride = plan.layout.run.out_channels;
  const auto run = [&](const Epilogue& part) {
    epilogue_kernel(plan.layout.isa)->run({y, stride, rows, channels, part});
  };
  if (residual != nullptr) run({Activation::none, residual, stride});
  if (epilogue.relu) run({Activation::relu, nullptr, 0});
}

Status run_task(const ConvPlan& plan, const ConvActivations& images, const Tasks& tasks, int64_t index,
                const float* bias, const ConvEpilogue& epilogue, float* y) {
  const ConvShape& s = plan.layout.run;
  const int64_t block_chunk = index % tasks.block_chunks, rest = index / tasks.block_chunks;
  const int64_t channel_group = rest % tasks.channel_groups, row_chunk = rest / tasks.channel_groups;
  const int64_t all_rows = images.images * plan.image_rows();
  const RowRange range = {row_chunk * tasks.rows_per_task, std::min(all_rows, (row_chunk + 1) * tasks.rows_per_task)};
  const int64_t row_count = range.end - range.begin;

  ScratchPlan sizes;
  const int64_t rows_at = sizes.add<const int8_t*>(row_count);
  const int64_t scale_at = sizes.add<float>(row_count);
  const int64_t sums_at = sizes.add<int32_t>(row_count * plan.groups);
  const int64_t copy_stride = (s.k() + 63) / 64 * 64;
  const int64_t codes_at = sizes.add<int8_t*>(epilogue.codes == nullptr ? 0 : row_count);
  const int64_t added_at = sizes.add<const int8_t*>(epilogue.added == nullptr ? 0 : row_count);
  const int64_t copies_at = sizes.add<int8_t>(plan.runs.empty() ? 0 : row_count * copy_stride + 64);
  thread_local Scratch scratch;
  uint8_t* memory = scratch.get(sizes.bytes());
  if (memory == nullptr) return Status::out_of_memory;
  auto** rows = reinterpret_cast<const int8_t**>(memory + rows_at);
  auto* row_scale = reinterpret_cast<float*>(memory + scale_at);
  auto* row_sums = reinterpret_cast<int32_t*>(memory + sums_at);

  const float* residual = epilogue.residual == nullptr ? nullptr : epilogue.residual + range.begin * s.out_channels;
  const float* scales = row_scale;
  const int32_t* sums = row_sums;
  if (plan.by_pixel) {
    for (int64_t r = 0; r < row_count; ++r) rows[r] = images.q + (range.begin + r) * plan.pixel_bytes();
    scales = images.scale + range.begin;
    sums = images.sums + range.begin * plan.groups;
  } else {
    point_at_rows(plan, images, range, channel_group * (s.in_channels / s.groups), rows, row_scale);
    if (plan.runs.empty()) {
      sum_rows(plan, images, range, channel_group, row_sums);
    } else {
      auto* copies = reinterpret_cast<int8_t*>(memory + copies_at);
      copy_rows(plan, row_count, copy_stride, copies, rows);
      sum_copies(plan, copies, row_count, copy_stride, row_sums);
    }
  }
  const PackedView& view = plan.views[static_cast<size_t>(channel_group)];
  const int64_t first_channel = channel_group * view.n, blocks = ceil_div(view.n, view.kernel->block_n);
  const int64_t block_begin = block_chunk * tasks.blocks_per_task;
  const int64_t block_end = std::min(blocks, block_begin + tasks.blocks_per_task);
  if (bias != nullptr) bias += first_channel;
  const int8_t** added = nullptr;
  if (epilogue.added != nullptr) {
    added = reinterpret_cast<const int8_t**>(memory + added_at);
    point_at_pixels(plan, *epilogue.added_map, epilogue.added + first_channel, range, added);
  }
  if (epilogue.codes != nullptr) {
    auto** codes = reinterpret_cast<int8_t**>(memory + codes_at);
    point_at_pixels(plan, *epilogue.codes_map, epilogue.codes + first_channel, range, codes);
    return packed_view_run_codes(view, rows, scales, sums, row_count, bias, {codes, added, epilogue.added_factor},
                                 block_begin, block_end);
  }
  y += range.begin * s.out_channels;
  packed_view_run_blocks(view, rows, scales, sums, row_count, bias, y + first_channel, s.out_channels, block_begin,
                         block_end);
  const int64_t first = first_channel + block_begin * view.kernel->block_n;
  const int64_t channels = std::min(view.n, block_end * view.kernel->block_n) - block_begin * view.kernel->block_n;
  if (added != nullptr) {
    add_codes(plan, epilogue, added, row_count, first - first_channel, channels, y + first_channel);
  }
  follow_up(plan, epilogue, row_count, channels, residual == nullptr ? nullptr : residual + first, y + first);
  return Status::ok;
}

// Some rows of output pixels, counted over all images.
Status run_depthwise_rows(const ConvPlan& plan, const ConvInput& in, RowRange range, const float* bias,
                          const ConvEpilogue& epilogue, float* y) {
  const ConvShape& s = plan.layout.run;
  thread_local Scratch scratch;
  const int64_t floats = plan.out_w * s.out_channels;
  ScratchPlan sizes;
  const int64_t taps_at = sizes.add<const float*>(s.kernel_h);
  const int64_t row_at = sizes.add<float>(epilogue.codes == nullptr ? 0 : floats);
  uint8_t* memory = scratch.get(sizes.bytes());
  if (memory == nullptr) return Status::out_of_memory;
  auto** taps = reinterpret_cast<const float**>(memory + taps_at);
  const auto* code_maps = code_maps_kernel(plan.layout.isa);
  const auto absmax_bits = quantize_images_pick(plan.layout.isa).absmax_bits;
  bool finite = true;
  for (int64_t at = range.begin; at < range.end; ++at) {
    const float* image = in.x + at / plan.out_h * in.stride_n;
    for (int64_t ky = 0; ky < s.kernel_h; ++ky) {
      const int64_t iy = at % plan.out_h * s.stride_h - s.pad_top + ky * s.dilation_h;
      taps[ky] = iy < 0 || iy >= in.height ? nullptr : image + iy * in.stride_h;
    }
    float* to = epilogue.codes == nullptr ? y + at * floats : reinterpret_cast<float*>(memory + row_at);
    depthwise_pick(plan.layout.isa)
        ->run({plan.layout.weight, bias, taps, s.kernel_h, s.kernel_w, s.stride_w, s.dilation_w, s.pad_left, in.width,
               in.stride_w, s.out_channels, to, plan.out_w});
    // What was not finite on the way in is not on the way out.
    finite = finite && absmax_bits(to, floats) < 0x7f800000u;
    WeightedSum sum;
    sum.floats = to;
    sum.count = floats;
    sum.factor = epilogue.factor;
    sum.shift = epilogue.shift;
    sum.factor_a = epilogue.added_factor;
    if (epilogue.added != nullptr) {
      sum.a = epilogue.added + epilogue.added_map->at(at / plan.out_h, at % plan.out_h, 0);
    }
    if (epilogue.codes != nullptr) {
      code_maps->to_codes(sum, epilogue.codes + epilogue.codes_map->at(at / plan.out_h, at % plan.out_h, 0));
      continue;
    }
    if (epilogue.added != nullptr) code_maps->to_floats(sum, false, to);
    follow_up(plan, epilogue, plan.out_w, s.out_channels,
              epilogue.residual == nullptr ? nullptr : epilogue.residual + at * floats, to);
  }
  return finite ? Status::ok : Status::not_finite;
}

Status run_depthwise(const ConvPlan& plan, const ConvInput& in, const float* bias, const ConvEpilogue& epilogue,
                     float* y) {
  constexpr int64_t kFloatsPerTask = 1 << 15;
  const int64_t rows = in.images * plan.out_h, floats = plan.out_w * plan.layout.run.out_channels;
  const int64_t rows_per_task = std::max<int64_t>(1, kFloatsPerTask / floats);
  std::atomic<int> worst{static_cast<int>(Status::ok)};
  for_each_shared(ceil_div(rows, rows_per_task), rows * floats >= 2 * kFloatsPerTask, [&](int64_t i) {
    const RowRange range = {i * rows_per_task, std::min(rows, (i + 1) * rows_per_task)};
    const Status status = run_depthwise_rows(plan, in, range, bias, epilogue, y);
    if (status != Status::ok) worst.store(static_cast<int>(status));
  });
  return static_cast<Status>(worst.load());
}

Status run_images(const ConvPlan& plan, const ConvInput& input, const float* bias, float* y) {
  thread_local Scratch scratch;
  uint8_t* memory = scratch.get(conv_prepared_bytes(plan, input.images, input.stride_c == 1));
  if (memory == nullptr) return Status::out_of_memory;
  ConvActivations activations;
  const Status status = conv_prepare(plan, input, memory, &activations);
  return status == Status::ok ? conv_multiply(plan, activations, bias, {}, y) : status;
}

}  // namespace

Status conv_multiply(const ConvPlan& plan, const ConvActivations& activations, const float* bias,
                     const ConvEpilogue& epilogue, float* y) {
  if (plan.layout.run.depthwise()) return run_depthwise(plan, activations.floats, bias, epilogue, y);
  if (plan.kept.kernel != nullptr) return conv_multiply_kept(plan, activations, epilogue);
  const Tasks tasks = cut(plan, activations.images * plan.image_rows());
  std::atomic<int> worst{static_cast<int>(Status::ok)};
  for_each_shared(tasks.count(), tasks.worth_threads, [&](int64_t i) {
    const Status status = run_task(plan, activations, tasks, i, bias, epilogue, y);
    if (status != Status::ok) worst.store(static_cast<int>(status));
  });
  return static_cast<Status>(worst.load());
}

Status conv_forward(const void* layout, int64_t layout_bytes, const ConvInput& input, const float* bias, float* y) {
  if (input.images < 0) return Status::invalid_argument;
  ConvPlan plan;
  const Status status = conv_plan(layout, layout_bytes, input.height, input.width, &plan);
  if (status != Status::ok) return status;
  if (input.images == 0) return Status::ok;
  map_fresh_rows(y, input.images, plan.out_floats(), plan.out_floats());
  if (plan.layout.run.depthwise()) return run_images(plan, input, bias, y);

  // Batches: as many images at a time as stay in L2 between quantization and multiplication, whole
  // images to each thread. A batch that does not go round shares its images out inside.
  constexpr int64_t kBatchBytes = 512 << 10;
  const int64_t threads = available_threads();
  const int64_t fit = std::clamp<int64_t>(kBatchBytes / plan.image_bytes(), 1, input.images);
  const int64_t per_batch = std::min(fit, ceil_div(input.images, threads));
  const int64_t batches = ceil_div(input.images, per_batch);
  const bool spread = batches % threads == 0 || batches >= 4 * threads;
  const int64_t work = input.images * (plan.image_bytes() + plan.out_floats());
  std::atomic<int> worst{static_cast<int>(Status::ok)};
  for_each_shared(batches, spread && work > (1 << 17), [&](int64_t b) {
    ConvInput part = input;
    part.x += b * per_batch * input.stride_n;
    part.images = std::min(per_batch, input.images - b * per_batch);
    const Status done = run_images(plan, part, bias, y + b * per_batch * plan.out_floats());
    if (done != Status::ok) worst.store(static_cast<int>(done));
  });
  return static_cast<Status>(worst.load());
}

}  // namespace bantamweight
