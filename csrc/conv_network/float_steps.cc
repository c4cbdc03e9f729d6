// Pooling, averages, shortcuts and sums on float maps.
#include <algorithm>
#include <cstring>

#include "conv_network/steps.h"
#include "runtime/threads.h"

namespace bantamweight {
namespace {

// y = the largest of each window.
void max_pool(const NetworkStep& step, const ImageSize& in, const ImageSize& out, const float* x, float* y) {
  const int64_t channels = in.channels;
  for_each_shared(out.height, in.floats() > (1 << 17), [&](int64_t oy) {
    for (int64_t ox = 0; ox < out.width; ++ox) {
      const Window window(step, in.height, in.width, oy, ox);
      const float* first = x + (window.y_begin * in.width + window.x_begin) * channels;
      float* to = y + (oy * out.width + ox) * channels;
      std::memcpy(to, first, static_cast<size_t>(channels) * sizeof(float));
      for (int64_t iy = window.y_begin; iy < window.y_end; ++iy) {
        for (int64_t ix = window.x_begin; ix < window.x_end; ++ix) {
          const float* from = x + (iy * in.width + ix) * channels;
          for (int64_t c = 0; c < channels; ++c) to[c] = from[c] > to[c] ? from[c] : to[c];
        }
      }
    }
  });
}

void average(const ImageSize& in, const float* x, float* y) {
  const int64_t pixels = in.height * in.width;
  std::fill(y, y + in.channels, 0.0f);
  for (int64_t i = 0; i < pixels; ++i) {
    for (int64_t c = 0; c < in.channels; ++c) y[c] += x[i * in.channels + c];
  }
  for (int64_t c = 0; c < in.channels; ++c) y[c] /= static_cast<float>(pixels);
}

void subsample(const NetworkStep& step, const ImageSize& in, const ImageSize& out, const float* x, float* y) {
  for (int64_t oy = 0; oy < out.height; ++oy) {
    for (int64_t ox = 0; ox < out.width; ++ox) {
      const float* from = x + (oy * step.stride_h * in.width + ox * step.stride_w) * in.channels;
      float* to = y + (oy * out.width + ox) * out.channels;
      std::fill(to, to + step.channels_before, 0.0f);
      std::memcpy(to + step.channels_before, from, static_cast<size_t>(in.channels) * sizeof(float));
      std::fill(to + step.channels_before + in.channels, to + out.channels, 0.0f);
    }
  }
}

}  // namespace

void run_float_step(const FloatStep& call) {
  using Kind = NetworkStep::Kind;
  if (call.step.kind == Kind::add) {
    const int64_t count = call.images * call.out.floats();
    for (int64_t j = 0; j < count; ++j) {
      const float sum = call.x[j] + call.residual[j];
      call.y[j] = call.step.relu && !(sum > 0.0f) ? 0.0f : sum;
    }
    return;
  }
  for (int64_t n = 0; n < call.images; ++n) {
    const float* x = call.x + n * call.in.floats();
    float* y = call.y + n * call.out.floats();
    if (call.step.kind == Kind::max_pool) max_pool(call.step, call.in, call.out, x, y);
    if (call.step.kind == Kind::average) average(call.in, x, y);
    if (call.step.kind == Kind::subsample) subsample(call.step, call.in, call.out, x, y);
  }
}

}  // namespace bantamweight
