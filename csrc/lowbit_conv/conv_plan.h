// A convolution of images of one size in three steps that other code may put together anew: plan,
// prepare the activations, multiply.
#pragma once

#include <cstdint>
#include <vector>

#include "lowbit_conv/conv_layout.h"
#include "lowbit_conv/lowbit_conv.h"
#include "resident_conv/resident_conv.h"
#include "runtime/status.h"

namespace bantamweight {

// The size of feature maps as int8 codes (code_maps.h), channels last, with a border of zeros around
// each image as wide as the widest padding among the convolutions that read it.
struct CodeMap {
  int64_t channels = 0, height = 0, width = 0;  // without the border
  int64_t top = 0, bottom = 0, left = 0, right = 0;

  int64_t padded_w() const { return left + width + right; }
  int64_t padded_h() const { return top + height + bottom; }
  int64_t row_bytes() const { return padded_w() * channels; }
  int64_t image_bytes() const { return padded_h() * row_bytes(); }
  // Bytes from the first image's border to a pixel.
  int64_t at(int64_t image, int64_t y, int64_t x) const {
    return image * image_bytes() + (top + y) * row_bytes() + (left + x) * channels;
  }
};

// One int32 of a padded pixel's slice sums that an output pixel's group sum takes in.
struct SumEntry {
  int64_t offset;  // from the output pixel's first padded pixel, in slice sums
  int64_t group;
};

// A weight as resident_conv.h has it, or what there is of it before its codes are unpacked at a call.
// Movable; the view points into it.
struct KeptWeight {
  std::vector<uint8_t> memory;
  std::vector<int64_t> offsets;
  ResidentWeight view;
  const ResidentConvKernel* kernel = nullptr;  // null where none is kept
  bool resident = false;                       // all of it
};

// What is the same for every call on images of one size. Movable; the views point into it.
struct ConvPlan {
  ConvLayout layout;
  int64_t height = 0, width = 0;  // of the input
  int64_t padded_h = 0, padded_w = 0, out_h = 0, out_w = 0;
  int64_t first_pixel = 0;        // padded pixels before the first output pixel's first
  int64_t groups = 0;             // int32 sums an output pixel and channel group
  bool by_pixel = false;          // each pixel has a scale of its own, and only those that are used are kept
  std::vector<PackedView> views;  // one a channel group, with this image's pieces
  std::vector<KPiece> pieces;
  std::vector<KPiece> runs;       // what each task copies together; empty where rows are used as they lie
  bool wants_sums = false;        // some zero is not 0
  int64_t slice_size = 0;         // channels a slice sum; 0 where no slice sums are wanted
  std::vector<SumEntry> entries;  // group-major; the same for every channel group but for a shift
  KeptWeight kept;                // outputs are codes

  ConvPlan() = default;
  ConvPlan(const ConvPlan&) = delete;
  ConvPlan& operator=(const ConvPlan&) = delete;
  ConvPlan(ConvPlan&&) = default;
  ConvPlan& operator=(ConvPlan&&) = default;

  int64_t padded_pixels() const { return padded_h * padded_w; }
  int64_t slices() const { return slice_size == 0 ? 0 : layout.run.in_channels / slice_size; }
  int64_t image_rows() const { return out_h * out_w; }
  int64_t out_floats() const { return image_rows() * layout.run.out_channels; }
  int64_t pixel_bytes() const;  // of q
  // Of q; a depthwise convolution reads floats.
  int64_t image_bytes() const {
    return layout.run.depthwise() ? 0 : (by_pixel ? image_rows() : padded_pixels()) * pixel_bytes();
  }
};

Status conv_plan(const void* layout, int64_t layout_bytes, int64_t height, int64_t width, ConvPlan* plan);

// The same for inputs that are such maps already; the border must be as wide as the padding.
Status conv_plan_codes(const void* layout, int64_t layout_bytes, const CodeMap& input, ConvPlan* plan);

// For outputs as codes, before anything is prepared: where the variant has a kernel for signed bytes, keeps
// the bias [out_channels] in the plan, and the weight unpacked beside it if it is small.
Status conv_keep_weight(const float* bias, ConvPlan* plan);

// Some images as the kernels read them.
struct ConvActivations {
  int64_t images;
  const int8_t* q;      // [images, padded_h, padded_w, channels]; by pixel: [images * image_rows, pixel_bytes]
  const float* scale;   // [images]; by pixel: [images * image_rows]
  const int32_t* sums;  // slice sums of q; by pixel: [images * image_rows][groups]
  ConvInput floats;     // depthwise, instead of all those: channels last
};

// Bytes, a multiple of 64, that conv_prepare takes for so many images; channels_last: the input's
// stride_c is 1.
int64_t conv_prepared_bytes(const ConvPlan& plan, int64_t images, bool channels_last);

// input: of the plan's size. The scales are multiplied by `factor`. Threads: OpenMP's current setting.
Status conv_prepare(const ConvPlan& plan, const ConvInput& input, uint8_t* memory, ConvActivations* out,
                    float factor = 1.0f);

// Bytes of the same for conv_prepare_codes.
int64_t conv_prepared_codes_bytes(const ConvPlan& plan, int64_t images);

// q: the maps of some images, readable 64 bytes past their end. value = factor * (code - zero); the
// multiplication leaves the zero out: a bias has to hold it. A depthwise convolution's does not.
Status conv_prepare_codes(const ConvPlan& plan, const CodeMap& input, const int8_t* q, int64_t images, float factor,
                          int64_t zero, uint8_t* memory, ConvActivations* out);

// What follows the multiplication while its outputs lie in the cache: y = max(y + residual, 0).
struct ConvEpilogue {
  const float* residual = nullptr;  // the shape of y, or null
  bool relu = false;                // not with codes, whose lower bound is one

  // Instead of the float residual: y + added_factor * codes.
  const CodeMap* added_map = nullptr;
  const int8_t* added = nullptr;
  float added_factor = 0.0f;

  // Outputs as codes instead of y, whose border is not written: rint of what y would be, bounded by
  // -127 and 127. A depthwise convolution's y is multiplied by `factor` and `shift` added before.
  const CodeMap* codes_map = nullptr;
  int8_t* codes = nullptr;
  float factor = 1.0f, shift = 0.0f;
};

// To codes, by the weight and the bias that the plan keeps.
Status conv_multiply_kept(const ConvPlan& plan, const ConvActivations& activations, const ConvEpilogue& epilogue);

// y [images, out_h, out_w, out_channels], null for codes.
Status conv_multiply(const ConvPlan& plan, const ConvActivations& activations, const float* bias,
                     const ConvEpilogue& epilogue, float* y);

}  // namespace bantamweight
