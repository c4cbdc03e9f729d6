// Convolutions whose weights are multiplied as signed bytes (resident_conv.h).
#include <algorithm>
#include <atomic>
#include <new>

#include "lowbit_conv/conv_plan.h"
#include "runtime/scratch.h"
#include "runtime/threads.h"

namespace bantamweight {
namespace {

// Of a weight, beside its activations and sums in 48 KB of L1.
constexpr int64_t kMaxKeptBytes = 40 << 10;

// Of a weight that is unpacked at each call: so many at a time stay in L2 beside the maps.
constexpr int64_t kUnpackedBytes = 320 << 10, kUnpackedBytesOfCopies = 1 << 20;
constexpr int64_t kUnpackedChannels = 32, kUnpackedChunk = 64, kMaxChunks = 512;

constexpr int64_t kMacsPerTask = int64_t{2} << 20;

// Whether signed bytes hold codes without their zero.
bool fits(const PackedView& view) {
  const int32_t most = (1 << view.bits) - 1 - view.uniform_zero;
  return view.zero_scale == nullptr && view.uniform_zero <= 128 && most <= 127;
}

int64_t macs_of(const ConvPlan& plan, int64_t images) { return images * plan.out_floats() * plan.layout.run.k(); }

// Chunks as LinearKernel::signed_tiles cuts them.
std::vector<int64_t> chunk_offsets(const std::vector<KPiece>& pieces) {
  std::vector<int64_t> offsets;
  for (const KPiece& piece : pieces) {
    for (int64_t k = 0; k < piece.k_size; k += kUnpackedChunk) offsets.push_back(piece.row_offset + k);
  }
  return offsets;
}

// Some images, where every row of every map is; weight, codes and added are those of channel 0.
ResidentTask task_of(const ConvPlan& plan, const ConvActivations& activations, const ConvEpilogue& epilogue,
                     int64_t image, int64_t images) {
  const ConvShape& s = plan.layout.run;
  const CodeMap &to = *epilogue.codes_map, &added = *epilogue.added_map;
  ResidentTask task = {};
  task.weight = plan.kept.view;
  task.factor = activations.scale[image];
  task.images = images;
  task.height = plan.out_h;
  task.width = plan.out_w;
  task.pixel_bytes = s.stride_w * s.in_channels;
  task.row_bytes = s.stride_h * plan.padded_w * s.in_channels;
  task.image_bytes = plan.image_bytes();
  task.q = activations.q + image * task.image_bytes + plan.first_pixel * s.in_channels;
  task.codes = epilogue.codes + to.at(image, 0, 0);
  task.codes_pixel_bytes = to.channels;
  task.codes_row_bytes = to.row_bytes();
  task.codes_image_bytes = to.image_bytes();
  if (epilogue.added != nullptr) {
    task.added = epilogue.added + added.at(image, 0, 0);
    task.added_row_bytes = added.row_bytes();
    task.added_image_bytes = added.image_bytes();
    task.added_factor = epilogue.added_factor;
  }
  return task;
}

void multiply_resident(const ConvPlan& plan, const ConvActivations& activations, const ConvEpilogue& epilogue) {
  const int64_t macs = macs_of(plan, 1);
  // Whole images to a thread that shares with none.
  const int64_t parts = available_threads() == 1 ? 1 : std::clamp<int64_t>(macs / kMacsPerTask, 1, plan.out_h);
  const bool worthwhile = activations.images * macs >= 2 * kMacsPerTask;
  for_each_shared(activations.images * parts, worthwhile, [&](int64_t i) {
    const int64_t part = i % parts, begin = plan.out_h * part / parts, end = plan.out_h * (part + 1) / parts;
    ResidentTask task = task_of(plan, activations, epilogue, i / parts, 1);
    task.height = end - begin;
    task.q += begin * task.row_bytes;
    task.codes += begin * task.codes_row_bytes;
    if (task.added != nullptr) task.added += begin * task.added_row_bytes;
    plan.kept.kernel->run(task);
  });
}

// All pixels of all images by the channels of a group, then by those of the next one, as many groups for
// every thread.
Status multiply_unpacked(const ConvPlan& plan, const ConvActivations& activations, const ConvEpilogue& epilogue) {
  const PackedView& view = plan.views[0];
  const KeptWeight& kept = plan.kept;
  const int64_t units = view.n / kUnpackedChannels, halves = view.kernel->block_n / kUnpackedChannels;
  const int64_t unit_bytes = kUnpackedChannels * kept.view.chunks.count * kUnpackedChunk;
  const bool worthwhile = macs_of(plan, activations.images) >= 2 * kMacsPerTask;
  const int64_t threads = worthwhile ? available_threads() : 1;
  const int64_t most = plan.layout.run.stride_w > 1 ? kUnpackedBytesOfCopies : kUnpackedBytes;
  const int64_t least = (units * unit_bytes + most - 1) / most;
  const int64_t groups = std::min(units, (least + threads - 1) / threads * threads);
  const float* scale = activations.scale;
  const bool one_scale = std::all_of(scale, scale + activations.images, [&](float one) { return one == scale[0]; });
  const int64_t together = one_scale ? activations.images : 1;
  std::atomic<bool> lacks_memory{false};
  for_each_shared(groups, worthwhile, [&](int64_t group) {
    const int64_t begin = units * group / groups, end = units * (group + 1) / groups;
    thread_local Scratch scratch;
    ScratchPlan sizes;
    const int64_t tiles_at = sizes.add<int8_t>((end - begin) * unit_bytes), copies_at = sizes.add<int8_t>(unit_bytes);
    uint8_t* memory = scratch.get(sizes.bytes());
    if (memory == nullptr) {
      lacks_memory.store(true);
      return;
    }
    auto* tiles = reinterpret_cast<int8_t*>(memory + tiles_at);
    for (int64_t unit = begin; unit < end; ++unit) {
      view.kernel->signed_tiles(view.bits, view.pieces, view.piece_count, view.uniform_zero,
                                view.blocks + unit / halves * view.block_bytes, unit % halves != 0,
                                tiles + (unit - begin) * unit_bytes);
    }
    const int64_t first = begin * kUnpackedChannels;
    for (int64_t image = 0; image < activations.images; image += together) {
      ResidentTask task = task_of(plan, activations, epilogue, image, together);
      task.weight.tiles = tiles;
      task.weight.scale += first;
      task.weight.bias += first;
      task.weight.channels = (end - begin) * kUnpackedChannels;
      task.codes += first;
      if (task.added != nullptr) task.added += first;
      task.copies = reinterpret_cast<int8_t*>(memory + copies_at);
      kept.kernel->run(task);
    }
  });
  return lacks_memory.load() ? Status::out_of_memory : Status::ok;
}

}  // namespace

Status conv_keep_weight(const float* bias, ConvPlan* plan) try {
  const ConvShape& s = plan->layout.run;
  const auto* kernel = resident_conv_pick(plan->layout.isa);
  if (kernel->isa != plan->layout.isa || kernel->isa == Isa::reference) return Status::ok;
  if (s.depthwise() || s.groups != 1 || plan->by_pixel || plan->groups != 1) return Status::ok;
  const PackedView& view = plan->views[0];
  if (s.out_channels % kResidentChannels != 0 || !fits(view)) return Status::ok;
  const std::vector<KPiece> runs = conv_runs(s, plan->padded_w * s.in_channels);
  const auto run_count = static_cast<int64_t>(runs.size());

  KeptWeight& kept = plan->kept;
  ResidentChunks chunks = resident_chunks(runs.data(), run_count);
  int64_t bytes = chunks.count * chunks.size * s.out_channels;
  kept.resident = bytes <= kMaxKeptBytes;
  if (kept.resident) {
    kept.offsets.resize(static_cast<size_t>(chunks.count));
  } else {
    const bool unpacks = view.kernel->signed_tiles != nullptr && view.bits != 3 && view.bits != kTrits;
    if (!unpacks || s.out_channels % kUnpackedChannels != 0 || !plan->runs.empty()) return Status::ok;
    kept.offsets = chunk_offsets(plan->pieces);
    chunks = {kUnpackedChunk, static_cast<int64_t>(kept.offsets.size())};
    if (chunks.count > kMaxChunks) return Status::ok;
    bytes = 0;
  }

  ScratchPlan sizes;
  const int64_t tiles_at = sizes.add<int8_t>(bytes);
  const int64_t scale_at = sizes.add<float>(s.out_channels), bias_at = sizes.add<float>(s.out_channels);
  kept.memory.resize(static_cast<size_t>(sizes.bytes() + 63));
  uint8_t* memory = kept.memory.data();
  memory += (64 - reinterpret_cast<uintptr_t>(memory) % 64) % 64;
  auto* tiles = reinterpret_cast<int8_t*>(memory + tiles_at);
  auto *scale = reinterpret_cast<float*>(memory + scale_at), *kept_bias = reinterpret_cast<float*>(memory + bias_at);
  // Codes that are unpacked at each call are not unpacked here.
  std::vector<uint8_t> codes(static_cast<size_t>(kept.resident ? s.out_channels * s.k() : 0));
  std::vector<float> zero(static_cast<size_t>(s.out_channels));
  packed_view_unpack(view, s.k(), kept.resident ? codes.data() : nullptr, scale, zero.data());
  const int64_t most_tiles = kept.resident ? 4 : 2;
  std::copy(bias, bias + s.out_channels, kept_bias);
  if (kept.resident) {
    resident_pack(codes.data(), s.out_channels, s.k(), view.uniform_zero, runs.data(), run_count, chunks, most_tiles,
                  tiles, kept.offsets.data());
  }
  kept.view = {tiles, kept.offsets.data(), scale, kept_bias, chunks, s.out_channels, most_tiles};
  kept.kernel = kernel;
  plan->slice_size = 0;  // zeros are in the weight: no sums of activations
  return Status::ok;
} catch (const std::bad_alloc&) {
  return Status::out_of_memory;
}

Status conv_multiply_kept(const ConvPlan& plan, const ConvActivations& activations, const ConvEpilogue& epilogue) {
  if (!plan.kept.resident) return multiply_unpacked(plan, activations, epilogue);
  multiply_resident(plan, activations, epilogue);
  return Status::ok;
}

}  // namespace bantamweight
