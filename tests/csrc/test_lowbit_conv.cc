// Every variant of image quantization, depthwise and packed convolution that this CPU runs, bit for
// bit against the reference; the reference against plain double arithmetic.
//
// BANTAMWEIGHT_FORCE_KERNEL=name runs what stands under that ceiling.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

#include "check.h"
#include "depthwise_conv/depthwise_conv.h"
#include "lowbit_conv/lowbit_conv.h"
#include "lowbit_linear/lowbit_linear.h"
#include "quantize_images/quantize_images.h"

using namespace bantamweight;

namespace {

enum class Order { channels_last, channels_first, every_second };
enum class Zeros { uniform, per_channel, fractional };

struct Images {
  int64_t count, channels, height, width;
  std::vector<float> x;  // exactly as long as its strides need
  ConvInput input;
  float at(int64_t n, int64_t c, int64_t h, int64_t w) const {
    return x[static_cast<size_t>(n * input.stride_n + c * input.stride_c + h * input.stride_h + w * input.stride_w)];
  }
};

Images make_images(int64_t count, int64_t channels, int64_t height, int64_t width, Order order, check::Random& random) {
  Images images = {count, channels, height, width, {}, {}};
  const int64_t step = order == Order::every_second ? 2 : 1;
  ConvInput& in = images.input;
  in.images = count;
  in.height = height;
  in.width = width;
  if (order == Order::channels_last) {
    in.stride_c = 1;
    in.stride_w = channels;
    in.stride_h = width * channels;
  } else {
    in.stride_w = step;
    in.stride_h = width * step;
    in.stride_c = height * width * step;
  }
  in.stride_n = channels * height * width * step;
  images.x.resize(static_cast<size_t>(count * in.stride_n));
  for (float& value : images.x) value = 3.0f * random.uniform();
  in.x = images.x.data();
  return images;
}

struct QuantizedImages {
  Status status;
  std::vector<int8_t> q;
  std::vector<float> scale;
  std::vector<int32_t> sums;
};

QuantizedImages quantize(const Images& images, int64_t padding, int64_t slice_size, Isa isa) {
  const int64_t pixels = images.count * (images.height + 2 * padding) * (images.width + 2 * padding);
  QuantizedImages out;
  out.q.assign(static_cast<size_t>(pixels * images.channels), 99);
  out.scale.assign(static_cast<size_t>(images.count), -1.0f);
  out.sums.assign(static_cast<size_t>(pixels * (images.channels / slice_size)), -1);
  const ConvInput& in = images.input;
  out.status = quantize_images(
      {in.x, in.images, images.channels, in.height, in.width, in.stride_n, in.stride_c, in.stride_h, in.stride_w,
       padding, padding, padding, padding, slice_size, out.q.data(), out.scale.data(), out.sums.data()},
      isa);
  return out;
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
}

void test_quantize_images(Isa isa) {
  check::Random random(1);
  const int64_t channels[] = {1, 2, 3, 4, 7, 8, 15, 16, 17, 33, 64, 70}, widths[] = {1, 3, 8, 15, 16, 17, 40};
  for (int64_t c : channels) {
    for (int64_t w : widths) {
      for (Order order : {Order::channels_last, Order::channels_first, Order::every_second}) {
        Images images = make_images(1 + random.below(3), c, 1 + random.below(4), w, order, random);
        const int64_t padding = random.below(3);
        for (int64_t slice : {int64_t{1}, c % 2 == 0 ? int64_t{2} : int64_t{1}, c}) {
          const QuantizedImages ours = quantize(images, padding, slice, isa);
          const QuantizedImages oracle = quantize(images, padding, slice, Isa::reference);
          CHECK(ours.status == Status::ok && oracle.status == Status::ok);
          CHECK_NOTE(ours.q == oracle.q && ours.sums == oracle.sums && same_bits(ours.scale, oracle.scale),
                     "%s: %d channels, width %d, order %d, slice %d", isa_name(isa), static_cast<int>(c),
                     static_cast<int>(w), static_cast<int>(order), static_cast<int>(slice));
        }
        if (order == Order::every_second) continue;
        float& any = images.x[static_cast<size_t>(random.below(static_cast<int>(images.x.size())))];
        any = random.below(2) == 0 ? std::numeric_limits<float>::quiet_NaN() : -std::numeric_limits<float>::infinity();
        CHECK(quantize(images, padding, c, isa).status == Status::not_finite);
      }
    }
  }
  for (float tiny : {0.0f, 1e-40f}) {
    Images images = make_images(1, 5, 3, 4, Order::channels_last, random);
    for (float& value : images.x) value = tiny;
    const QuantizedImages zeros = quantize(images, 1, 5, isa);
    CHECK(zeros.status == Status::ok && zeros.scale[0] == 0.0f && zeros.q == std::vector<int8_t>(zeros.q.size(), 0));
  }
  // A large image is shared out over threads.
  const Images large = make_images(2, 19, 93, 101, Order::channels_first, random);
  CHECK(quantize(large, 1, 19, isa).q == quantize(large, 1, 19, Isa::reference).q);
}

struct Weights {
  ConvShape shape;
  std::vector<uint8_t> codes;
  std::vector<float> scale, zero, bias;
  int64_t groups() const { return (shape.k() + shape.group_size - 1) / shape.group_size; }
};

Weights make_weights(const ConvShape& shape, Zeros zeros, check::Random& random) {
  Weights w;
  w.shape = shape;
  const int levels = 1 << shape.bits;
  for (int64_t i = 0; i < shape.out_channels * shape.k(); ++i) {
    w.codes.push_back(static_cast<uint8_t>(random.below(levels)));
  }
  for (int64_t i = 0; i < shape.out_channels * w.groups(); ++i) {
    w.scale.push_back(0.01f + 0.05f * (1.0f + random.uniform()));
    w.zero.push_back(zeros == Zeros::uniform       ? static_cast<float>(levels / 2)
                     : zeros == Zeros::per_channel ? static_cast<float>(random.below(levels))
                                                   : static_cast<float>(levels) * random.uniform());
  }
  for (int64_t i = 0; i < shape.out_channels; ++i) w.bias.push_back(random.uniform());
  return w;
}

// 64-byte aligned memory of exactly the asked size, so that the sanitizers see one byte too many.
class Layout {
 public:
  Layout(const Weights& w, Isa isa) : bytes_(conv_layout_bytes(w.shape, isa)) {
    CHECK(bytes_ > 0 && bytes_ % 64 == 0);
    memory_ = static_cast<uint8_t*>(std::aligned_alloc(64, static_cast<size_t>(bytes_)));
    std::memset(memory_, 0xa5, static_cast<size_t>(bytes_));
    CHECK(conv_pack(w.shape, isa, w.codes.data(), w.scale.data(), w.zero.data(), memory_, bytes_) == Status::ok);
  }
  ~Layout() { std::free(memory_); }
  Layout(const Layout&) = delete;
  Layout& operator=(const Layout&) = delete;
  uint8_t* data() const { return memory_; }
  int64_t bytes() const { return bytes_; }

 private:
  int64_t bytes_;
  uint8_t* memory_ = nullptr;
};

std::vector<float> forward(const Weights& w, const Images& images, bool bias, Isa isa) {
  const Layout layout(w, isa);
  ConvShape shape;
  Isa ran = Isa::reference;
  CHECK(conv_describe(layout.data(), layout.bytes(), &shape, &ran) == Status::ok);
  CHECK(ran == isa && shape.k() == w.shape.k());
  std::vector<uint8_t> codes(w.codes.size());
  std::vector<float> scale(w.scale.size()), zero(w.zero.size());
  CHECK(conv_unpack(layout.data(), layout.bytes(), codes.data(), scale.data(), zero.data()) == Status::ok);
  CHECK(codes == w.codes && same_bits(scale, w.scale) && same_bits(zero, w.zero));

  const int64_t out_h = conv_out_height(shape, images.height), out_w = conv_out_width(shape, images.width);
  std::vector<float> y(static_cast<size_t>(images.count * out_h * out_w * shape.out_channels), -12345.5f);
  CHECK(conv_forward(layout.data(), layout.bytes(), images.input, bias ? w.bias.data() : nullptr, y.data()) ==
        Status::ok);
  return y;
}

// The definition, in double, over the reference's int8 activations.
std::vector<double> exact(const Weights& w, const Images& images, bool bias) {
  const ConvShape& s = w.shape;
  const QuantizedImages q = quantize(images, 0, images.channels, Isa::reference);
  // As the kernels see it: rounded image by image or pixel by pixel, or as it is.
  const auto activations = [&](int64_t n, int64_t h, int64_t w, int64_t c) {
    if (s.depthwise()) return static_cast<double>(images.at(n, c, h, w));
    if (!s.by_pixel()) {
      const auto at = static_cast<size_t>(((n * images.height + h) * images.width + w) * images.channels + c);
      return static_cast<double>(q.q[at]) * static_cast<double>(q.scale[static_cast<size_t>(n)]);
    }
    float max = 0.0f;
    for (int64_t i = 0; i < images.channels; ++i) max = std::max(max, std::fabs(images.at(n, i, h, w)));
    return std::nearbyint(static_cast<double>(images.at(n, c, h, w) * (127.0f / max))) *
           static_cast<double>(max / 127.0f);
  };
  const int64_t out_h = conv_out_height(s, images.height), out_w = conv_out_width(s, images.width);
  const int64_t depth = s.in_channels / s.groups, per_group = s.out_channels / s.groups, groups = w.groups();
  std::vector<double> y;
  for (int64_t n = 0; n < images.count; ++n) {
    for (int64_t oy = 0; oy < out_h; ++oy) {
      for (int64_t ox = 0; ox < out_w; ++ox) {
        for (int64_t o = 0; o < s.out_channels; ++o) {
          double sum = 0;
          for (int64_t k = 0; k < s.k(); ++k) {
            const int64_t tap = k / depth, c = o / per_group * depth + k % depth;
            const int64_t h = oy * s.stride_h + tap / s.kernel_w * s.dilation_h - s.pad_top;
            const int64_t x = ox * s.stride_w + tap % s.kernel_w * s.dilation_w - s.pad_left;
            if (h < 0 || h >= images.height || x < 0 || x >= images.width) continue;
            const auto at = static_cast<size_t>(o * groups + k / s.group_size);
            const double code = w.codes[static_cast<size_t>(o * s.k() + k)];
            sum += w.scale[at] * (code - static_cast<double>(w.zero[at])) * activations(n, h, x, c);
          }
          y.push_back(sum + (bias ? w.bias[static_cast<size_t>(o)] : 0.0f));
        }
      }
    }
  }
  return y;
}

ConvShape draw_shape(check::Random& random, bool depthwise) {
  const auto pick = [&](std::initializer_list<int64_t> of) {
    return of.begin()[random.below(static_cast<int>(of.size()))];
  };
  ConvShape s;
  s.groups = depthwise ? pick({2, 7, 8, 16, 17, 40}) : pick({1, 1, 1, 2, 3});
  s.in_channels = depthwise ? s.groups : s.groups * pick({1, 2, 3, 16, 21, 64});
  s.out_channels = depthwise ? s.groups : s.groups * pick({1, 2, 16, 31, 65});
  if (!depthwise && s.depthwise()) s.out_channels *= 2;
  const bool by_pixel = !depthwise && random.below(5) == 0;
  s.kernel_h = by_pixel ? 1 : pick({1, 2, 3, 5});
  s.kernel_w = by_pixel ? 1 : pick({1, 2, 3, 4});
  s.stride_h = pick({1, 1, 2, 3});
  s.stride_w = pick({1, 1, 2});
  s.dilation_h = pick({1, 1, 2});
  s.dilation_w = pick({1, 1, 3});
  s.pad_top = by_pixel ? 0 : pick({0, 1, 2});
  s.pad_bottom = by_pixel ? 0 : pick({0, 1, 2});
  s.pad_left = by_pixel ? 0 : pick({0, 1, 2});
  s.pad_right = by_pixel ? 0 : pick({0, 1, 2});
  s.bits = pick({2, 3, 4, 8});
  s.group_size = pick({s.k(), s.k(), 3, 16, 32});
  return s;
}

// The largest difference over the largest magnitude.
double relative_error(const std::vector<float>& ours, const std::vector<double>& exact_values) {
  double worst = 0, size = 1e-3;
  for (size_t i = 0; i < exact_values.size(); ++i) {
    worst = std::max(worst, std::fabs(exact_values[i] - static_cast<double>(ours[i])));
    size = std::max(size, std::fabs(exact_values[i]));
  }
  return worst / size;
}

void test_conv(Isa isa, bool depthwise) {
  check::Random random(depthwise ? 2 : 3);
  for (int round = 0; round < 120; ++round) {
    const ConvShape shape = draw_shape(random, depthwise);
    const Weights w = make_weights(shape, static_cast<Zeros>(random.below(3)), random);
    const int64_t height = shape.dilation_h * (shape.kernel_h - 1) + 1 + random.below(5);
    const int64_t width = shape.dilation_w * (shape.kernel_w - 1) + 1 + random.below(19);
    const Images images =
        make_images(random.below(4), shape.in_channels, height, width, static_cast<Order>(random.below(3)), random);
    const bool bias = random.below(2) == 0;
    const std::vector<float> oracle = forward(w, images, bias, Isa::reference);
    if (isa != Isa::reference) {
      CHECK_NOTE(same_bits(forward(w, images, bias, isa), oracle), "%s: round %d", isa_name(isa), round);
      continue;
    }
    const std::vector<double> y = exact(w, images, bias);
    CHECK_NOTE(y.size() == oracle.size() && relative_error(oracle, y) <= 3e-6, "round %d", round);
  }
}

void test_refusals() {
  check::Random random(4);
  ConvShape s;
  s.in_channels = s.out_channels = 4;
  s.kernel_h = s.kernel_w = 3;
  s.bits = 4;
  s.group_size = 36;
  const Weights w = make_weights(s, Zeros::uniform, random);
  Layout layout(w, Isa::reference);
  std::vector<float> y(64);
  const Images small = make_images(1, 4, 2, 2, Order::channels_last, random);
  const auto run = [&](const Images& images) {
    return conv_forward(layout.data(), layout.bytes(), images.input, nullptr, y.data());
  };
  CHECK(run(small) == Status::invalid_argument);  // the kernel does not fit
  Images nan = make_images(1, 4, 3, 3, Order::channels_last, random);
  nan.x[7] = std::numeric_limits<float>::quiet_NaN();
  CHECK(run(nan) == Status::not_finite);
  CHECK(conv_forward(layout.data(), layout.bytes() - 1, small.input, nullptr, y.data()) == Status::wrong_layout);
  layout.data()[0] ^= 1;
  CHECK(run(small) == Status::wrong_layout);
  for (int field = 0; field < 5; ++field) {
    ConvShape bad = s;
    if (field == 0) bad.groups = 3;
    if (field == 1) bad.bits = 5;
    if (field == 2) bad.stride_w = 0;
    if (field == 3) bad.pad_top = -1;
    if (field == 4) bad.in_channels = int64_t{1} << 40;
    CHECK(conv_layout_bytes(bad, Isa::reference) == -1);
  }
}

// A damaged byte of the headers or the pieces is refused, or leaves a buffer that is safe to run and
// to unpack as the shape it describes (the sanitizers say whether it is).
void test_damaged_headers(bool depthwise, Isa isa) {
  check::Random random(6);
  ConvShape s;
  s.in_channels = s.out_channels = depthwise ? 5 : 6;
  s.groups = depthwise ? 5 : 2;
  s.kernel_h = s.kernel_w = 2;
  s.bits = 3;
  s.group_size = 4;
  const Weights w = make_weights(s, Zeros::fractional, random);
  Layout layout(w, isa);
  const Images images = make_images(1, s.in_channels, 4, 4, Order::channels_last, random);
  int refused = 0;
  for (int64_t at = 0; at < std::min<int64_t>(layout.bytes(), 448); ++at) {
    for (int flip : {0x01, 0x02, 0x80, 0xff}) {
      layout.data()[at] ^= static_cast<uint8_t>(flip);
      ConvShape read;
      Isa read_isa;
      const Status status = conv_describe(layout.data(), layout.bytes(), &read, &read_isa);
      CHECK(status == Status::ok || status == Status::wrong_layout);
      refused += status != Status::ok;
      const bool small = status == Status::ok && read.in_channels == s.in_channels && read.pad_top < 4 &&
                         read.pad_bottom < 4 && read.pad_left < 4 && read.pad_right < 4 && read.out_channels < 100;
      if (small) {
        const auto outputs = [](int64_t pixels) { return static_cast<size_t>(std::max<int64_t>(0, pixels)); };
        std::vector<float> y(outputs(conv_out_height(read, 4)) * outputs(conv_out_width(read, 4)) *
                             static_cast<size_t>(read.out_channels));
        conv_forward(layout.data(), layout.bytes(), images.input, nullptr, y.data());
        const auto k = static_cast<size_t>(read.k()), n = static_cast<size_t>(read.out_channels);
        std::vector<uint8_t> codes(n * k);
        std::vector<float> scale(n * k), zero(n * k);
        conv_unpack(layout.data(), layout.bytes(), codes.data(), scale.data(), zero.data());
      }
      layout.data()[at] ^= static_cast<uint8_t>(flip);
    }
  }
  CHECK(refused > 50);
  std::vector<float> y(9 * static_cast<size_t>(s.out_channels));
  CHECK(conv_forward(layout.data(), layout.bytes(), images.input, nullptr, y.data()) == Status::ok);
}

template <class Test>
void for_each_variant(const char* op, const Isa* isas, std::size_t count, Isa ceiling, Test test) {
  for (std::size_t i = 0; i < count; ++i) {
    if (isas[i] > ceiling || isa_missing(isas[i]) != nullptr) continue;
    test(isas[i]);
    std::printf("  %-15s %-12s ran, equal to the reference\n", op, isa_name(isas[i]));
  }
}

}  // namespace

int main() {
  Isa ceiling;
  if (const char* why = isa_ceiling(&ceiling)) {
    std::printf("%s\n", why);
    return 1;
  }
  std::size_t count;
  const Isa* isas = quantize_images_variants(&count);
  for_each_variant("quantize_images", isas, count, ceiling, test_quantize_images);
  isas = depthwise_variants(&count);
  for_each_variant("depthwise", isas, count, ceiling, [](Isa isa) {
    test_conv(isa, true);
    test_damaged_headers(true, isa);
  });
  isas = linear_variants(&count);
  for_each_variant("conv", isas, count, ceiling, [](Isa isa) {
    test_conv(isa, false);
    test_damaged_headers(false, isa);
  });
  test_refusals();
  return check::report("test_lowbit_conv");
}
