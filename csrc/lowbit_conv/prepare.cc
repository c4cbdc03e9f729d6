// Float images to the int8 activations of a convolution.
#include <algorithm>
#include <atomic>

#include "code_maps/code_maps.h"
#include "lowbit_conv/conv_plan.h"
#include "quantize_activations/quantize_activations.h"
#include "quantize_images/quantize_images.h"
#include "runtime/scratch.h"
#include "runtime/threads.h"

namespace bantamweight {
namespace {

struct Parts {
  int64_t q, scale, sums, end;
};

Parts parts_of(const ConvPlan& plan, int64_t images) {
  ScratchPlan sizes;
  Parts at;
  at.q = sizes.add<int8_t>(images * plan.image_bytes() + 64);  // kernels read 64 bytes past a row
  if (plan.by_pixel) {
    at.scale = sizes.add<float>(images * plan.image_rows());
    at.sums = sizes.add<int32_t>(images * plan.image_rows() * plan.groups);
  } else {
    at.scale = sizes.add<float>(images);
    at.sums = sizes.add<int32_t>(images * plan.padded_pixels() * plan.slices());
  }
  at.end = sizes.bytes();
  return at;
}

// Pixel by pixel: the rows of a linear layer, those that the stride leaves out left out.
Status quantize_pixels(const ConvPlan& plan, const ConvInput& in, int8_t* q, float* scale, int32_t* sums) {
  const ConvShape& s = plan.layout.run;
  QuantizeRowsArgs args;
  args.k = s.in_channels;
  args.group_size = conv_summed_group(s);
  args.ldx = s.stride_w * in.stride_w;
  const bool pixels_in_turn = in.stride_c == 1 && args.ldx >= args.k;
  const bool rows_in_turn = s.stride_h * in.stride_h == plan.out_w * args.ldx;
  const bool images_in_turn = in.images == 1 || in.stride_n == plan.out_h * s.stride_h * in.stride_h;
  if (pixels_in_turn && rows_in_turn && images_in_turn) {
    args.x = in.x;
    args.m = in.images * plan.image_rows();
    args.q = q;
    args.scale = scale;
    args.sums = sums;
    return quantize_rows(args, plan.layout.isa);
  }
  constexpr int64_t kFloatsPerThread = 65536;
  std::atomic<int> worst{static_cast<int>(Status::ok)};
  const bool worthwhile = in.images * plan.image_rows() * args.k >= 2 * kFloatsPerThread;
  for_each_shared(in.images * plan.out_h, worthwhile, [&](int64_t row) {
    const float* x = in.x + row / plan.out_h * in.stride_n + row % plan.out_h * s.stride_h * in.stride_h;
    QuantizeRowsArgs part = args;
    part.m = plan.out_w;
    part.q = q + row * plan.out_w * plan.pixel_bytes();
    part.scale = scale + row * plan.out_w;
    part.sums = sums + row * plan.out_w * plan.groups;
    Status status = Status::ok;
    if (pixels_in_turn) {
      part.x = x;
      status = quantize_rows(part, plan.layout.isa);
    } else {
      thread_local Scratch scratch;
      auto* pixels = reinterpret_cast<float*>(scratch.get(plan.out_w * args.k * static_cast<int64_t>(sizeof(float))));
      if (pixels == nullptr) {
        worst.store(static_cast<int>(Status::out_of_memory));
        return;
      }
      for (int64_t w = 0; w < plan.out_w; ++w) {
        for (int64_t c = 0; c < args.k; ++c) pixels[w * args.k + c] = x[w * args.ldx + c * in.stride_c];
      }
      part.x = pixels;
      part.ldx = args.k;
      status = quantize_rows(part, plan.layout.isa);
    }
    if (status != Status::ok) worst.store(static_cast<int>(status));
  });
  return static_cast<Status>(worst.load());
}

ConvInput copy_channels_last(const ConvInput& in, int64_t channels, float* to) {
  const int64_t row_floats = in.width * channels;
  for_each_shared(in.images * in.height, in.images * in.height * row_floats > (1 << 16), [&](int64_t row) {
    const float* x = in.x + row / in.height * in.stride_n + row % in.height * in.stride_h;
    float* y = to + row * row_floats;
    for (int64_t w = 0; w < in.width; ++w) {
      for (int64_t c = 0; c < channels; ++c) y[w * channels + c] = x[w * in.stride_w + c * in.stride_c];
    }
  });
  return {to, in.images, in.height, in.width, in.height * row_floats, 1, row_floats, channels};
}

// Of what conv_prepare_codes makes: scales and sums, or the floats of a depthwise convolution.
struct CodeParts {
  int64_t scale, sums, floats, end;
};

CodeParts code_parts_of(const ConvPlan& plan, int64_t images) {
  ScratchPlan sizes;
  CodeParts at = {};
  at.scale = sizes.add<float>(images);
  at.sums = sizes.add<int32_t>(images * plan.padded_pixels() * plan.slices());
  at.floats = sizes.add<float>(
      plan.layout.run.depthwise() ? images * plan.height * plan.width * plan.layout.run.in_channels : 0);
  at.end = sizes.bytes();
  return at;
}

constexpr int64_t kBytesPerThread = 1 << 17;

ConvInput floats_of(const ConvPlan& plan, const CodeMap& map, const int8_t* q, int64_t images, float factor,
                    int64_t zero, float* to) {
  const int64_t row_floats = map.width * map.channels;
  const auto to_floats = code_maps_kernel(plan.layout.isa)->to_floats;
  for_each_shared(images * map.height, images * map.image_bytes() >= 2 * kBytesPerThread, [&](int64_t row) {
    WeightedSum sum;
    sum.a = q + map.at(row / map.height, row % map.height, 0);
    sum.factor_a = factor;
    sum.shift = -factor * static_cast<float>(zero);
    sum.count = row_floats;
    to_floats(sum, false, to + row * row_floats);
  });
  return {to, images, map.height, map.width, map.height * row_floats, 1, row_floats, map.channels};
}

}  // namespace

int64_t conv_prepared_codes_bytes(const ConvPlan& plan, int64_t images) { return code_parts_of(plan, images).end; }

Status conv_prepare_codes(const ConvPlan& plan, const CodeMap& input, const int8_t* q, int64_t images, float factor,
                          int64_t zero, uint8_t* memory, ConvActivations* out) {
  const CodeParts at = code_parts_of(plan, images);
  auto* scale = reinterpret_cast<float*>(memory + at.scale);
  auto* sums = reinterpret_cast<int32_t*>(memory + at.sums);
  *out = {images, q, scale, sums, {}};
  if (plan.layout.run.depthwise()) {
    out->floats = floats_of(plan, input, q, images, factor, zero, reinterpret_cast<float*>(memory + at.floats));
    return Status::ok;
  }
  std::fill(scale, scale + images, factor);
  if (plan.slice_size == 0) return Status::ok;
  const auto sum_slices = quantize_images_pick(plan.layout.isa).sum_slices;
  const int64_t row_sums = plan.padded_w * plan.slices();
  for_each_shared(images * plan.padded_h, images * plan.image_bytes() >= 2 * kBytesPerThread, [&](int64_t row) {
    sum_slices(q + row * input.row_bytes(), row_sums, plan.slice_size, plan.slice_size, sums + row * row_sums, 1);
  });
  return Status::ok;
}

int64_t conv_prepared_bytes(const ConvPlan& plan, int64_t images, bool channels_last) {
  if (!plan.layout.run.depthwise()) return parts_of(plan, images).end;
  const int64_t pixels = images * plan.height * plan.width;
  ScratchPlan sizes;
  sizes.add<float>(channels_last ? 1 : pixels * plan.layout.run.in_channels);  // no bytes would be no memory
  return sizes.bytes();
}

Status conv_prepare(const ConvPlan& plan, const ConvInput& input, uint8_t* memory, ConvActivations* out, float factor) {
  const ConvShape& s = plan.layout.run;
  if (s.depthwise()) {
    *out = {input.images, nullptr, nullptr, nullptr, input};
    if (input.stride_c != 1) out->floats = copy_channels_last(input, s.in_channels, reinterpret_cast<float*>(memory));
    return Status::ok;
  }
  const Parts at = parts_of(plan, input.images);
  auto* q = reinterpret_cast<int8_t*>(memory + at.q);
  auto* scale = reinterpret_cast<float*>(memory + at.scale);
  auto* sums = reinterpret_cast<int32_t*>(memory + at.sums);
  *out = {input.images, q, scale, sums, {}};
  const int64_t scales = input.images * (plan.by_pixel ? plan.image_rows() : 1);
  const auto in_other_units = [&](Status status) {
    if (factor != 1.0f) std::for_each(scale, scale + scales, [&](float& one) { one *= factor; });
    return status;
  };
  if (plan.by_pixel) return in_other_units(quantize_pixels(plan, input, q, scale, sums));
  QuantizeImagesArgs args;
  args.x = input.x;
  args.images = input.images;
  args.channels = s.in_channels;
  args.height = input.height;
  args.width = input.width;
  args.stride_n = input.stride_n;
  args.stride_c = input.stride_c;
  args.stride_h = input.stride_h;
  args.stride_w = input.stride_w;
  args.pad_top = s.pad_top;
  args.pad_bottom = s.pad_bottom;
  args.pad_left = s.pad_left;
  args.pad_right = s.pad_right;
  args.slice_size = plan.slice_size == 0 ? s.in_channels : plan.slice_size;
  args.q = q;
  args.scale = scale;
  args.sums = plan.slice_size == 0 ? nullptr : sums;
  return in_other_units(quantize_images(args, plan.layout.isa));
}

}  // namespace bantamweight
