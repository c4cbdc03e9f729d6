// Picks the variant, cuts the images into runs and rows, and shares them out over OpenMP's threads.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "quantize_images/quantize_images.h"
#include "runtime/threads.h"
#include "runtime/variants.h"

namespace bantamweight {
namespace {

const VariantList<QuantizeImagesKernel>& variants() {
  static const VariantList<QuantizeImagesKernel> list = {quantize_images_avx512(), quantize_images_avx2(),
                                                         quantize_images_neon(), quantize_images_reference()};
  return list;
}

// Below this many floats a second thread costs more than it saves.
constexpr int64_t kFloatsPerThread = 65536;

// An image as nested loops, innermost first, with loops that follow one another in memory merged.
struct Runs {
  int64_t size[3];
  int64_t stride[3];
};

Runs runs_of(const QuantizeImagesArgs& a) {
  // Channels inside (channels last) or outside (channels first).
  const bool channels_inside = a.stride_c <= a.stride_w;
  Runs runs = channels_inside ? Runs{{a.channels, a.width, a.height}, {a.stride_c, a.stride_w, a.stride_h}}
                              : Runs{{a.width, a.height, a.channels}, {a.stride_w, a.stride_h, a.stride_c}};
  for (int from = 1; from < 3 && runs.stride[0] == 1 && runs.stride[from] == runs.size[0]; ++from) {
    runs.size[0] *= runs.size[from];
    runs.size[from] = 1;
  }
  return runs;
}

// The maximum over the part of an image that chunk `c` of `chunks` covers.
uint32_t absmax_of_chunk(const QuantizeImagesKernel& kernel, const Runs& runs, const float* x, int64_t c,
                         int64_t chunks) {
  uint32_t max = 0;
  const int64_t outer = runs.size[1] * runs.size[2];
  const bool by_run = outer >= chunks;  // whole runs, or a part of each run
  const int64_t total = by_run ? outer : runs.size[0];
  const int64_t begin = total * c / chunks, end = total * (c + 1) / chunks;
  const int64_t run_begin = by_run ? begin : 0, run_end = by_run ? end : outer;
  const int64_t at_begin = by_run ? 0 : begin, at_end = by_run ? runs.size[0] : end;
  for (int64_t r = run_begin; r < run_end; ++r) {
    const float* run = x + (r % runs.size[1]) * runs.stride[1] + (r / runs.size[1]) * runs.stride[2];
    if (runs.stride[0] == 1) {
      max = std::max(max, kernel.absmax_bits(run + at_begin, at_end - at_begin));
    } else {
      for (int64_t i = at_begin; i < at_end; ++i) max = std::max(max, kernel.absmax_bits(run + i * runs.stride[0], 1));
    }
  }
  return max;
}

// Row `y` of a padded image: quantized pixels between zeros, or all zeros.
void quantize_padded_row(const QuantizeImagesKernel& kernel, const QuantizeImagesArgs& a, int64_t image, int64_t y,
                         float to_code) {
  const int64_t height = a.pad_top + a.height + a.pad_bottom, width = a.pad_left + a.width + a.pad_right;
  const int64_t slices = a.channels / a.slice_size;
  int8_t* q = a.q + (image * height + y) * width * a.channels;
  int32_t* sums = a.sums == nullptr ? nullptr : a.sums + (image * height + y) * width * slices;
  const auto zeros = [&](int64_t first, int64_t count) {
    std::memset(q + first * a.channels, 0, static_cast<size_t>(count * a.channels));
    if (sums != nullptr) std::memset(sums + first * slices, 0, static_cast<size_t>(count * slices) * sizeof *sums);
  };
  if (y < a.pad_top || y >= a.pad_top + a.height) {
    zeros(0, width);
    return;
  }
  zeros(0, a.pad_left);
  zeros(a.pad_left + a.width, a.pad_right);
  ImageRow row;
  row.x = a.x + image * a.stride_n + (y - a.pad_top) * a.stride_h;
  row.stride_c = a.stride_c;
  row.stride_w = a.stride_w;
  row.channels = a.channels;
  row.width = a.width;
  row.to_code = to_code;
  row.q = q + a.pad_left * a.channels;
  kernel.quantize_row(row);
  if (sums != nullptr)
    kernel.sum_slices(row.q, a.width * slices, a.slice_size, a.slice_size, sums + a.pad_left * slices, 1);
}

// False if a float of the image is not finite.
bool quantize_image(const QuantizeImagesKernel& kernel, const QuantizeImagesArgs& a, const Runs& runs, int64_t image,
                    bool share) {
  const int64_t floats = a.channels * a.height * a.width;
  const int64_t chunks = share ? std::max<int64_t>(1, floats / kFloatsPerThread) : 1;
  std::atomic<uint32_t> max_bits{0};  // bits order like the magnitudes they stand for
  for_each_shared(chunks, share, [&](int64_t c) {
    const uint32_t found = absmax_of_chunk(kernel, runs, a.x + image * a.stride_n, c, chunks);
    uint32_t before = max_bits.load();
    while (before < found && !max_bits.compare_exchange_weak(before, found)) {
    }
  });
  const uint32_t bits = max_bits.load();
  float max;
  std::memcpy(&max, &bits, sizeof max);
  const bool finite = std::isfinite(max);
  // A maximum so small that 127 / max overflows is as good as zero.
  const bool zero_image = !finite || !std::isfinite(127.0f / max);
  const float to_code = zero_image ? 0.0f : 127.0f / max;
  // Back over the rows that were just seen, last first: those are still in L2.
  const int64_t height = a.pad_top + a.height + a.pad_bottom, strips = share ? 4 * available_threads() : 1;
  for_each_shared(strips, share, [&](int64_t i) {
    const int64_t strip = strips - 1 - i;
    for (int64_t y = height * (strip + 1) / strips; y-- > height * strip / strips;) {
      quantize_padded_row(kernel, a, image, y, to_code);
    }
  });
  a.scale[image] = zero_image ? 0.0f : max / 127.0f;
  return finite;
}

}  // namespace

const Isa* quantize_images_variants(std::size_t* count) { return variants().isas(count); }

const QuantizeImagesKernel& quantize_images_pick(Isa ceiling) { return *variants().pick(ceiling); }

Status quantize_images(const QuantizeImagesArgs& args, Isa ceiling) {
  if (args.images < 0 || args.channels < 0 || args.height < 0 || args.width < 0 || args.pad_top < 0 ||
      args.pad_bottom < 0 || args.pad_left < 0 || args.pad_right < 0 || args.slice_size <= 0 ||
      args.channels % args.slice_size != 0) {
    return Status::invalid_argument;
  }
  const QuantizeImagesKernel& kernel = quantize_images_pick(ceiling);
  const Runs runs = runs_of(args);
  const int64_t floats = args.channels * args.height * args.width;
  // Whole images to each thread, or else a part of each image.
  const bool spread = args.images >= available_threads() && args.images * floats >= 2 * kFloatsPerThread;
  const bool share = !spread && floats >= 2 * kFloatsPerThread;
  std::atomic<bool> finite{true};
  for_each_shared(args.images, spread, [&](int64_t image) {
    if (!quantize_image(kernel, args, runs, image, share)) finite.store(false);
  });
  return finite.load() ? Status::ok : Status::not_finite;
}

}  // namespace bantamweight
