// The packed matmul with activations of 16 bits, or with a scale for every block of columns: every
// variant bit for bit against the reference, and the reference against the float matmul.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "check.h"
#include "each_variant.h"
#include "lowbit_linear/lowbit_linear.h"

using namespace bantamweight;

namespace {

constexpr Activations kModes[] = {Activations::int8_block, Activations::int16};

struct Weights {
  LinearShape shape;
  int64_t groups = 0;
  std::vector<uint8_t> codes;
  std::vector<float> scale, zero;
};

Weights make_weights(const LinearShape& shape, bool float_zeros, check::Random& random) {
  Weights w;
  w.shape = shape;
  w.groups = (shape.k + shape.group_size - 1) / shape.group_size;
  const int levels = 1 << shape.bits;
  for (int64_t i = 0; i < shape.n * shape.k; ++i) w.codes.push_back(static_cast<uint8_t>(random.below(levels)));
  for (int64_t i = 0; i < shape.n * w.groups; ++i) {
    w.scale.push_back(0.5f + random.uniform());
    w.zero.push_back(float_zeros ? static_cast<float>(levels) * random.uniform() : static_cast<float>(levels / 2));
  }
  return w;
}

// 64-byte aligned memory of exactly the size asked for, so that a sanitizer sees one byte too many.
class Layout {
 public:
  Layout(const Weights& w, Isa isa) : bytes_(linear_layout_bytes(w.shape, isa)) {
    memory_ = std::aligned_alloc(64, static_cast<size_t>(std::max<int64_t>(bytes_, 64)));
    CHECK(linear_pack(w.shape, isa, w.codes.data(), w.scale.data(), w.zero.data(), memory_, bytes_) == Status::ok);
  }
  ~Layout() { std::free(memory_); }
  Layout(const Layout&) = delete;
  Layout& operator=(const Layout&) = delete;

  std::vector<float> forward(const std::vector<float>& x, int64_t ldx, int64_t m, const float* bias,
                             const Epilogue& epilogue = {}) const {
    LinearShape shape;
    Isa isa;
    CHECK(linear_describe(memory_, bytes_, &shape, &isa) == Status::ok);
    std::vector<float> y(static_cast<size_t>(m * (shape.n + 3)), kUntouched);
    LinearArgs args;
    args.x = x.data();
    args.ldx = ldx;
    args.m = m;
    args.bias = bias;
    args.epilogue = epilogue;
    args.y = y.data();
    args.ldy = shape.n + 3;
    CHECK(linear_forward(memory_, bytes_, args) == Status::ok);
    for (int64_t r = 0; r < m; ++r) {
      for (int64_t i = shape.n; i < args.ldy; ++i) CHECK(y[static_cast<size_t>(r * args.ldy + i)] == kUntouched);
    }
    return y;
  }

  void check_unpack(const Weights& w, Isa isa) const {
    LinearShape shape;
    Isa found = Isa::reference;
    CHECK(linear_describe(memory_, bytes_, &shape, &found) == Status::ok && found == isa);
    CHECK(shape.activations == w.shape.activations && shape.group_size == w.shape.group_size);
    std::vector<uint8_t> codes(w.codes.size());
    std::vector<float> scale(w.scale.size()), zero(w.zero.size());
    CHECK(linear_unpack(memory_, bytes_, codes.data(), scale.data(), zero.data()) == Status::ok);
    CHECK(codes == w.codes && scale == w.scale && zero == w.zero);
  }

  const void* memory() const { return memory_; }
  int64_t bytes() const { return bytes_; }

 private:
  static constexpr float kUntouched = -12345.5f;
  int64_t bytes_;
  void* memory_;
};

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
}

// Each output against the float matmul: the inputs are off by half a step each at most.
void check_close(const Weights& w, const std::vector<float>& x, int64_t ldx, int64_t m, const float* bias,
                 const std::vector<float>& y) {
  const LinearShape& s = w.shape;
  const int64_t block = s.activations == Activations::int16 ? s.k : std::min(s.group_size, kActivationBlock);
  const double steps = s.activations == Activations::int16 ? 127.0 * 254.0 : 127.0;
  for (int64_t r = 0; r < m; ++r) {
    std::vector<double> largest(static_cast<size_t>(s.k / block + 1));
    for (int64_t k = 0; k < s.k; ++k) {
      double& max = largest[static_cast<size_t>(k / block)];
      max = std::fmax(max, std::fabs(x[static_cast<size_t>(r * ldx + k)]));
    }
    for (int64_t n = 0; n < s.n; ++n) {
      double exact = bias == nullptr ? 0.0 : bias[n], allowed = 0.0, size = std::fabs(exact);
      for (int64_t k = 0; k < s.k; ++k) {
        const double max = largest[static_cast<size_t>(k / block)];
        const auto g = static_cast<size_t>(n * w.groups + k / s.group_size);
        const double code = w.codes[static_cast<size_t>(n * s.k + k)], a = x[static_cast<size_t>(r * ldx + k)];
        const double weight = static_cast<double>(w.scale[g]) * (code - static_cast<double>(w.zero[g]));
        exact += weight * a;
        allowed += std::fabs(weight) * 0.51 * max / steps;
        size += std::fabs(static_cast<double>(w.scale[g])) * (code + std::fabs(static_cast<double>(w.zero[g]))) * max;
      }
      const double got = y[static_cast<size_t>(r * (s.n + 3) + n)];
      CHECK_NOTE(std::fabs(got - exact) <= allowed + 1e-6 * size, "%g instead of %g", got, exact);
    }
  }
}

struct Case {
  int64_t m, n, k, group_size;
};

constexpr Case kCases[] = {
    {1, 1, 1, 1},        {1, 3, 3, 3},      {2, 15, 127, 127},  {3, 16, 128, 128},
    {1, 65, 129, 129},   {4, 64, 300, 300}, {5, 33, 300, 128},  {2, 20, 700, 256},
    {1, 200, 384, 64},   {7, 18, 200, 32},  {40, 130, 256, 16}, {17, 70, 260, 2},
    {70, 200, 640, 640}, {2, 0, 7, 7},      {0, 5, 200, 200},   {33, 50, 512, 512},
};

void over_awkward_shapes(Isa isa) {
  check::Random random(1);
  for (const Case& c : kCases) {
    for (int bits : {2, 3, 4, 8}) {
      for (Activations mode : kModes) {
        for (bool float_zeros : {false, true}) {
          const int failed = check::failed;
          const Weights w = make_weights({c.n, c.k, bits, c.group_size, mode}, float_zeros, random);
          const Layout tested(w, isa), oracle(w, Isa::reference);
          tested.check_unpack(w, isa);
          const int64_t ldx = c.k + 1;
          std::vector<float> x(static_cast<size_t>(c.m * ldx + 1)), bias(static_cast<size_t>(c.n));
          // Columns of very different sizes, which a scale for each block tells apart.
          for (size_t i = 0; i < x.size(); ++i) {
            x[i] = random.uniform() * ((i / 100) % 3 == 0 ? 30.0f : 1.0f);
          }
          for (float& b : bias) b = random.uniform();
          if (c.m > 2) std::fill(x.begin() + ldx, x.begin() + 2 * ldx, 0.0f);  // a row of zeros
          const float* b = float_zeros ? bias.data() : nullptr;
          const std::vector<float> y = tested.forward(x, ldx, c.m, b), expected = oracle.forward(x, ldx, c.m, b);
          CHECK(same_bits(y, expected));
          if (isa == Isa::reference) check_close(w, x, ldx, c.m, b, y);

          // The epilogue comes after the halves are added up.
          std::vector<float> residual(static_cast<size_t>(c.m * c.n));
          for (float& v : residual) v = random.uniform();
          Epilogue epilogue;
          epilogue.activation = Activation::relu;
          epilogue.residual = residual.data();
          epilogue.ldr = c.n;
          const std::vector<float> after = tested.forward(x, ldx, c.m, b, epilogue);
          bool right = true;
          for (int64_t r = 0; r < c.m; ++r) {
            for (int64_t n = 0; n < c.n; ++n) {
              const auto at = static_cast<size_t>(r * (c.n + 3) + n);
              right = right && after[at] == std::fmax(y[at], 0.0f) + residual[static_cast<size_t>(r * c.n + n)];
            }
          }
          CHECK(right);
          if (check::failed > failed) {
            check::note("%s: m=%d n=%d k=%d bits=%d group_size=%d mode=%d", isa_name(isa), static_cast<int>(c.m),
                        static_cast<int>(c.n), static_cast<int>(c.k), bits, static_cast<int>(c.group_size),
                        static_cast<int>(mode));
          }
        }
      }
    }
  }
}

// K = 4096 with all weights at the largest code: sums that an int16 accumulator would wrap.
void at_the_largest_sums(Isa isa) {
  for (int bits : {2, 3, 4, 8}) {
    for (Activations mode : kModes) {
      for (float value : {64.0f, -64.0f, 127.0f, -127.0f}) {
        Weights w;
        w.shape = {70, 4096, bits, 4096, mode};
        w.groups = 1;
        w.codes.assign(static_cast<size_t>(70 * 4096), static_cast<uint8_t>((1 << bits) - 1));
        w.scale.assign(70, 1.0f);
        w.zero.assign(70, 0.0f);
        const Layout tested(w, isa);
        tested.check_unpack(w, isa);
        // One activation of 127 a block fixes every scale at one, or at 1 / 254.
        const int64_t m = 3;
        std::vector<float> x(static_cast<size_t>(m * 4096), value);
        for (size_t i = 0; i < x.size(); i += 128) x[i] = 127.0f;
        const std::vector<float> y = tested.forward(x, 4096, m, nullptr);
        const double exact = ((1 << bits) - 1) * (32.0 * 127.0 + (4096.0 - 32.0) * static_cast<double>(value));
        for (int64_t r = 0; r < m; ++r) {
          for (int64_t n = 0; n < 70; ++n) {
            const double got = y[static_cast<size_t>(r * 73 + n)];
            CHECK_NOTE(std::fabs(got - exact) <= 1e-6 * std::fabs(exact), "%s: bits=%d mode=%d: %g instead of %g",
                       isa_name(isa), bits, static_cast<int>(mode), got, exact);
          }
        }
      }
    }
  }
}

void bad_input(Isa isa) {
  check::Random random(2);
  CHECK(linear_layout_bytes({4, 300, 4, 100, Activations::int8_block}, isa) == -1);
  CHECK(linear_layout_bytes({4, 300, 4, 200, Activations::int8_block}, isa) == -1);
  CHECK(linear_layout_bytes({4, 300, 4, 100, Activations::int16}, isa) > 0);
  CHECK(linear_layout_bytes({4, 300, 4, 300, static_cast<Activations>(7)}, isa) == -1);
  const std::vector<int8_t> q(512);
  const std::vector<float> one(2, 1.0f);
  const std::vector<int32_t> sums(8);
  for (Activations mode : kModes) {
    const Weights w = make_weights({4, 100, 4, 100, mode}, false, random);
    const Layout layout(w, isa);
    std::vector<float> y(8);
    LinearArgs args;  // rows rounded before are int8
    args.rows = {q.data(), one.data(), sums.data(), 100};
    args.m = 2;
    args.y = y.data();
    args.ldy = 4;
    CHECK(linear_forward(layout.memory(), layout.bytes(), args) == Status::unsupported);
  }
}

}  // namespace

int main() {
  check::each_variant(linear_variants, [](Isa isa) {
    over_awkward_shapes(isa);
    at_the_largest_sums(isa);
    bad_input(isa);
  });
  return check::report("test_activation_modes");
}
