// A network of every kind of step on every variant, with float maps and with maps of codes: against the
// steps one by one, and bit for bit against the reference.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

#include "check.h"
#include "conv_network/conv_network.h"
#include "lowbit_conv/conv_plan.h"
#include "lowbit_linear/lowbit_linear.h"

using namespace bantamweight;

namespace {

using Kind = NetworkStep::Kind;

ConvShape shape_of(int64_t in, int64_t out, int64_t kernel, int64_t stride, int64_t padding) {
  ConvShape s;
  s.in_channels = in;
  s.out_channels = out;
  s.kernel_h = s.kernel_w = kernel;
  s.stride_h = s.stride_w = stride;
  s.pad_top = s.pad_bottom = s.pad_left = s.pad_right = padding;
  s.bits = 4;
  s.group_size = s.k();
  return s;
}

// A packed convolution with random weights, the same for every variant.
struct Conv {
  std::unique_ptr<uint8_t, void (*)(void*)> layout{nullptr, std::free};
  int64_t bytes = 0;
  ConvShape shape;
  std::vector<uint8_t> codes;
  std::vector<float> scale, zero, bias;

  // zero_of_all: of every channel, instead of random ones.
  Conv(const ConvShape& s, Isa ceiling, int seed, int zero_of_all = -1) : shape(s) {
    const Isa isa = conv_select(s, ceiling);
    check::Random random(static_cast<unsigned>(seed));
    codes.resize(static_cast<size_t>(s.out_channels * s.k()));
    for (uint8_t& code : codes) code = static_cast<uint8_t>(random.below(s.bits == 2 ? 4 : s.bits == 8 ? 256 : 16));
    for (int64_t i = 0; i < s.out_channels; ++i) {
      scale.push_back(0.02f * (1.5f + random.uniform()));
      zero.push_back(static_cast<float>(zero_of_all < 0 ? random.below(16) : zero_of_all));
      bias.push_back(random.uniform());
    }
    bytes = conv_layout_bytes(s, isa);
    layout.reset(static_cast<uint8_t*>(std::aligned_alloc(64, static_cast<size_t>(bytes))));
    CHECK(conv_pack(s, isa, codes.data(), scale.data(), zero.data(), layout.get(), bytes) == Status::ok);
  }

  NetworkStep step(int64_t input, int64_t residual, bool relu) const {
    NetworkStep made;
    made.input = input;
    made.residual = residual;
    made.relu = relu;
    made.layout = layout.get();
    made.layout_bytes = bytes;
    made.bias = bias.data();
    return made;
  }
};

NetworkStep step_of(Kind kind, int64_t input) {
  NetworkStep made;
  made.kind = kind;
  made.input = input;
  return made;
}

std::vector<float> random_images(int64_t count, int64_t floats, check::Random& random) {
  std::vector<float> x(static_cast<size_t>(count * floats));
  for (float& value : x) value = random.uniform();
  return x;
}

struct Convs {
  Conv stem, same, point, down;
  explicit Convs(Isa isa)
      : stem(shape_of(3, 12, 3, 1, 1), isa, 1),
        same(shape_of(12, 12, 3, 1, 1), isa, 2),
        point(shape_of(12, 20, 1, 2, 0), isa, 3),
        down(shape_of(20, 70, 3, 2, 1), isa, 4) {}

  std::vector<NetworkStep> steps() const {
    NetworkStep pool = step_of(Kind::max_pool, 3), shortcut = step_of(Kind::subsample, 4), sum = step_of(Kind::add, 5);
    pool.kernel_h = pool.kernel_w = 3;
    pool.stride_h = 2;
    pool.pad_h = pool.pad_w = 1;
    shortcut.stride_h = shortcut.stride_w = 2;
    shortcut.channels_before = 3;
    shortcut.channels_after = 5;
    sum.residual = 6;
    sum.relu = true;
    return {stem.step(0, -1, true),
            same.step(1, -1, true),
            same.step(2, 1, true),
            pool,
            shortcut,
            point.step(4, -1, true),
            sum,
            down.step(7, -1, false)};
  }
};

struct Result {
  Status status;
  ImageSize size;
  std::vector<float> y;
};

Result run(const std::vector<NetworkStep>& steps, int64_t images, int64_t height, int64_t width,
           const std::vector<float>& x, bool channels_last) {
  const ConvNetwork network(steps);
  Result result;
  result.status = network.output_size({3, height, width}, &result.size);
  if (result.status != Status::ok) return result;
  ConvInput input = {x.data(), images, height, width, 3 * height * width, height * width, width, 1};
  if (channels_last) input = {x.data(), images, height, width, 3 * height * width, 1, 3 * width, 3};
  result.y.assign(static_cast<size_t>(images * result.size.floats()), -1234.5f);
  result.status = network.forward(input, 3, result.y.data());
  return result;
}

float relu(float x) { return x > 0.0f ? x : 0.0f; }

std::vector<float> conv_alone(const Conv& conv, const ConvShape& s, int64_t height, int64_t width,
                              const std::vector<float>& x) {
  std::vector<float> y(static_cast<size_t>(conv_out_height(s, height) * conv_out_width(s, width) * s.out_channels));
  const int64_t c = s.in_channels;
  const ConvInput input = {x.data(), 1, height, width, c * height * width, 1, c * width, c};
  CHECK(conv_forward(conv.layout.get(), conv.bytes, input, conv.bias.data(), y.data()) == Status::ok);
  return y;
}

// The same for one channels-last image, written out.
std::vector<float> by_hand(const Convs& convs, int64_t height, int64_t width, const std::vector<float>& x) {
  std::vector<float> first = conv_alone(convs.stem, shape_of(3, 12, 3, 1, 1), height, width, x);
  for (float& v : first) v = relu(v);
  std::vector<float> second = conv_alone(convs.same, shape_of(12, 12, 3, 1, 1), height, width, first);
  for (float& v : second) v = relu(v);
  std::vector<float> third = conv_alone(convs.same, shape_of(12, 12, 3, 1, 1), height, width, second);
  for (size_t i = 0; i < third.size(); ++i) third[i] = relu(third[i] + first[i]);

  const int64_t half = (height - 1) / 2 + 1;
  std::vector<float> pooled(static_cast<size_t>(half * width * 12), -std::numeric_limits<float>::infinity());
  for (int64_t y = 0; y < half; ++y) {
    for (int64_t iy = std::max<int64_t>(0, 2 * y - 1); iy <= std::min(height - 1, 2 * y + 1); ++iy) {
      for (int64_t w = 0; w < width; ++w) {
        for (int64_t iw = std::max<int64_t>(0, w - 1); iw <= std::min(width - 1, w + 1); ++iw) {
          for (int64_t c = 0; c < 12; ++c) {
            float& to = pooled[static_cast<size_t>((y * width + w) * 12 + c)];
            to = std::max(to, third[static_cast<size_t>((iy * width + iw) * 12 + c)]);
          }
        }
      }
    }
  }
  std::vector<float> point = conv_alone(convs.point, shape_of(12, 20, 1, 2, 0), half, width, pooled);
  const int64_t out_h = (half - 1) / 2 + 1, out_w = (width - 1) / 2 + 1;
  for (int64_t y = 0; y < out_h; ++y) {
    for (int64_t w = 0; w < out_w; ++w) {
      for (int64_t c = 0; c < 20; ++c) {
        float& to = point[static_cast<size_t>((y * out_w + w) * 20 + c)];
        to = relu(to);
        if (c >= 3 && c < 15) to += pooled[static_cast<size_t>((2 * y * width + 2 * w) * 12 + c - 3)];
        to = relu(to);
      }
    }
  }
  return conv_alone(convs.down, shape_of(20, 70, 3, 2, 1), out_h, out_w, point);
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  if (a.size() != b.size()) return false;
  return a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

void test_variant(Isa isa) {
  const Convs convs(isa), oracle(Isa::reference);
  check::Random random(5);
  for (int64_t images : {int64_t{0}, int64_t{1}, int64_t{2}, int64_t{5}, int64_t{20}}) {
    const int64_t height = 5 + random.below(20), width = 6 + random.below(20);
    const std::vector<float> x = random_images(images, 3 * height * width, random);
    for (bool channels_last : {true, false}) {
      const Result ours = run(convs.steps(), images, height, width, x, channels_last);
      const Result reference = run(oracle.steps(), images, height, width, x, channels_last);
      CHECK(ours.status == Status::ok && reference.status == Status::ok);
      CHECK_NOTE(same_bits(ours.y, reference.y), "%s, %d images", isa_name(isa), static_cast<int>(images));
    }
    if (images == 0) continue;
    const Result last = run(convs.steps(), images, height, width, x, true);
    const auto floats = static_cast<int64_t>(last.y.size()) / images;
    for (int64_t n = 0; n < images; ++n) {
      const std::vector<float> image(x.begin() + n * 3 * height * width, x.begin() + (n + 1) * 3 * height * width);
      const std::vector<float> mine(last.y.begin() + n * floats, last.y.begin() + (n + 1) * floats);
      CHECK(same_bits(by_hand(convs, height, width, image), mine));
    }
  }
  // Small values that one L2 holds several images of end in an average.
  std::vector<NetworkStep> steps = {convs.stem.step(0, -1, true), step_of(Kind::average, 1)};
  const std::vector<float> x = random_images(9, 3 * 4 * 5, random);
  const Result averaged = run(steps, 9, 4, 5, x, true);
  const Result whole = run({steps[0]}, 9, 4, 5, x, true);
  CHECK(averaged.status == Status::ok && averaged.size.floats() == 12);
  for (int64_t n = 0; n < 9; ++n) {
    for (int64_t c = 0; c < 12; ++c) {
      double sum = 0;
      for (int64_t i = 0; i < 20; ++i) sum += static_cast<double>(whole.y[static_cast<size_t>((n * 20 + i) * 12 + c)]);
      CHECK(std::fabs(sum / 20 - static_cast<double>(averaged.y[static_cast<size_t>(n * 12 + c)])) < 1e-5);
    }
  }
}

// A map in doubles, channels last.
struct Image {
  int64_t channels, height, width;
  std::vector<double> values;
  double at(int64_t y, int64_t x, int64_t c) const {
    return values[static_cast<size_t>((y * width + x) * channels + c)];
  }
};

Image conv_in_doubles(const Conv& conv, const Image& x) {
  const ConvShape& s = conv.shape;
  Image y = {s.out_channels, conv_out_height(s, x.height), conv_out_width(s, x.width), {}};
  const int64_t depth = s.in_channels / s.groups, per_group = s.out_channels / s.groups;
  for (int64_t oy = 0; oy < y.height; ++oy) {
    for (int64_t ox = 0; ox < y.width; ++ox) {
      for (int64_t o = 0; o < s.out_channels; ++o) {
        double sum = 0.0;
        for (int64_t k = 0; k < s.k(); ++k) {
          const int64_t iy = oy * s.stride_h - s.pad_top + k / depth / s.kernel_w;
          const int64_t ix = ox * s.stride_w - s.pad_left + k / depth % s.kernel_w;
          if (iy < 0 || ix < 0 || iy >= x.height || ix >= x.width) continue;
          const double w =
              conv.codes[static_cast<size_t>(o * s.k() + k)] - static_cast<double>(conv.zero[static_cast<size_t>(o)]);
          sum += w * x.at(iy, ix, o / per_group * depth + k % depth);
        }
        y.values.push_back(sum * static_cast<double>(conv.scale[static_cast<size_t>(o)]) +
                           static_cast<double>(conv.bias[static_cast<size_t>(o)]));
      }
    }
  }
  return y;
}

Image plain_step(const NetworkStep& step, const Image& x) {
  Image y = x;
  y.values.clear();
  if (step.kind == Kind::max_pool) {
    y.height = (x.height + 2 * step.pad_h - step.kernel_h) / step.stride_h + 1;
    y.width = (x.width + 2 * step.pad_w - step.kernel_w) / step.stride_w + 1;
  } else if (step.kind == Kind::average) {
    y.height = y.width = 1;
  } else if (step.kind == Kind::subsample) {
    y = {x.channels + step.channels_before + step.channels_after,
         (x.height - 1) / step.stride_h + 1,
         (x.width - 1) / step.stride_w + 1,
         {}};
  }
  for (int64_t oy = 0; oy < y.height; ++oy) {
    for (int64_t ox = 0; ox < y.width; ++ox) {
      for (int64_t c = 0; c < y.channels; ++c) {
        double value = step.kind == Kind::max_pool ? -1e30 : 0.0;
        if (step.kind == Kind::subsample) {
          const int64_t from = c - step.channels_before;
          if (from >= 0 && from < x.channels) value = x.at(oy * step.stride_h, ox * step.stride_w, from);
        } else if (step.kind == Kind::average) {
          for (int64_t i = 0; i < x.height * x.width; ++i) value += x.at(i / x.width, i % x.width, c);
          value /= static_cast<double>(x.height * x.width);
        } else if (step.kind == Kind::max_pool) {
          for (int64_t ky = 0; ky < step.kernel_h; ++ky) {
            for (int64_t kx = 0; kx < step.kernel_w; ++kx) {
              const int64_t iy = oy * step.stride_h - step.pad_h + ky, ix = ox * step.stride_w - step.pad_w + kx;
              if (iy >= 0 && ix >= 0 && iy < x.height && ix < x.width) value = std::fmax(value, x.at(iy, ix, c));
            }
          }
        } else {
          value = x.at(oy, ox, c);
        }
        y.values.push_back(value);
      }
    }
  }
  return y;
}

// What a network of maps of codes is, for one channels-last image: each value rounded to its codes.
std::vector<double> by_hand_in_codes(const std::vector<NetworkStep>& steps, const std::vector<const Conv*>& convs,
                                     Image x) {
  double most = 0.0;
  for (double v : x.values) most = std::fmax(most, std::fabs(v));
  for (double& v : x.values) v = std::nearbyint(v * 127.0 / most) * most / 127.0;
  std::vector<Image> values = {x};
  for (size_t i = 0; i < steps.size(); ++i) {
    const NetworkStep& step = steps[i];
    const Image& from = values[static_cast<size_t>(step.input)];
    Image y = step.kind == Kind::conv ? conv_in_doubles(*convs[i], from) : plain_step(step, from);
    for (size_t j = 0; j < y.values.size(); ++j) {
      double& v = y.values[j];
      if (step.residual != -1) v += values[static_cast<size_t>(step.residual)].values[j];
      if (step.relu) v = std::fmax(v, 0.0);
      if (step.scale == 0.0f) continue;
      const double scale = static_cast<double>(step.scale), zero = static_cast<double>(step.zero);
      v = scale * (std::fmin(std::fmax(std::nearbyint(v / scale + zero), -127.0), 127.0) - zero);
    }
    values.push_back(y);
  }
  return values.back().values;
}

struct CodeNetwork {
  Conv stem, same, grouped, depthwise, point, narrow, down;
  std::vector<NetworkStep> steps;
  std::vector<const Conv*> convs;

  static ConvShape in_groups(ConvShape s, int64_t groups) {
    s.groups = groups;
    s.group_size = s.k();
    return s;
  }

  // Every kind of step, borders of several widths, and several groups of k; a value of all that may be read
  // by others, a residual with and without ReLU.
  explicit CodeNetwork(Isa isa)
      : stem(shape_of(3, 12, 3, 1, 1), isa, 1),
        same(shape_of(12, 12, 5, 1, 2), isa, 2),
        grouped(in_groups(shape_of(12, 24, 3, 1, 1), 2), isa, 5),
        depthwise(in_groups(shape_of(24, 24, 3, 1, 1), 24), isa, 6),
        point(shape_of(24, 72, 1, 2, 0), isa, 3),
        narrow(shape_of(72, 20, 1, 1, 0), isa, 7),
        down(shape_of(20, 70, 3, 2, 1), isa, 4) {
    add(stem.step(0, -1, true), &stem, 0.02f, -127);
    add(same.step(1, -1, false), &same, 0.03f, 9);
    add(same.step(2, 1, true), &same, 0.04f, -127);
    NetworkStep pool = step_of(Kind::max_pool, 3), shortcut = step_of(Kind::subsample, 6);
    pool.kernel_h = pool.kernel_w = 3;
    pool.stride_h = 2;
    pool.pad_h = pool.pad_w = 1;
    add(pool, nullptr, 0.04f, -127);
    add(grouped.step(4, -1, false), &grouped, 0.05f, -3);
    add(depthwise.step(5, 5, true), &depthwise, 0.06f, -127);
    shortcut.stride_h = shortcut.stride_w = 2;
    shortcut.channels_before = 7;
    shortcut.channels_after = 41;
    add(shortcut, nullptr, 0.06f, -127);
    add(point.step(6, -1, false), &point, 0.07f, 1);
    NetworkStep sum = step_of(Kind::add, 7);
    sum.residual = 8;
    add(sum, nullptr, 0.09f, -20);
    add(narrow.step(9, -1, true), &narrow, 0.1f, -127);
    add(down.step(10, -1, false), &down, 0.0f, 0);
  }

  void add(NetworkStep step, const Conv* conv, float scale, int64_t zero) {
    step.scale = scale;
    step.zero = zero;
    steps.push_back(step);
    convs.push_back(conv);
  }

  // The first `count` steps; the last gives floats.
  std::vector<NetworkStep> first(size_t count) const {
    std::vector<NetworkStep> some(steps.begin(), steps.begin() + static_cast<std::ptrdiff_t>(count));
    some.back().scale = 0.0f;
    some.back().zero = 0;
    return some;
  }
};

void test_codes(Isa isa) {
  const CodeNetwork network(isa), oracle(Isa::reference);
  check::Random random(6);
  for (size_t count = 1; count <= network.steps.size() + 1; ++count) {
    std::vector<NetworkStep> steps, reference_steps;
    if (count <= network.steps.size()) {
      steps = network.first(count);
      reference_steps = oracle.first(count);
    } else {  // and an average of codes
      steps = network.first(10);
      reference_steps = oracle.first(10);
      for (auto* each : {&steps, &reference_steps}) {
        each->back().scale = 0.1f;
        each->back().zero = -127;
        each->push_back(step_of(Kind::average, 10));
      }
    }
    for (int64_t images : {int64_t{1}, int64_t{3}, int64_t{19}}) {
      const int64_t height = 5 + random.below(14), width = 6 + random.below(14);
      const std::vector<float> x = random_images(images, 3 * height * width, random);
      const Result ours = run(steps, images, height, width, x, true);
      const Result reference = run(reference_steps, images, height, width, x, true);
      CHECK(ours.status == Status::ok && reference.status == Status::ok);
      CHECK_NOTE(same_bits(ours.y, reference.y), "%s, %d steps, %d images of %d x %d", isa_name(isa),
                 static_cast<int>(count), static_cast<int>(images), static_cast<int>(height), static_cast<int>(width));
      if (isa != Isa::reference) continue;
      const Image image = {3, height, width, std::vector<double>(x.begin(), x.begin() + 3 * height * width)};
      const std::vector<double> expected = by_hand_in_codes(steps, network.convs, image);
      double error = 0.0, size = 0.0;
      for (size_t i = 0; i < expected.size(); ++i) {
        error += std::pow(expected[i] - static_cast<double>(ours.y[i]), 2.0);
        size += std::pow(expected[i], 2.0);
      }
      CHECK_NOTE(error <= 1e-5 * size, "%d steps are off by %g", static_cast<int>(count), std::sqrt(error / size));
    }
  }
}

// What a plan for such maps keeps of the weight.
KeptWeight kept_of(const Conv& conv, int64_t border, int64_t height, int64_t width) {
  ConvPlan plan;
  const CodeMap map = {conv.shape.in_channels, height, width, border, border, border, border};
  CHECK(conv_plan_codes(conv.layout.get(), conv.bytes, map, &plan) == Status::ok);
  CHECK(conv_keep_weight(conv.bias.data(), &plan) == Status::ok);
  return std::move(plan.kept);
}

// Bit for bit what the reference gives for images of such sizes.
void against_reference(const char* what, Isa isa, const std::vector<NetworkStep>& steps,
                       const std::vector<NetworkStep>& reference_steps, const std::vector<int64_t>& counts,
                       int64_t height, const std::vector<int64_t>& widths, uint64_t seed) {
  check::Random random(seed);
  for (int64_t images : counts) {
    for (int64_t width : widths) {
      const std::vector<float> x = random_images(images, 3 * height * width, random);
      const Result ours = run(steps, images, height, width, x, true);
      const Result reference = run(reference_steps, images, height, width, x, true);
      CHECK(ours.status == Status::ok && reference.status == Status::ok);
      CHECK_NOTE(same_bits(ours.y, reference.y), "%s, %s weights, %d images of %d x %d", isa_name(isa), what,
                 static_cast<int>(images), static_cast<int>(height), static_cast<int>(width));
    }
  }
}

// Convolutions whose weights the plan keeps where the variant has a kernel for that, with residuals and
// borders, and one that it never keeps. A single image of this size is shared by the threads.
void test_kept(Isa isa) {
  struct Narrow {
    Conv stem, same, down, point, apart, last;
    explicit Narrow(Isa of)
        : stem(shape_of(3, 16, 3, 1, 1), of, 1, 8),
          same(shape_of(16, 16, 3, 1, 1), of, 2, 8),
          down(shape_of(16, 48, 3, 2, 1), of, 3, 5),
          point(shape_of(48, 80, 1, 1, 0), of, 4, 8),
          apart(shape_of(80, 64, 1, 1, 0), of, 5),
          last(shape_of(64, 10, 3, 1, 1), of, 6, 8) {}
    std::vector<NetworkStep> steps() const {
      std::vector<NetworkStep> made = {stem.step(0, -1, true),  same.step(1, -1, true),  same.step(2, 1, true),
                                       down.step(3, -1, false), point.step(4, -1, true), apart.step(5, -1, true),
                                       last.step(6, -1, false)};
      for (size_t i = 0; i + 1 < made.size(); ++i) {
        made[i].scale = 0.02f + 0.02f * static_cast<float>(i);
        made[i].zero = made[i].relu ? -127 : 4;
      }
      return made;
    }
  };
  const Narrow network(isa), oracle(Isa::reference);
  const bool has_kernel = isa != Isa::reference && resident_conv_pick(isa)->isa == isa;
  for (const Conv* conv : {&network.same, &network.down, &network.point}) {
    CHECK((kept_of(*conv, conv->shape.pad_top, 45, 47).kernel != nullptr) == has_kernel);
  }
  CHECK(kept_of(network.apart, 0, 45, 47).kernel == nullptr);  // a zero for each channel
  CHECK(kept_of(network.last, 1, 45, 47).kernel == nullptr);   // 10 channels
  against_reference("kept", isa, network.steps(), oracle.steps(), {1, 5}, 45, {47, 32, 9}, 7);
}

// Convolutions whose weights are unpacked at each call where the variant has a kernel for that: of all bits, with
// pieces that fill no quad, a stride, a residual, and one of more channels than are unpacked together.
void test_unpacked(Isa isa) {
  struct Wide {
    Conv stem, spare, two, same, eight, point, last;
    static ConvShape with_bits(ConvShape s, int64_t bits) {
      s.bits = bits;
      return s;
    }
    explicit Wide(Isa of)
        : stem(shape_of(3, 70, 3, 2, 1), of, 1),
          spare(shape_of(70, 96, 3, 1, 1), of, 2, 8),
          two(with_bits(shape_of(96, 128, 3, 1, 1), 2), of, 3, 1),
          same(shape_of(128, 128, 3, 1, 1), of, 4, 8),
          eight(with_bits(shape_of(128, 512, 3, 2, 1), 8), of, 5, 128),
          point(shape_of(512, 160, 1, 2, 0), of, 6, 8),
          last(shape_of(160, 10, 1, 1, 0), of, 7, 8) {}
    std::vector<NetworkStep> steps() const {
      std::vector<NetworkStep> made = {stem.step(0, -1, true), spare.step(1, -1, true),  two.step(2, -1, false),
                                       same.step(3, 3, true),  eight.step(4, -1, false), point.step(5, -1, true),
                                       last.step(6, -1, false)};
      const float scale[] = {0.05f, 0.1f, 0.2f, 0.9f, 200.0f, 90.0f};  // about those of the values
      for (size_t i = 0; i + 1 < made.size(); ++i) {
        made[i].scale = scale[i];
        made[i].zero = made[i].relu ? -127 : 4;
      }
      return made;
    }
  };
  const Wide network(isa), oracle(Isa::reference);
  const bool has_kernel = isa != Isa::reference && resident_conv_pick(isa)->isa == isa;
  for (const Conv* conv : {&network.spare, &network.two, &network.same, &network.eight, &network.point}) {
    const KeptWeight kept = kept_of(*conv, conv->shape.pad_top, 14, 14);
    CHECK((kept.kernel != nullptr) == has_kernel && !kept.resident);
  }
  against_reference("unpacked", isa, network.steps(), oracle.steps(), {1, 3}, 28, {28, 13, 3}, 9);
}

// A window of more rows and columns than are compared at a time, most of it in the padding at the borders.
void test_wide_pool(Isa isa) {
  const CodeNetwork network(isa), oracle(Isa::reference);
  NetworkStep pool = step_of(Kind::max_pool, 1);
  pool.kernel_h = 35;
  pool.kernel_w = 18;
  pool.stride_h = 3;
  pool.pad_h = 17;
  pool.pad_w = 9;
  check::Random random(8);
  const std::vector<float> x = random_images(2, 3 * 37 * 21, random);
  const Result ours = run({network.steps[0], pool}, 2, 37, 21, x, true);
  const Result reference = run({oracle.steps[0], pool}, 2, 37, 21, x, true);
  CHECK(ours.status == Status::ok && same_bits(ours.y, reference.y));
  const Image image = {3, 37, 21, std::vector<double>(x.begin(), x.begin() + 3 * 37 * 21)};
  const std::vector<double> expected = by_hand_in_codes({network.steps[0], pool}, {&network.stem, nullptr}, image);
  for (size_t i = 0; i < expected.size(); ++i) {  // a code, where a rounding of the convolution's is a tie
    CHECK(std::fabs(expected[i] - static_cast<double>(ours.y[i])) < 0.021);
  }
}

void test_refused_codes() {
  const CodeNetwork network(Isa::reference);
  const std::vector<float> x(3 * 12 * 12, 1.0f);
  const auto status = [&](size_t step, float scale, int64_t zero) {
    std::vector<NetworkStep> steps = network.steps;
    steps[step].scale = scale;
    steps[step].zero = zero;
    return run(steps, 1, 12, 12, x, true).status;
  };
  CHECK(status(0, 0.02f, -127) == Status::ok);
  CHECK(status(0, 0.0f, 0) == Status::invalid_argument);      // floats between codes
  CHECK(status(0, 0.02f, -126) == Status::invalid_argument);  // ReLU
  CHECK(status(0, -0.02f, -127) == Status::invalid_argument);
  CHECK(status(1, 1e-42f, 0) == Status::invalid_argument);
  CHECK(status(1, std::numeric_limits<float>::infinity(), 0) == Status::invalid_argument);
  CHECK(status(1, 0.03f, 128) == Status::invalid_argument);
  CHECK(status(3, 0.05f, -127) == Status::invalid_argument);  // pooling keeps its input's
  CHECK(status(10, 0.05f, 0) == Status::invalid_argument);    // the last gives floats
}

void test_refusals() {
  const Convs convs(Isa::reference);
  std::vector<float> x(3 * 8 * 8, 1.0f);
  const auto status = [&](const std::vector<NetworkStep>& steps) { return run(steps, 1, 8, 8, x, true).status; };
  CHECK(status(convs.steps()) == Status::ok);
  CHECK(status({}) == Status::invalid_argument);
  CHECK(status({convs.same.step(0, -1, false)}) == Status::invalid_argument);  // channels
  CHECK(status({convs.stem.step(1, -1, false)}) == Status::invalid_argument);  // not yet there
  CHECK(status({convs.stem.step(0, 0, false)}) == Status::invalid_argument);   // the caller's
  CHECK(status({convs.stem.step(0, -1, false), convs.point.step(1, 1, false)}) == Status::invalid_argument);  // sizes
  CHECK(status({step_of(Kind::average, 0)}) == Status::invalid_argument);
  CHECK(status({convs.stem.step(0, -1, false), step_of(Kind::add, 1)}) == Status::invalid_argument);
  NetworkStep pool = step_of(Kind::max_pool, 1);
  pool.pad_h = 1;  // windows in the padding alone
  CHECK(status({convs.stem.step(0, -1, false), pool}) == Status::invalid_argument);
  pool.pad_h = 0;
  pool.kernel_h = 9;
  CHECK(status({convs.stem.step(0, -1, false), pool}) == Status::invalid_argument);
  x[5] = std::numeric_limits<float>::infinity();
  CHECK(status(convs.steps()) == Status::not_finite);
}

}  // namespace

int main() {
  Isa ceiling;
  if (const char* why = isa_ceiling(&ceiling)) {
    std::printf("%s\n", why);
    return 1;
  }
  std::size_t count;
  const Isa* isas = linear_variants(&count);
  for (std::size_t i = 0; i < count; ++i) {
    if (isas[i] > ceiling || isa_missing(isas[i]) != nullptr) continue;
    test_variant(isas[i]);
    test_codes(isas[i]);
    test_kept(isas[i]);
    test_unpacked(isas[i]);
    test_wide_pool(isas[i]);
    std::printf("  conv_network    %-12s ran, equal to the reference\n", isa_name(isas[i]));
  }
  test_refusals();
  test_refused_codes();
  return check::report("test_conv_network");
}
