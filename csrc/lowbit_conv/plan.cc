// What a convolution of images of one size needs, worked out once.
#include <new>
#include <numeric>

#include "lowbit_conv/conv_plan.h"
#include "quantize_activations/quantize_activations.h"

namespace bantamweight {
namespace {

Status plan_views(ConvPlan* plan) {
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
  if (plan->by_pixel || !plan->wants_sums || !plan->runs.empty()) return Status::ok;

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

// For the input's size, once what depends on its padding is set.
Status plan_size(int64_t height, int64_t width, ConvPlan* plan) {
  const ConvShape& s = plan->layout.run;
  constexpr int64_t kMaxExtent = int64_t{1} << 24;
  if (height < 0 || width < 0 || height > kMaxExtent || width > kMaxExtent) return Status::invalid_argument;
  plan->height = height;
  plan->width = width;
  if (s.pad_top + height + s.pad_bottom <= s.dilation_h * (s.kernel_h - 1) ||
      s.pad_left + width + s.pad_right <= s.dilation_w * (s.kernel_w - 1)) {
    return Status::invalid_argument;
  }
  if (plan->padded_h > (int64_t{1} << 40) / plan->padded_w / s.in_channels) return Status::out_of_memory;
  plan->out_h = conv_out_height(s, height);
  plan->out_w = conv_out_width(s, width);
  plan->groups = conv_summed_groups(s);
  return s.depthwise() ? Status::ok : plan_views(plan);
}

}  // namespace

int64_t ConvPlan::pixel_bytes() const {
  return by_pixel ? padded_row_bytes(layout.run.in_channels) : layout.run.in_channels;
}

Status conv_plan(const void* layout, int64_t layout_bytes, int64_t height, int64_t width, ConvPlan* plan) try {
  const Status status = conv_layout_read(layout, layout_bytes, &plan->layout);
  if (status != Status::ok) return status;
  const ConvShape& s = plan->layout.run;
  plan->padded_h = s.pad_top + height + s.pad_bottom;
  plan->padded_w = s.pad_left + width + s.pad_right;
  plan->by_pixel = plan->layout.shape.by_pixel();
  return plan_size(height, width, plan);
} catch (const std::bad_alloc&) {
  return Status::out_of_memory;
}

Status conv_plan_codes(const void* layout, int64_t layout_bytes, const CodeMap& input, ConvPlan* plan) try {
  const Status status = conv_layout_read(layout, layout_bytes, &plan->layout);
  if (status != Status::ok) return status;
  const ConvShape& s = plan->layout.run;
  const bool padded =
      input.top >= s.pad_top && input.bottom >= s.pad_bottom && input.left >= s.pad_left && input.right >= s.pad_right;
  if (input.channels != s.in_channels || !(padded || s.depthwise())) return Status::invalid_argument;
  plan->padded_h = input.padded_h();
  plan->padded_w = input.padded_w();
  plan->first_pixel = (input.top - s.pad_top) * plan->padded_w + input.left - s.pad_left;
  return plan_size(input.height, input.width, plan);
} catch (const std::bad_alloc&) {
  return Status::out_of_memory;
}

}  // namespace bantamweight
