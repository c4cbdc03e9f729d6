#include "conv_network/conv_network.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <new>

#include "conv_network/steps.h"
#include "lowbit_conv/conv_plan.h"
#include "runtime/scratch.h"
#include "runtime/threads.h"

namespace bantamweight {
namespace {

using Kind = NetworkStep::Kind;

constexpr int64_t kAlign = 64;

// Images that go through the whole network at a time, and what of their maps may be alive at once.
constexpr int64_t kMaxImages = 16, kAliveBytes = 2 << 20;

int64_t align(int64_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

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

// Steps that some images run through before the next ones do. One value enters and one leaves, which
// all images of a call have side by side.
struct Segment {
  size_t begin, end;        // steps; value `begin` enters
  int64_t images = 1;       // that run together
  int64_t arena_bytes = 0;  // for so many
};

struct ConvNetwork::Prepared {
  ImageSize input;
  bool codes = false;
  Isa isa = Isa::reference;     // of the last convolution, and the steps between
  std::vector<ImageSize> size;  // of each value
  std::vector<CodeMap> map;     // the same with borders
  std::vector<ConvPlan> plan;   // of each step; empty where it is no convolution
  std::vector<Segment> segments;
  std::vector<int64_t> value_at, scratch_at;  // bytes into the arena, of each value and of a step's activations

  Status add_borders(const std::vector<NetworkStep>& steps);
  int64_t value_bytes(size_t v, int64_t images) const;
  int64_t scratch_bytes(const std::vector<NetworkStep>& steps, size_t i, int64_t images) const;
  void place(const std::vector<NetworkStep>& steps, Segment* segment, int64_t together);
  void cut(const std::vector<NetworkStep>& steps);

  // Of the arena and of two values between segments.
  int64_t memory_bytes(int64_t images) const { return arena_bytes() + 2 * crossing_bytes(images); }
  int64_t arena_bytes() const;
  int64_t crossing_bytes(int64_t images) const;
  Status run(const std::vector<NetworkStep>& steps, const std::vector<std::vector<float>>& biases,
             const ConvInput& input, uint8_t* memory, float* y) const;
  Status run_step(const std::vector<NetworkStep>& steps, const std::vector<std::vector<float>>& biases, size_t i,
                  const ConvInput& images, uint8_t* scratch, uint8_t* from, uint8_t* residual, uint8_t* to) const;
  Maps maps(const std::vector<NetworkStep>& steps, int64_t v, uint8_t* memory) const;
};

// Each map with a border for every convolution that reads it.
Status ConvNetwork::Prepared::add_borders(const std::vector<NetworkStep>& steps) {
  for (const ImageSize& s : size) map.push_back({s.channels, s.height, s.width, 0, 0, 0, 0});
  if (!codes) return Status::ok;
  for (const NetworkStep& step : steps) {
    if (step.kind != Kind::conv || step.input == 0) continue;
    ConvShape s;
    Isa read;
    const Status status = conv_describe(step.layout, step.layout_bytes, &s, &read);
    if (status != Status::ok) return status;
    if (s.depthwise()) continue;
    CodeMap& from = map[static_cast<size_t>(step.input)];
    from.top = std::max(from.top, s.pad_top);
    from.bottom = std::max(from.bottom, s.pad_bottom);
    from.left = std::max(from.left, s.pad_left);
    from.right = std::max(from.right, s.pad_right);
  }
  return Status::ok;
}

// Kernels read 64 bytes past the codes.
int64_t ConvNetwork::Prepared::value_bytes(size_t v, int64_t images) const {
  const bool floats = !codes || v + 1 == size.size();
  return align(floats ? images * size[v].floats() * static_cast<int64_t>(sizeof(float))
                      : images * map[v].image_bytes() + 64);
}

int64_t ConvNetwork::Prepared::scratch_bytes(const std::vector<NetworkStep>& steps, size_t i, int64_t images) const {
  if (steps[i].kind != Kind::conv) return codes ? align(code_step_bytes(steps[i], map[i + 1], images)) : 0;
  const bool from_codes = codes && steps[i].input != 0;
  return from_codes ? conv_prepared_codes_bytes(plan[i], images)
                    : conv_prepared_bytes(plan[i], images, steps[i].input != 0);
}

void ConvNetwork::Prepared::place(const std::vector<NetworkStep>& steps, Segment* segment, int64_t together) {
  Arena arena;
  for (size_t i = segment->begin; i < segment->end; ++i) {
    scratch_at[i] = arena.place(scratch_bytes(steps, i, together), i, i);
    if (i + 1 == segment->end) break;
    const auto value = static_cast<int64_t>(i + 1);
    size_t last = i;
    for (size_t j = i + 1; j < segment->end; ++j) {
      if (steps[j].input == value || steps[j].residual == value) last = j;
    }
    value_at[i + 1] = arena.place(value_bytes(i + 1, together), i, last);
  }
  segment->images = together;
  segment->arena_bytes = arena.size();
}

// Segments end where a single value leads on. Small feature maps run several images at a time: as many
// as leave all that is alive near L2.
void ConvNetwork::Prepared::cut(const std::vector<NetworkStep>& steps) {
  value_at.assign(size.size(), 0);
  scratch_at.assign(steps.size(), 0);
  for (size_t begin = 0, i = 0; i < steps.size(); ++i) {
    const bool ends = std::all_of(steps.begin() + static_cast<std::ptrdiff_t>(i) + 1, steps.end(), [&](const auto& s) {
      const auto value = static_cast<int64_t>(i + 1);
      return s.input >= value && (s.residual == -1 || s.residual >= value);
    });
    if (!ends) continue;
    Segment segment = {begin, i + 1};
    place(steps, &segment, 1);
    const int64_t alive = segment.arena_bytes + value_bytes(begin, 1) + value_bytes(i + 1, 1);
    int64_t together = 1;
    while (2 * together <= kMaxImages && 2 * together * alive <= kAliveBytes) together *= 2;
    // Steps without a weight gain nothing from more images: they go with what is before them.
    const bool weights = std::any_of(steps.begin() + static_cast<std::ptrdiff_t>(begin),
                                     steps.begin() + static_cast<std::ptrdiff_t>(i) + 1,
                                     [](const auto& s) { return s.kind == Kind::conv; });
    if (!segments.empty() && (segments.back().images == together || !weights)) {
      segments.back().end = i + 1;
    } else {
      segment.images = together;
      segments.push_back(segment);
    }
    begin = i + 1;
  }
  for (Segment& segment : segments) place(steps, &segment, segment.images);
}

int64_t ConvNetwork::Prepared::arena_bytes() const {
  int64_t bytes = 0;
  for (const Segment& segment : segments) bytes = std::max(bytes, segment.arena_bytes);
  return bytes;
}

int64_t ConvNetwork::Prepared::crossing_bytes(int64_t images) const {
  int64_t bytes = 0;
  for (const Segment& segment : segments) {
    if (segment.end + 1 < size.size()) bytes = std::max(bytes, value_bytes(segment.end, images));
  }
  return bytes;
}

Maps ConvNetwork::Prepared::maps(const std::vector<NetworkStep>& steps, int64_t v, uint8_t* memory) const {
  Maps made;
  if (v <= 0) return made;
  const NetworkStep& step = steps[static_cast<size_t>(v) - 1];
  made.size = map[static_cast<size_t>(v)];
  made.scale = step.scale;
  made.zero = step.zero;
  if (step.scale == 0.0f) {
    made.floats = reinterpret_cast<float*>(memory);
  } else {
    made.codes = reinterpret_cast<int8_t*>(memory);
  }
  return made;
}

Status ConvNetwork::Prepared::run_step(const std::vector<NetworkStep>& steps,
                                       const std::vector<std::vector<float>>& biases, size_t i, const ConvInput& images,
                                       uint8_t* scratch, uint8_t* from, uint8_t* residual, uint8_t* to) const {
  const NetworkStep& step = steps[i];
  const ImageSize &in = size[static_cast<size_t>(step.input)], &out = size[i + 1];
  const auto* floats = reinterpret_cast<const float*>(from);
  if (!codes && step.kind != Kind::conv) {
    run_float_step(
        {step, in, out, images.images, floats, reinterpret_cast<const float*>(residual), reinterpret_cast<float*>(to)});
    return Status::ok;
  }
  ConvActivations activations;
  if (!codes) {
    ConvInput input = images;
    if (step.input != 0) {
      input = {floats, images.images, in.height, in.width, in.floats(), 1, in.width * in.channels, in.channels};
    }
    const Status status = conv_prepare(plan[i], input, scratch, &activations);
    if (status != Status::ok) return status;
    ConvEpilogue epilogue;
    epilogue.residual = reinterpret_cast<const float*>(residual);
    epilogue.relu = step.relu;
    return conv_multiply(plan[i], activations, step.bias, epilogue, reinterpret_cast<float*>(to));
  }

  const Maps x = maps(steps, step.input, from), added = maps(steps, step.residual, residual),
             y = maps(steps, static_cast<int64_t>(i) + 1, to);
  if (y.codes != nullptr) fill_border(y, images.images);
  if (step.kind != Kind::conv) {
    return run_code_step({step, isa, images.images, x, added, y, scratch});
  }
  const bool depthwise = plan[i].layout.run.depthwise();
  const float to_output = y.codes == nullptr ? 1.0f : 1.0f / y.scale;
  Status status = Status::ok;
  if (step.input == 0) {
    status = conv_prepare(plan[i], images, scratch, &activations, to_output);
  } else {
    const float factor = depthwise ? x.scale : x.scale * to_output;
    status = conv_prepare_codes(plan[i], x.size, x.codes, images.images, factor, x.zero, scratch, &activations);
  }
  if (status != Status::ok) return status;
  ConvEpilogue epilogue;
  epilogue.added_map = &added.size;
  epilogue.added = added.codes;
  epilogue.added_factor = added.scale * to_output;
  epilogue.codes_map = &y.size;
  epilogue.codes = y.codes;
  epilogue.relu = y.codes == nullptr && step.relu;
  epilogue.factor = to_output;
  epilogue.shift = added.shift() * to_output + static_cast<float>(y.zero);
  return conv_multiply(plan[i], activations, depthwise ? step.bias : biases[i].data(), epilogue, y.floats);
}

Status ConvNetwork::Prepared::run(const std::vector<NetworkStep>& steps, const std::vector<std::vector<float>>& biases,
                                  const ConvInput& input, uint8_t* memory, float* y) const {
  uint8_t* crossing[2] = {memory + arena_bytes(), memory + arena_bytes() + crossing_bytes(input.images)};
  for (const Segment& segment : segments) {
    const bool last = segment.end == steps.size();
    uint8_t* leaving = last ? reinterpret_cast<uint8_t*>(y) : crossing[1];
    const int64_t rounds = (input.images + segment.images - 1) / segment.images;
    for (int64_t round = 0; round < rounds; ++round) {
      const int64_t first = input.images * round / rounds;
      ConvInput part = input;
      part.x += first * input.stride_n;
      part.images = input.images * (round + 1) / rounds - first;
      const auto at = [&](int64_t v) -> uint8_t* {
        if (v <= 0) return nullptr;
        const auto value = static_cast<size_t>(v);
        if (value > segment.begin && value < segment.end) return memory + value_at[value];
        const bool floats = !codes || value == steps.size();
        const int64_t bytes =
            floats ? size[value].floats() * static_cast<int64_t>(sizeof(float)) : map[value].image_bytes();
        return (value == segment.begin ? crossing[0] : leaving) + first * bytes;
      };
      for (size_t i = segment.begin; i < segment.end; ++i) {
        const Status status = run_step(steps, biases, i, part, memory + scratch_at[i], at(steps[i].input),
                                       at(steps[i].residual), at(static_cast<int64_t>(i) + 1));
        if (status != Status::ok) return status;
      }
    }
    std::swap(crossing[0], crossing[1]);
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
