// Convolutions whose weights the plan keeps unpacked (resident_conv.h).
#include <algorithm>
#include <new>

#include "lowbit_conv/conv_plan.h"
#include "runtime/scratch.h"
#include "runtime/threads.h"

namespace bantamweight {
namespace {

// Of a weight, beside its activations and sums in 48 KB of L1.
constexpr int64_t kMaxKeptBytes = 40 << 10;

// Whether signed bytes hold codes without their zero.
bool fits(const PackedView& view) {
  const int32_t most = (1 << view.bits) - 1 - view.uniform_zero;
  return view.zero_scale == nullptr && view.uniform_zero <= 128 && most <= 127;
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
  const ResidentChunks chunks = resident_chunks(runs.data(), run_count);
  const int64_t bytes = chunks.count * chunks.size * s.out_channels;
  if (bytes > kMaxKeptBytes) return Status::ok;

  KeptWeight& kept = plan->kept;
  ScratchPlan sizes;
  const int64_t tiles_at = sizes.add<int8_t>(bytes);
  const int64_t scale_at = sizes.add<float>(s.out_channels), bias_at = sizes.add<float>(s.out_channels);
  kept.memory.resize(static_cast<size_t>(sizes.bytes() + 63));
  kept.offsets.resize(static_cast<size_t>(chunks.count));
  uint8_t* memory = kept.memory.data();
  memory += (64 - reinterpret_cast<uintptr_t>(memory) % 64) % 64;
  auto* tiles = reinterpret_cast<int8_t*>(memory + tiles_at);
  auto *scale = reinterpret_cast<float*>(memory + scale_at), *kept_bias = reinterpret_cast<float*>(memory + bias_at);
  std::vector<uint8_t> codes(static_cast<size_t>(s.out_channels * s.k()));
  std::vector<float> zero(static_cast<size_t>(s.out_channels));
  packed_view_unpack(view, s.k(), codes.data(), scale, zero.data());
  std::copy(bias, bias + s.out_channels, kept_bias);
  resident_pack(codes.data(), s.out_channels, s.k(), view.uniform_zero, runs.data(), run_count, chunks, tiles,
                kept.offsets.data());
  kept.view = {tiles, kept.offsets.data(), scale, kept_bias, chunks, s.out_channels};
  kept.kernel = kernel;
  plan->slice_size = 0;  // zeros are in the weight: no sums of activations
  return Status::ok;
} catch (const std::bad_alloc&) {
  return Status::out_of_memory;
}

void conv_multiply_kept(const ConvPlan& plan, const ConvActivations& activations, const ConvEpilogue& epilogue) {
  constexpr int64_t kMacsPerTask = int64_t{2} << 20;
  const ConvShape& s = plan.layout.run;
  const CodeMap &to = *epilogue.codes_map, &added = *epilogue.added_map;
  const int64_t macs = plan.image_rows() * s.k() * s.out_channels;
  // Whole images to a thread that shares with none.
  const int64_t parts = available_threads() == 1 ? 1 : std::clamp<int64_t>(macs / kMacsPerTask, 1, plan.out_h);
  const bool worthwhile = activations.images * macs >= 2 * kMacsPerTask;
  for_each_shared(activations.images * parts, worthwhile, [&](int64_t i) {
    const int64_t image = i / parts, part = i % parts;
    const int64_t begin = plan.out_h * part / parts, end = plan.out_h * (part + 1) / parts;
    ResidentTask task = {};
    task.weight = plan.kept.view;
    task.factor = activations.scale[image];
    task.height = end - begin;
    task.width = plan.out_w;
    task.pixel_bytes = s.stride_w * s.in_channels;
    task.row_bytes = s.stride_h * plan.padded_w * s.in_channels;
    task.q = activations.q + image * plan.image_bytes() + plan.first_pixel * s.in_channels + begin * task.row_bytes;
    task.codes = epilogue.codes + to.at(image, begin, 0);
    task.codes_row_bytes = to.row_bytes();
    if (epilogue.added != nullptr) {
      task.added = epilogue.added + added.at(image, begin, 0);
      task.added_row_bytes = added.row_bytes();
      task.added_factor = epilogue.added_factor;
    }
    plan.kept.kernel->run(task);
  });
}

}  // namespace bantamweight
