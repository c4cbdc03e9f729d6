// From float images to float images: quantize some images, then share tasks of output pixels by
// output channels out over OpenMP's threads.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <new>
#include <numeric>
#include <vector>

#include "lowbit_conv/conv_layout.h"
#include "quantize_images/quantize_images.h"
#include "runtime/scratch.h"
#include "runtime/threads.h"

namespace bantamweight {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// One int32 of a padded pixel's slice sums that an output pixel's group sum takes in.
struct SumEntry {
  int64_t offset;  // from the output pixel's first padded pixel, in slice sums
  int64_t group;
};

// What is the same for every task of a call.
struct Plan {
  ConvLayout layout;
  ConvInput input;
  const float* bias;
  float* y;
  int64_t padded_h, padded_w, out_h, out_w;
  int64_t groups;                 // int32 sums an output pixel and channel group
  std::vector<PackedView> views;  // one a channel group, with this image's pieces
  std::vector<KPiece> pieces;
  std::vector<TapPair> pairs;     // depthwise
  std::vector<KPiece> runs;       // what each task copies together; empty where rows are used as they lie
  bool wants_sums = false;        // some zero is not 0
  int64_t slice_size = 0;         // channels a slice sum; 0 where no slice sums are wanted
  std::vector<SumEntry> entries;  // group-major; the same for every channel group but for a shift

  int64_t image_bytes() const { return padded_h * padded_w * layout.run.in_channels; }
  int64_t slices() const { return slice_size == 0 ? 0 : layout.run.in_channels / slice_size; }
  int64_t image_rows() const { return out_h * out_w; }
};

Status plan_views(Plan* plan) {
  const ConvShape& s = plan->layout.run;
  const int64_t row_bytes = plan->padded_w * s.in_channels;
  plan->pieces = conv_pieces(s, plan->layout.isa, row_bytes);
  if (conv_copies_rows(s, plan->layout.isa)) plan->runs = conv_runs(s, row_bytes);
  plan->views.resize(static_cast<size_t>(s.groups));
  for (int64_t g = 0; g < s.groups; ++g) {
    PackedView& view = plan->views[static_cast<size_t>(g)];
    const Status status = conv_view_read(plan->layout, g, plan->pieces, &view);
    if (status != Status::ok) return status;
    view.pieces = plan->pieces.data();
    plan->wants_sums = plan->wants_sums || view.zero_scale != nullptr || view.uniform_zero != 0;
  }
  if (!plan->wants_sums || !plan->runs.empty()) return Status::ok;

  // Sums over slices that no group and no pixel boundary cuts.
  const int64_t depth = s.in_channels / s.groups, group = conv_summed_group(s);
  plan->slice_size = plan->groups == 1 ? depth : std::gcd(depth, group);
  const int64_t slices = plan->slices();
  for (int64_t k = 0; k < s.k(); k += plan->slice_size) {
    const int64_t tap = k / depth, slice = k % depth / plan->slice_size;
    const int64_t ky = tap / s.kernel_w, kx = tap % s.kernel_w;
    plan->entries.push_back({(ky * s.dilation_h * plan->padded_w + kx * s.dilation_w) * slices + slice, k / group});
  }
  return Status::ok;
}

Status make_plan(const void* layout, int64_t layout_bytes, const ConvInput& input, const float* bias, float* y,
                 Plan* plan) {
  const Status status = conv_layout_read(layout, layout_bytes, &plan->layout);
  if (status != Status::ok) return status;
  const ConvShape& s = plan->layout.run;
  constexpr int64_t kMaxExtent = int64_t{1} << 24;
  if (input.images < 0 || input.height < 0 || input.width < 0 || input.height > kMaxExtent ||
      input.width > kMaxExtent) {
    return Status::invalid_argument;
  }
  plan->input = input;
  plan->bias = bias;
  plan->y = y;
  plan->padded_h = s.pad_top + input.height + s.pad_bottom;
  plan->padded_w = s.pad_left + input.width + s.pad_right;
  if (plan->padded_h <= s.dilation_h * (s.kernel_h - 1) || plan->padded_w <= s.dilation_w * (s.kernel_w - 1)) {
    return Status::invalid_argument;
  }
  if (plan->padded_h > (int64_t{1} << 40) / plan->padded_w / s.in_channels) return Status::out_of_memory;
  plan->out_h = conv_out_height(s, input.height);
  plan->out_w = conv_out_width(s, input.width);
  plan->groups = conv_summed_groups(s);
  if (s.depthwise()) {
    plan->pairs = conv_tap_pairs(s, plan->padded_w * s.in_channels);
    return Status::ok;
  }
  return plan_views(plan);
}

// Some images after quantization.
struct Quantized {
  int64_t first, count;  // images
  const int8_t* q;
  const float* scale;
  const int32_t* sums;
};

// Output pixels [begin, end) of the quantized images, counted over all of them.
struct RowRange {
  int64_t begin, end;
};

// Calls visit(image, padded pixel under the first output pixel, number of output pixels, index of
// the first in the range) for each stretch of the range that lies in one output row.
template <class Visit>
void for_each_stretch(const Plan& plan, RowRange range, Visit visit) {
  const ConvShape& s = plan.layout.run;
  for (int64_t row = range.begin; row < range.end;) {
    const int64_t image = row / plan.image_rows(), in_image = row % plan.image_rows();
    const int64_t oy = in_image / plan.out_w, ox = in_image % plan.out_w;
    const int64_t count = std::min(plan.out_w - ox, range.end - row);
    visit(image, oy * s.stride_h * plan.padded_w + ox * s.stride_w, count, row - range.begin);
    row += count;
  }
}

void point_at_rows(const Plan& plan, const Quantized& images, RowRange range, int64_t first_channel,
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

// sums [rows of the range][groups]: box sums of the slice sums.
void sum_rows(const Plan& plan, const Quantized& images, RowRange range, int64_t channel_group, int32_t* sums) {
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
void copy_rows(const Plan& plan, int64_t row_count, int64_t stride, int8_t* copies, const int8_t** rows) {
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
void sum_copies(const Plan& plan, const int8_t* copies, int64_t row_count, int64_t stride, int32_t* sums) {
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

Tasks cut(const Plan& plan, int64_t rows) {
  // A task is about two million multiply-adds: enough to pay for its row pointers and sums, and
  // small enough that a thread which was preempted holds the others up little.
  constexpr int64_t kRows = 256, kMacsPerTask = int64_t{2} << 20;
  const ConvShape& s = plan.layout.run;
  Tasks tasks;
  // Whole output rows, so that neighbouring row pointers are equally spaced.
  tasks.rows_per_task = plan.out_w < kRows ? kRows / plan.out_w * plan.out_w : kRows;
  tasks.row_chunks = ceil_div(rows, tasks.rows_per_task);
  tasks.channel_groups = s.depthwise() ? 1 : s.groups;
  int64_t blocks = 1, macs_per_block = 0;
  if (!s.depthwise()) {
    const int64_t block_n = plan.views[0].kernel->block_n;
    blocks = ceil_div(plan.views[0].n, block_n);
    macs_per_block = std::min(rows, tasks.rows_per_task) * s.k() * block_n;
  }
  tasks.blocks_per_task = std::clamp<int64_t>(kMacsPerTask / std::max<int64_t>(1, macs_per_block), 1, blocks);
  tasks.block_chunks = ceil_div(blocks, tasks.blocks_per_task);
  // Per multiply-add a depthwise convolution costs about sixteen times as much.
  const int64_t macs = rows * s.k() * s.out_channels / (s.depthwise() ? 1 : s.groups);
  tasks.worth_threads = macs * (s.depthwise() ? 16 : 1) >= 2 * kMacsPerTask;
  return tasks;
}

Status run_task(const Plan& plan, const Quantized& images, const Tasks& tasks, int64_t index) {
  const ConvShape& s = plan.layout.run;
  const int64_t block_chunk = index % tasks.block_chunks, rest = index / tasks.block_chunks;
  const int64_t channel_group = rest % tasks.channel_groups, row_chunk = rest / tasks.channel_groups;
  const int64_t all_rows = images.count * plan.image_rows();
  const RowRange range = {row_chunk * tasks.rows_per_task, std::min(all_rows, (row_chunk + 1) * tasks.rows_per_task)};
  const int64_t row_count = range.end - range.begin;

  ScratchPlan sizes;
  const int64_t rows_at = sizes.add<const int8_t*>(row_count);
  const int64_t scale_at = sizes.add<float>(row_count);
  const int64_t sums_at = sizes.add<int32_t>(row_count * plan.groups);
  const int64_t copy_stride = (s.k() + 63) / 64 * 64;
  const int64_t copies_at = sizes.add<int8_t>(plan.runs.empty() ? 0 : row_count * copy_stride + 64);
  thread_local Scratch scratch;
  uint8_t* memory = scratch.get(sizes.bytes());
  if (memory == nullptr) return Status::out_of_memory;
  auto** rows = reinterpret_cast<const int8_t**>(memory + rows_at);
  auto* row_scale = reinterpret_cast<float*>(memory + scale_at);
  auto* sums = reinterpret_cast<int32_t*>(memory + sums_at);

  const int64_t depth = s.in_channels / s.groups;
  float* y = plan.y + (images.first * plan.image_rows() + range.begin) * s.out_channels;
  if (s.depthwise()) {
    point_at_rows(plan, images, range, 0, rows, row_scale);
    DepthwiseTask task;
    task.weight = plan.layout.weight;
    task.scale = plan.layout.scale;
    task.zero_scale = plan.layout.zero_scale;
    task.pairs = plan.pairs.data();
    task.pair_count = static_cast<int64_t>(plan.pairs.size());
    task.groups = plan.groups;
    task.int16_sums = plan.layout.int16_sums;
    task.channels = s.out_channels;
    task.rows = rows;
    task.row_scale = row_scale;
    task.row_count = row_count;
    task.bias = plan.bias;
    task.y = y;
    task.ldy = s.out_channels;
    depthwise_pick(plan.layout.isa)->run(task);
    return Status::ok;
  }
  point_at_rows(plan, images, range, channel_group * depth, rows, row_scale);
  if (plan.runs.empty()) {
    sum_rows(plan, images, range, channel_group, sums);
  } else {
    auto* copies = reinterpret_cast<int8_t*>(memory + copies_at);
    copy_rows(plan, row_count, copy_stride, copies, rows);
    sum_copies(plan, copies, row_count, copy_stride, sums);
  }
  const PackedView& view = plan.views[static_cast<size_t>(channel_group)];
  const int64_t first_channel = channel_group * view.n, blocks = ceil_div(view.n, view.kernel->block_n);
  const int64_t block_begin = block_chunk * tasks.blocks_per_task;
  packed_view_run_blocks(view, rows, row_scale, sums, row_count,
                         plan.bias == nullptr ? nullptr : plan.bias + first_channel, y + first_channel, s.out_channels,
                         block_begin, std::min(blocks, block_begin + tasks.blocks_per_task));
  return Status::ok;
}

Status run_images(const Plan& plan, int64_t first, int64_t count) {
  const ConvShape& s = plan.layout.run;
  const int64_t pixels = count * plan.padded_h * plan.padded_w;
  ScratchPlan sizes;
  const int64_t q_at = sizes.add<int8_t>(pixels * s.in_channels + 64);  // kernels read 64 bytes past a row
  const int64_t scale_at = sizes.add<float>(count);
  const int64_t sums_at = sizes.add<int32_t>(pixels * plan.slices());
  thread_local Scratch scratch;
  uint8_t* memory = scratch.get(sizes.bytes());
  if (memory == nullptr) return Status::out_of_memory;

  QuantizeImagesArgs args;
  args.x = plan.input.x + first * plan.input.stride_n;
  args.images = count;
  args.channels = s.in_channels;
  args.height = plan.input.height;
  args.width = plan.input.width;
  args.stride_n = plan.input.stride_n;
  args.stride_c = plan.input.stride_c;
  args.stride_h = plan.input.stride_h;
  args.stride_w = plan.input.stride_w;
  args.pad_top = s.pad_top;
  args.pad_bottom = s.pad_bottom;
  args.pad_left = s.pad_left;
  args.pad_right = s.pad_right;
  args.slice_size = plan.slice_size == 0 ? s.in_channels : plan.slice_size;
  args.q = reinterpret_cast<int8_t*>(memory + q_at);
  args.scale = reinterpret_cast<float*>(memory + scale_at);
  args.sums = plan.slice_size == 0 ? nullptr : reinterpret_cast<int32_t*>(memory + sums_at);
  const Status quantized = quantize_images(args, plan.layout.isa);
  if (quantized != Status::ok) return quantized;

  const Quantized images = {first, count, args.q, args.scale, args.sums};
  const Tasks tasks = cut(plan, count * plan.image_rows());
  std::atomic<int> worst{static_cast<int>(Status::ok)};
  for_each_shared(tasks.count(), tasks.worth_threads, [&](int64_t i) {
    const Status status = run_task(plan, images, tasks, i);
    if (status != Status::ok) worst.store(static_cast<int>(status));
  });
  return static_cast<Status>(worst.load());
}

}  // namespace

Status conv_forward(const void* layout, int64_t layout_bytes, const ConvInput& input, const float* bias, float* y) try {
  Plan plan;
  const Status status = make_plan(layout, layout_bytes, input, bias, y, &plan);
  if (status != Status::ok) return status;
  if (input.images == 0) return Status::ok;

  // Batches: as many images at a time as stay in L2 between quantization and multiplication, whole
  // images to each thread. A batch that does not go round shares its images out inside.
  constexpr int64_t kBatchBytes = 512 << 10;
  const int64_t threads = available_threads();
  const int64_t fit = std::clamp<int64_t>(kBatchBytes / plan.image_bytes(), 1, input.images);
  const int64_t per_batch = std::min(fit, ceil_div(input.images, threads));
  const int64_t batches = ceil_div(input.images, per_batch);
  const bool spread = batches % threads == 0 || batches >= 4 * threads;
  const int64_t work = input.images * (plan.image_bytes() + plan.image_rows() * plan.layout.run.out_channels);
  std::atomic<int> worst{static_cast<int>(Status::ok)};
  for_each_shared(batches, spread && work > (1 << 17), [&](int64_t b) {
    Status done = Status::out_of_memory;
    try {
      done = run_images(plan, b * per_batch, std::min(per_batch, input.images - b * per_batch));
    } catch (const std::bad_alloc&) {
    }
    if (done != Status::ok) worst.store(static_cast<int>(done));
  });
  return static_cast<Status>(worst.load());
} catch (const std::bad_alloc&) {
  return Status::out_of_memory;
}

}  // namespace bantamweight
