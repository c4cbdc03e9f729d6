// What a network must be, its sizes and biases, and images shared out over the threads.
#include "conv_network/conv_network.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <new>

#include "conv_network/prepared.h"
#include "lowbit_conv/conv_plan.h"
#include "runtime/scratch.h"
#include "runtime/threads.h"

namespace bantamweight {
namespace {

using Kind = NetworkStep::Kind;

int64_t pooled(int64_t size, int64_t kernel, int64_t stride, int64_t padding) {
  return size + 2 * padding < kernel ? 0 : (size + 2 * padding - kernel) / stride + 1;
}

// The output of a step whose input is of the size `in`; 0 pixels where it takes no such input.
Status size_after(const NetworkStep& step, const ImageSize& in, ImageSize* out) {
  *out = in;
  switch (step.kind) {
    case Kind::conv: {
      ConvShape shape;
      Isa isa;
      const Status status = conv_describe(step.layout, step.layout_bytes, &shape, &isa);
      if (status != Status::ok) return status;
      if (shape.in_channels != in.channels) return Status::invalid_argument;
      *out = {shape.out_channels, conv_out_height(shape, in.height), conv_out_width(shape, in.width)};
      break;
    }
    case Kind::max_pool:
      out->height = pooled(in.height, step.kernel_h, step.stride_h, step.pad_h);
      out->width = pooled(in.width, step.kernel_w, step.stride_w, step.pad_w);
      break;
    case Kind::average:
      out->height = out->width = 1;
      break;
    case Kind::subsample:
      *out = {step.channels_before + in.channels + step.channels_after, (in.height - 1) / step.stride_h + 1,
              (in.width - 1) / step.stride_w + 1};
      break;
    case Kind::add:
      break;
  }
  return out->height > 0 && out->width > 0 ? Status::ok : Status::invalid_argument;
}

bool has_codes(const std::vector<NetworkStep>& steps) {
  return std::any_of(steps.begin(), steps.end(), [](const NetworkStep& step) { return step.scale != 0.0f; });
}

// The scale and zero of a step's output, in a network with codes.
bool sound_codes(const std::vector<NetworkStep>& steps, size_t i) {
  const NetworkStep& s = steps[i];
  if (i + 1 == steps.size()) return s.scale == 0.0f && s.zero == 0;
  if (!(std::isnormal(s.scale) && s.scale > 0.0f) || s.zero < -127 || s.zero > 127) return false;
  if (s.kind == Kind::max_pool || s.kind == Kind::subsample) {
    const NetworkStep& from = steps[static_cast<size_t>(s.input) - 1];
    return s.scale == from.scale && s.zero == from.zero;
  }
  return !s.relu || s.zero == -127;
}

bool sound(const std::vector<NetworkStep>& steps) {
  const bool codes = has_codes(steps);
  for (size_t i = 0; i < steps.size(); ++i) {
    const NetworkStep& s = steps[i];
    const auto known = [&](int64_t value) { return value >= 0 && value <= static_cast<int64_t>(i); };
    if (!known(s.input) || (s.residual != -1 && !known(s.residual))) return false;
    if (s.kind == Kind::add && s.residual == -1) return false;
    if (s.kernel_h < 1 || s.kernel_w < 1 || s.stride_h < 1 || s.stride_w < 1 || s.channels_before < 0) return false;
    // A window that lies in the padding alone would have no largest element.
    if (s.pad_h < 0 || s.pad_w < 0 || 2 * s.pad_h > s.kernel_h || 2 * s.pad_w > s.kernel_w) return false;
    // Only convolutions read the caller's images, whose strides may be any.
    if (s.channels_after < 0 || (s.input == 0 && s.kind != Kind::conv) || s.residual == 0) return false;
    if (codes && !sound_codes(steps, i)) return false;
  }
  return !steps.empty();
}

}  // namespace

ConvNetwork::ConvNetwork(std::vector<NetworkStep> steps) : steps_(std::move(steps)) {}

ConvNetwork::~ConvNetwork() = default;

Status ConvNetwork::prepared_for(const ImageSize& input, std::shared_ptr<const Prepared>* out) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (latest_ != nullptr && latest_->input.channels == input.channels && latest_->input.height == input.height &&
      latest_->input.width == input.width) {
    *out = latest_;
    return Status::ok;
  }
  if (!sound(steps_)) return Status::invalid_argument;
  const bool codes = has_codes(steps_);
  if (codes && biases_.empty()) {
    const Status status = fold_zeros();
    if (status != Status::ok) return status;
  }
  auto prepared = std::make_shared<Prepared>();
  prepared->input = input;
  prepared->codes = codes;
  prepared->size.push_back(input);
  prepared->plan.resize(steps_.size());
  for (size_t i = 0; i < steps_.size(); ++i) {
    const NetworkStep& step = steps_[i];
    const ImageSize& in = prepared->size[static_cast<size_t>(step.input)];
    ImageSize after;
    Status status = size_after(step, in, &after);
    if (status != Status::ok) return status;
    if (step.residual != -1) {
      const ImageSize& other = prepared->size[static_cast<size_t>(step.residual)];
      if (other.channels != after.channels || other.height != after.height || other.width != after.width) {
        return Status::invalid_argument;
      }
    }
    prepared->size.push_back(after);
  }
  Status status = prepared->add_borders(steps_);
  for (size_t i = 0; i < steps_.size() && status == Status::ok; ++i) {
    const NetworkStep& step = steps_[i];
    if (step.kind != Kind::conv) continue;
    const auto from = static_cast<size_t>(step.input);
    ConvPlan* plan = &prepared->plan[i];
    status = codes && from != 0 ? conv_plan_codes(step.layout, step.layout_bytes, prepared->map[from], plan)
                                : conv_plan(step.layout, step.layout_bytes, prepared->size[from].height,
                                            prepared->size[from].width, plan);
    prepared->isa = plan->layout.isa;
    if (codes && i + 1 < steps_.size() && status == Status::ok) {
      status = conv_keep_weight(biases_[i].data(), plan);
    }
  }
  if (status != Status::ok) return status;
  prepared->cut(steps_);
  latest_ = *out = std::move(prepared);
  return Status::ok;
}

// What a convolution of codes adds to its sums, in codes of its output:
//
//   (b - s z sum_k W + ..) / s' + z'       s, z of the input, s', z' of the output, .. -s'' z'' of what is added
//
// so that the zeros cost nothing afterwards. In doubles: every variant gets the same floats.
Status ConvNetwork::fold_zeros() const {
  std::vector<std::vector<float>> biases(steps_.size());
  for (size_t i = 0; i < steps_.size(); ++i) {
    const NetworkStep& step = steps_[i];
    if (step.kind != Kind::conv) continue;
    ConvShape s;
    Isa isa;
    Status status = conv_describe(step.layout, step.layout_bytes, &s, &isa);
    if (status != Status::ok) return status;
    if (s.depthwise()) continue;
    const int64_t k = s.k(), groups = (k + s.group_size - 1) / s.group_size;
    std::vector<uint8_t> codes(static_cast<size_t>(s.out_channels * k));
    std::vector<float> scale(static_cast<size_t>(s.out_channels * groups)), zero(scale.size());
    status = conv_unpack(step.layout, step.layout_bytes, codes.data(), scale.data(), zero.data());
    if (status != Status::ok) return status;
    const auto shift = [&](int64_t value) {  // -s z
      if (value <= 0) return 0.0;
      const NetworkStep& from = steps_[static_cast<size_t>(value) - 1];
      return -static_cast<double>(from.scale) * static_cast<double>(from.zero);
    };
    const double to_output = step.scale == 0.0f ? 1.0 : 1.0 / static_cast<double>(step.scale);
    for (int64_t n = 0; n < s.out_channels; ++n) {
      double sum = 0.0;
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t begin = g * s.group_size, end = std::min(k, begin + s.group_size);
        int64_t in_group = 0;
        for (int64_t j = begin; j < end; ++j) in_group += codes[static_cast<size_t>(n * k + j)];
        const auto at = static_cast<size_t>(n * groups + g);
        sum += static_cast<double>(scale[at]) *
               (static_cast<double>(in_group) - static_cast<double>(zero[at]) * static_cast<double>(end - begin));
      }
      const double bias = step.bias == nullptr ? 0.0 : static_cast<double>(step.bias[n]);
      biases[i].push_back(static_cast<float>((bias + shift(step.input) * sum + shift(step.residual)) * to_output +
                                             static_cast<double>(step.zero)));
    }
  }
  biases_ = std::move(biases);
  return Status::ok;
}

Status ConvNetwork::output_size(const ImageSize& input, ImageSize* output) const try {
  std::shared_ptr<const Prepared> prepared;
  const Status status = prepared_for(input, &prepared);
  if (status == Status::ok) *output = prepared->size.back();
  return status;
} catch (const std::bad_alloc&) {
  return Status::out_of_memory;
}

Status ConvNetwork::forward(const ConvInput& input, int64_t channels, float* y) const try {
  std::shared_ptr<const Prepared> found;
  const Status status = prepared_for({channels, input.height, input.width}, &found);
  if (status != Status::ok) return status;
  const Prepared& prepared = *found;
  const int64_t threads = available_threads(), out_floats = prepared.size.back().floats();
  std::atomic<int> worst{static_cast<int>(Status::ok)};
  const auto run = [&](int64_t first, int64_t count) {
    thread_local Scratch scratch;
    uint8_t* memory = scratch.get(prepared.memory_bytes(count));
    Status done = Status::out_of_memory;
    if (memory != nullptr) {
      ConvInput part = input;
      part.x += first * input.stride_n;
      part.images = count;
      done = prepared.run(steps_, biases_, part, memory, y + first * out_floats);
    }
    if (done != Status::ok) worst.store(static_cast<int>(done));
  };
  // Whole images to each thread; those that do not go round share their layers out inside.
  const int64_t whole = input.images / threads * threads;
  const int64_t together = std::clamp<int64_t>(whole / threads, 1, kMaxImages);
  for_each_shared((whole + together - 1) / together, threads > 1,
                  [&](int64_t b) { run(b * together, std::min(together, whole - b * together)); });
  for (int64_t i = whole; i < input.images; ++i) run(i, 1);
  return static_cast<Status>(worst.load());
} catch (const std::bad_alloc&) {
  return Status::out_of_memory;
}

}  // namespace bantamweight
