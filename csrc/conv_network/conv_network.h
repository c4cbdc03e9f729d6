// A chain of packed convolutions, poolings and residual sums as one call.
//
// A layer at a time, every feature map of a batch goes through memory as floats, into pages that the
// system has just zeroed. Here a few images run through all steps before the next ones start, in
// memory that is kept between calls, so that feature maps stay in the caches; ReLU and residual sums
// follow each convolution while its outputs lie in L2. The arithmetic is that of the single layers,
// to the last bit.
//
// Where steps have scales, the maps between them are int8 codes (code_maps.h) with one scale a map that
// was found on calibration data before, as in Jacob et al. 2018 (arXiv 1712.05877): a convolution writes
// codes, the next reads them where they lie, and nothing is rounded twice. Images are rounded against
// their own maximum as ever, and the last step gives floats.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "lowbit_conv/lowbit_conv.h"
#include "runtime/status.h"

namespace bantamweight {

// Values are float images [h, w, channels]: value 0 is the input, value i + 1 what step i gives. The
// last step gives the output.
struct NetworkStep {
  enum class Kind : int64_t {
    conv,       // of `layout` and `bias`
    max_pool,   // kernel, stride, padding
    average,    // over all pixels
    subsample,  // every stride-th pixel, `channels_before` and `channels_after` zeros around the channels
    add,        // input + residual
  };
  Kind kind = Kind::conv;
  int64_t input = 0;
  int64_t residual = -1;  // conv, add: the value that is added to the result, or -1
  bool relu = false;      // conv, add: last
  const void* layout = nullptr;
  int64_t layout_bytes = 0;
  const float* bias = nullptr;
  int64_t kernel_h = 1, kernel_w = 1, stride_h = 1, stride_w = 1, pad_h = 0, pad_w = 0;
  int64_t channels_before = 0, channels_after = 0;
  // Of the value as codes, value = scale * (code - zero); 0 for floats. Every step but the last has one,
  // or none has. After ReLU the zero is -127; pooling and subsampling keep what their input has.
  float scale = 0.0f;
  int64_t zero = 0;
};

struct ImageSize {
  int64_t channels = 0, height = 0, width = 0;
  int64_t floats() const { return channels * height * width; }
};

class ConvNetwork {
 public:
  // The layouts and biases must outlive the network.
  explicit ConvNetwork(std::vector<NetworkStep> steps);
  ~ConvNetwork();

  // The size of the output for an input of that size; invalid_argument if a step does not take its input.
  Status output_size(const ImageSize& input, ImageSize* output) const;

  // y [images, height, width, channels] of the last step. Threads: OpenMP's current setting. Callable
  // from several threads at once.
  Status forward(const ConvInput& input, int64_t channels, float* y) const;

 private:
  struct Prepared;  // for one size of input
  Status prepared_for(const ImageSize& input, std::shared_ptr<const Prepared>* out) const;
  Status fold_zeros() const;

  std::vector<NetworkStep> steps_;
  mutable std::mutex mutex_;
  mutable std::vector<std::vector<float>> biases_;  // of each step, in codes; empty where maps are floats
  mutable std::shared_ptr<const Prepared> latest_;
};

}  // namespace bantamweight
