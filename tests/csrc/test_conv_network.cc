// A network of every kind of step on every variant: against the steps one by one, and bit for bit
// against the reference.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "check.h"
#include "conv_network/conv_network.h"
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
  std::vector<float> bias;

  Conv(const ConvShape& s, Isa isa, int seed) {
    check::Random random(static_cast<unsigned>(seed));
    std::vector<uint8_t> codes(static_cast<size_t>(s.out_channels * s.k()));
    for (uint8_t& code : codes) code = static_cast<uint8_t>(random.below(16));
    std::vector<float> scale, zero;
    for (int64_t i = 0; i < s.out_channels; ++i) {
      scale.push_back(0.02f * (1.5f + random.uniform()));
      zero.push_back(static_cast<float>(random.below(16)));
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
    std::printf("  conv_network    %-12s ran, equal to the reference\n", isa_name(isas[i]));
  }
  test_refusals();
  return check::report("test_conv_network");
}
