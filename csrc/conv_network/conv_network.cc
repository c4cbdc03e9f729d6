#include "conv_network/conv_network.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <new>

#include "epilogue/epilogue.h"
#include "lowbit_conv/conv_plan.h"
#include "runtime/scratch.h"
#include "runtime/threads.h"

namespace bantamweight {
namespace {

using Kind = NetworkStep::Kind;

constexpr int64_t kAlign = 64;

int64_t align(int64_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

int64_t pooled(int64_t size, int64_t kernel, int64_t stride, int64_t padding) {
  return size + 2 * padding < kernel ? 0 : (size + 2 * padding - kernel) / stride + 1;
}

// y = the largest of each window; the padding holds nothing.
void max_pool(const NetworkStep& step, const ImageSize& in, const ImageSize& out, const float* x, float* y) {
  const int64_t channels = in.channels;
  for_each_shared(out.height, in.floats() > (1 << 17), [&](int64_t oy) {
    const int64_t top = oy * step.stride_h - step.pad_h;
    const int64_t y_begin = std::max<int64_t>(0, top), y_end = std::min(in.height, top + step.kernel_h);
    for (int64_t ox = 0; ox < out.width; ++ox) {
      const int64_t left = ox * step.stride_w - step.pad_w;
      const int64_t x_begin = std::max<int64_t>(0, left), x_end = std::min(in.width, left + step.kernel_w);
      float* to = y + (oy * out.width + ox) * channels;
      std::memcpy(to, x + (y_begin * in.width + x_begin) * channels, static_cast<size_t>(channels) * sizeof(float));
      for (int64_t iy = y_begin; iy < y_end; ++iy) {
        for (int64_t ix = x_begin; ix < x_end; ++ix) {
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

bool sound(const std::vector<NetworkStep>& steps) {
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
  }
  return !steps.empty();
}

// Bytes of memory that intervals of time share: lowest free place first.
class Arena {
 public:
  int64_t place(int64_t bytes, size_t from, size_t to) {
    int64_t at = 0;
    for (bool moved = true; moved;) {
      moved = false;
      for (const Taken& t : taken_) {
        if (t.from <= to && from <= t.to && at < t.begin + t.bytes && t.begin < at + bytes) {
          at = t.begin + t.bytes;
          moved = true;
        }
      }
    }
    taken_.push_back({at, bytes, from, to});
    size_ = std::max(size_, at + bytes);
    return at;
  }
  int64_t size() const { return size_; }

 private:
  struct Taken {
    int64_t begin, bytes;
    size_t from, to;
  };
  std::vector<Taken> taken_;
  int64_t size_ = 0;
};

}  // namespace

struct ConvNetwork::Prepared {
  ImageSize input;
  std::vector<ImageSize> size;                // of each value
  std::vector<ConvPlan> plan;                 // of each step; empty where it is no convolution
  std::vector<int64_t> value_at, scratch_at;  // bytes into the arena, of each value and of a step's activations
  int64_t images = 1;                         // that run together
  int64_t arena_bytes = 0;                    // for so many

  void place(const std::vector<NetworkStep>& steps, int64_t together);
  Status run(const std::vector<NetworkStep>& steps, const ConvInput& part, uint8_t* arena, float* y) const;
};

void ConvNetwork::Prepared::place(const std::vector<NetworkStep>& steps, int64_t together) {
  Arena arena;
  images = together;
  value_at.assign(size.size(), 0);
  scratch_at.assign(steps.size(), 0);
  for (size_t i = 0; i < steps.size(); ++i) {
    if (steps[i].kind == Kind::conv)
      scratch_at[i] = arena.place(conv_prepared_bytes(plan[i], images, steps[i].input != 0), i, i);
    if (i + 1 == steps.size()) break;  // the output lies in the caller's memory
    const auto value = static_cast<int64_t>(i + 1);
    size_t last = i;
    for (size_t j = i + 1; j < steps.size(); ++j) {
      if (steps[j].input == value || steps[j].residual == value) last = j;
    }
    const int64_t bytes = align(images * size[i + 1].floats() * static_cast<int64_t>(sizeof(float)));
    value_at[i + 1] = arena.place(bytes, i, last);
  }
  arena_bytes = arena.size();
}

Status ConvNetwork::Prepared::run(const std::vector<NetworkStep>& steps, const ConvInput& part, uint8_t* arena,
                                  float* y) const {
  const auto value = [&](int64_t v) {
    return v == static_cast<int64_t>(steps.size()) ? y
                                                   : reinterpret_cast<float*>(arena + value_at[static_cast<size_t>(v)]);
  };
  for (size_t i = 0; i < steps.size(); ++i) {
    const NetworkStep& step = steps[i];
    const ImageSize &in = size[static_cast<size_t>(step.input)], &out = size[i + 1];
    float* to = value(static_cast<int64_t>(i) + 1);
    const float* residual = step.residual == -1 ? nullptr : value(step.residual);
    if (step.kind == Kind::conv) {
      ConvInput input = part;
      if (step.input != 0) {
        input = {value(step.input),      part.images, in.height, in.width, in.floats(), 1,
                 in.width * in.channels, in.channels};
      }
      ConvActivations activations;
      Status status = conv_prepare(plan[i], input, arena + scratch_at[i], &activations);
      if (status == Status::ok) status = conv_multiply(plan[i], activations, step.bias, {residual, step.relu}, to);
      if (status != Status::ok) return status;
      continue;
    }
    const float* from = value(step.input);
    if (step.kind == Kind::add) {
      const int64_t count = part.images * out.floats();
      for (int64_t j = 0; j < count; ++j) {
        const float sum = from[j] + residual[j];
        to[j] = step.relu && !(sum > 0.0f) ? 0.0f : sum;
      }
      continue;
    }
    for (int64_t n = 0; n < part.images; ++n) {
      const float* x = from + n * in.floats();
      float* image = to + n * out.floats();
      if (step.kind == Kind::max_pool) max_pool(step, in, out, x, image);
      if (step.kind == Kind::average) average(in, x, image);
      if (step.kind == Kind::subsample) subsample(step, in, out, x, image);
    }
  }
  return Status::ok;
}

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
  auto prepared = std::make_shared<Prepared>();
  prepared->input = input;
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
    if (step.kind == Kind::conv) {
      status = conv_plan(step.layout, step.layout_bytes, in.height, in.width, &prepared->plan[i]);
      if (status != Status::ok) return status;
    }
    prepared->size.push_back(after);
  }
  // Small feature maps run several images at a time: as many as leave all that is alive in L2.
  constexpr int64_t kArenaBytes = 1 << 20;
  prepared->place(steps_, 1);
  const int64_t together = std::clamp<int64_t>(kArenaBytes / std::max<int64_t>(1, prepared->arena_bytes), 1, 16);
  if (together > 1) prepared->place(steps_, together);
  latest_ = *out = std::move(prepared);
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
    uint8_t* arena = scratch.get(prepared.arena_bytes);
    Status done = Status::out_of_memory;
    if (arena != nullptr) {
      ConvInput part = input;
      part.x += first * input.stride_n;
      part.images = count;
      done = prepared.run(steps_, part, arena, y + first * out_floats);
    }
    if (done != Status::ok) worst.store(static_cast<int>(done));
  };
  // Whole images to each thread; those that do not go round share their layers out inside.
  const int64_t whole = input.images / threads * threads;
  const int64_t together = std::clamp<int64_t>(whole / threads, 1, prepared.images);
  for_each_shared((whole + together - 1) / together, threads > 1,
                  [&](int64_t b) { run(b * together, std::min(together, whole - b * together)); });
  for (int64_t i = whole; i < input.images; ++i) run(i, 1);
  return static_cast<Status>(worst.load());
} catch (const std::bad_alloc&) {
  return Status::out_of_memory;
}

}  // namespace bantamweight
