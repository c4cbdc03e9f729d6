// Chains and groups of packed layers against the same layers run one by one, on every variant.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

#include "check.h"
#include "each_variant.h"
#include "lowbit_linear/lowbit_linear.h"

using namespace bantamweight;

namespace {

// One packed layer of random codes.
class Layer {
 public:
  Layer(int64_t n, int64_t k, int bits, int64_t group_size, Isa isa, check::Random& random)
      : shape{n, k, bits, group_size} {
    const int64_t groups = k == 0 ? 0 : (k + group_size - 1) / group_size;
    std::vector<uint8_t> codes(static_cast<size_t>(n * k));
    for (uint8_t& code : codes) code = static_cast<uint8_t>(random.below(1 << bits));
    std::vector<float> scale, zero(static_cast<size_t>(n * groups), static_cast<float>(1 << (bits - 1)));
    for (int64_t i = 0; i < n * groups; ++i) scale.push_back(0.01f + 0.005f * random.uniform());
    for (int64_t i = 0; i < n; ++i) bias_.push_back(random.uniform());
    bytes_ = linear_layout_bytes(shape, isa);
    memory_ = static_cast<uint8_t*>(std::aligned_alloc(64, static_cast<size_t>(bytes_)));
    CHECK(linear_pack(shape, isa, codes.data(), scale.data(), zero.data(), memory_, bytes_) == Status::ok);
  }
  ~Layer() { std::free(memory_); }
  Layer(const Layer&) = delete;
  Layer& operator=(const Layer&) = delete;
  LinearWeight weight() const { return {memory_, bytes_, bias_.data()}; }

  const LinearShape shape;

 private:
  std::vector<float> bias_;
  int64_t bytes_ = 0;
  uint8_t* memory_ = nullptr;
};

std::vector<float> random_floats(int64_t count, check::Random& random) {
  std::vector<float> values(static_cast<size_t>(count));
  for (float& v : values) v = random.uniform();
  return values;
}

bool same(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
}

// Rounded rows and the memory they lie in.
struct Rows {
  Rows(int64_t m, int64_t k, int64_t group_size)
      : group_size(group_size),
        q(static_cast<size_t>(m * padded_row_bytes(k) + kRowAlign)),
        scale(static_cast<size_t>(m)),
        sums(static_cast<size_t>(m * ((k + group_size - 1) / group_size))) {}
  QuantizedRows view() const { return {q.data(), scale.data(), sums.data(), group_size}; }
  bool operator==(const Rows& other) const { return q == other.q && same(scale, other.scale) && sums == other.sums; }

  int64_t group_size;
  std::vector<int8_t> q;
  std::vector<float> scale;
  std::vector<int32_t> sums;
};

Rows round_rows(const std::vector<float>& x, int64_t m, int64_t k, int64_t group_size) {
  Rows rows(m, k, group_size);
  CHECK(quantize_rows({x.data(), k, m, k, group_size, rows.q.data(), rows.scale.data(), rows.sums.data()},
                      Isa::reference) == Status::ok);
  return rows;
}

std::vector<float> one_by_one(const Layer& layer, const std::vector<float>& x, int64_t m, Activation activation,
                              const float* residual, int64_t ldr, const LayerNorm* norm) {
  const int64_t n = layer.shape.n;
  std::vector<float> y(static_cast<size_t>(m * n));
  LinearArgs args;
  args.x = x.data();
  args.ldx = layer.shape.k;
  args.m = m;
  args.bias = layer.weight().bias;
  args.y = y.data();
  args.ldy = n;
  CHECK(linear_forward(layer.weight().layout, layer.weight().layout_bytes, args) == Status::ok);
  epilogue_reference()->run({y.data(), n, m, n, {activation, residual, ldr}});
  if (norm == nullptr) return y;
  LayerNormArgs normalize;
  normalize.x = normalize.y = y.data();
  normalize.ldx = normalize.ldy = n;
  normalize.m = m;
  normalize.n = n;
  normalize.norm = *norm;
  layer_norm_reference()->run(normalize);
  return y;
}

// norm(x), attention output + given residual + norm, first + GELU, second + the first stage + norm.
void chains(Isa isa) {
  check::Random random(21);
  constexpr int64_t kWidth = 70, kInner = 130, kHeads = 33;
  const Layer a(kWidth, kHeads, 4, 16, isa, random), b(kInner, kWidth, 2, kWidth, isa, random);
  const Layer c(kWidth, kInner, 8, 64, isa, random);
  const std::vector<float> weight = random_floats(kWidth, random), bias = random_floats(kWidth, random);
  const LayerNorm norm = {weight.data(), bias.data(), 1e-5f}, plain = {nullptr, nullptr, 1e-12f};
  for (int64_t m : {0, 1, 2, 31, 40, 64, 200, 900}) {  // the last in several chunks
    const std::vector<float> x = random_floats(m * kHeads, random), given = random_floats(m * (kWidth + 1), random);
    for (bool norm_first : {false, true}) {
      std::vector<float> h = x;
      if (norm_first) {
        LayerNormArgs args;
        args.x = args.y = h.data();
        args.ldx = args.ldy = args.n = kHeads;
        args.m = m;
        args.norm = plain;
        layer_norm_reference()->run(args);
      }
      const std::vector<float> s0 = one_by_one(a, h, m, Activation::none, given.data(), kWidth + 1, &norm);
      const std::vector<float> s1 = one_by_one(b, s0, m, Activation::gelu, nullptr, 0, nullptr);
      const std::vector<float> s2 = one_by_one(c, s1, m, Activation::relu, s0.data(), kWidth, &plain);

      const ChainStage stages[] = {{a.weight(), Activation::none, ChainStage::kGiven, &norm},
                                   {b.weight(), Activation::gelu, ChainStage::kNothing, nullptr},
                                   {c.weight(), Activation::relu, 0, &plain}};
      std::vector<float> y(s2.size());
      Rows rows(m, kWidth, 32);
      ChainArgs args;
      args.x = x.data();
      args.ldx = kHeads;
      args.norm = norm_first ? &plain : nullptr;
      args.residual = given.data();
      args.ldr = kWidth + 1;
      args.m = m;
      args.y = y.data();
      args.ldy = kWidth;
      args.q = rows.q.data();
      args.scale = rows.scale.data();
      args.sums = rows.sums.data();
      args.group_size = rows.group_size;
      CHECK(linear_chain(stages, 3, args) == Status::ok);
      CHECK_NOTE(same(y, s2), "%s: m=%d norm_first=%d", isa_name(isa), static_cast<int>(m), norm_first);
      CHECK(rows == round_rows(s2, m, kWidth, 32));

      Rows alone(m, kWidth, 32);  // without float outputs
      args.y = nullptr;
      args.q = alone.q.data();
      args.scale = alone.scale.data();
      args.sums = alone.sums.data();
      CHECK(linear_chain(stages, 3, args) == Status::ok);
      CHECK(alone == rows);

      if (norm_first) continue;
      const Rows from = round_rows(x, m, kHeads, 16);  // and from rows that were rounded before
      std::fill(y.begin(), y.end(), 0.0f);
      args.x = nullptr;
      args.rows = from.view();
      args.y = y.data();
      args.q = nullptr;
      CHECK(linear_chain(stages, 3, args) == Status::ok);
      CHECK_NOTE(same(y, s2), "%s: m=%d from rounded rows", isa_name(isa), static_cast<int>(m));
    }
  }
}

void adds_its_input(Isa isa) {
  check::Random random(22);
  const Layer a(40, 24, 2, 24, isa, random), b(24, 40, 4, 40, isa, random);
  const ChainStage stages[] = {{a.weight(), Activation::gelu_tanh, ChainStage::kNothing, nullptr},
                               {b.weight(), Activation::none, ChainStage::kInput, nullptr}};
  ChainArgs args;
  std::vector<float> x, y;
  for (int64_t m : {600, 5}) {  // the first shared out over the threads
    x = random_floats(m * 24, random);
    const std::vector<float> inner = one_by_one(a, x, m, Activation::gelu_tanh, nullptr, 0, nullptr);
    const std::vector<float> expected = one_by_one(b, inner, m, Activation::none, x.data(), 24, nullptr);
    y.assign(expected.size(), 0.0f);
    args.x = x.data();
    args.ldx = 24;
    args.m = m;
    args.y = y.data();
    args.ldy = 24;
    CHECK(linear_chain(stages, 2, args) == Status::ok);
    CHECK(same(y, expected));

    Rows rows(m, 24, 8);  // the residual added as the outputs are rounded
    ChainArgs only_rounded = args;
    only_rounded.y = nullptr;
    only_rounded.q = rows.q.data();
    only_rounded.scale = rows.scale.data();
    only_rounded.sums = rows.sums.data();
    only_rounded.group_size = rows.group_size;
    CHECK(linear_chain(stages, 2, only_rounded) == Status::ok);
    CHECK_NOTE(rows == round_rows(expected, m, 24, 8), "%s: m=%d", isa_name(isa), static_cast<int>(m));
  }

  const auto refused = [&](const ChainStage* from, int64_t count, const ChainArgs& with) {
    return linear_chain(from, count, with) == Status::invalid_argument;
  };
  ChainArgs bad = args;
  bad.x = nullptr;
  CHECK(refused(stages, 2, bad));
  bad = args;
  bad.ldx = 23;
  CHECK(refused(stages, 2, bad));
  bad = args;
  bad.ldy = 23;
  CHECK(refused(stages, 2, bad));
  bad = args;
  bad.m = -1;
  CHECK(refused(stages, 2, bad));
  CHECK(refused(stages, 0, args));
  ChainStage wrong[] = {stages[0], stages[1]};
  wrong[1].residual = 1;  // its own output
  CHECK(refused(wrong, 2, args));
  wrong[1].residual = 0;  // of another width
  CHECK(refused(wrong, 2, args));
  wrong[1].residual = ChainStage::kGiven;  // but none is
  CHECK(refused(wrong, 2, args));
  const ChainStage twice[] = {stages[0], stages[0]};  // 40 outputs into 24 inputs
  CHECK(refused(twice, 2, args));
  std::vector<float> not_finite = x;
  not_finite[30] = std::numeric_limits<float>::infinity();
  bad = args;
  bad.x = not_finite.data();
  CHECK(linear_chain(stages, 2, bad) == Status::not_finite);
}

// Weights over the same rows, of different bits and groups.
void groups(Isa isa) {
  check::Random random(23);
  const int64_t k = 96;
  const Layer a(70, k, 4, 32, isa, random), b(1, k, 2, k, isa, random), c(65, k, 8, 16, isa, random);
  const LinearWeight weights[] = {a.weight(), b.weight(), c.weight()};
  for (int64_t m : {0, 1, 7, 50}) {
    const std::vector<float> x = random_floats(m * k, random);
    const int64_t width = 70 + 1 + 65;
    std::vector<float> y(static_cast<size_t>(m * width)), from_rows = y, expected = y;
    int64_t column = 0;
    for (const Layer* layer : {&a, &b, &c}) {
      const std::vector<float> part = one_by_one(*layer, x, m, Activation::relu, nullptr, 0, nullptr);
      for (int64_t r = 0; r < m; ++r) {
        std::copy_n(part.begin() + r * layer->shape.n, layer->shape.n, expected.begin() + r * width + column);
      }
      column += layer->shape.n;
    }
    LinearArgs args;
    args.x = x.data();
    args.ldx = k;
    args.m = m;
    args.epilogue.activation = Activation::relu;
    args.y = y.data();
    args.ldy = width;
    CHECK(linears_forward(weights, 3, args) == Status::ok);
    CHECK_NOTE(same(y, expected), "%s: m=%d", isa_name(isa), static_cast<int>(m));
    const Rows rows = round_rows(x, m, k, 16);
    args.x = nullptr;
    args.rows = rows.view();
    args.y = from_rows.data();
    CHECK(linears_forward(weights, 3, args) == Status::ok);
    CHECK_NOTE(same(from_rows, expected), "%s: m=%d rounded", isa_name(isa), static_cast<int>(m));
  }
  const Layer other(5, k + 1, 2, k + 1, isa, random);
  const LinearWeight mixed[] = {a.weight(), other.weight()};
  const std::vector<float> x(k + 1);
  std::vector<float> y(100);
  LinearArgs args;
  args.x = x.data();
  args.ldx = k + 1;
  args.m = 1;
  args.y = y.data();
  args.ldy = 100;
  CHECK(linears_forward(mixed, 2, args) == Status::invalid_argument);
}

}  // namespace

int main() {
  check::each_variant(linear_variants, [](Isa isa) {
    chains(isa);
    adds_its_input(isa);
    groups(isa);
  });
  return check::report("test_linear_chain");
}
