// Every variant of the layer norm that this CPU runs, bit for bit against the reference; the reference
// against doubles.
#include <cmath>
#include <cstring>
#include <vector>

#include "check.h"
#include "each_variant.h"
#include "layer_norm/layer_norm.h"

using namespace bantamweight;

namespace {

constexpr float kUntouched = -12345.5f;

struct Input {
  int64_t m, n, ldx, ldr, ldy;
  std::vector<float> x, residual, weight, bias;
};

Input make_input(int64_t m, int64_t n, check::Random& random) {
  Input in = {m, n, n + random.below(4), n + random.below(4), n + random.below(4), {}, {}, {}, {}};
  in.x.assign(static_cast<size_t>(m * in.ldx + 1), kUntouched);
  in.residual.assign(static_cast<size_t>(m * in.ldr + 1), kUntouched);
  for (int64_t r = 0; r < m; ++r) {
    const float size = random.below(5) == 0 ? 0.0f : random.below(3) == 0 ? 1e4f : 1.0f;
    const float shift = 10.0f * random.uniform();
    for (int64_t i = 0; i < n; ++i) {
      in.x[static_cast<size_t>(1 + r * in.ldx + i)] = shift + size * random.uniform();
      in.residual[static_cast<size_t>(1 + r * in.ldr + i)] = size * random.uniform();
    }
  }
  for (int64_t i = 0; i < n; ++i) {
    in.weight.push_back(random.uniform());
    in.bias.push_back(random.uniform());
  }
  return in;
}

LayerNormArgs args_of(const Input& in, bool residual, bool affine, std::vector<float>* y) {
  LayerNormArgs args;
  args.x = in.x.data() + 1;
  args.ldx = in.ldx;
  args.residual = residual ? in.residual.data() + 1 : nullptr;
  args.ldr = in.ldr;
  args.m = in.m;
  args.n = in.n;
  args.norm = {affine ? in.weight.data() : nullptr, affine ? in.bias.data() : nullptr, 1e-5f};
  y->assign(static_cast<size_t>(in.m * in.ldy + 1), kUntouched);
  args.y = y->data() + 1;
  args.ldy = in.ldy;
  return args;
}

void check_doubles(const Input& in, const LayerNormArgs& args) {
  for (int64_t r = 0; r < in.m; ++r) {
    std::vector<double> z;
    double mean = 0.0, variance = 0.0, largest = 0.0;
    for (int64_t i = 0; i < in.n; ++i) {
      // The sum with the residual is a float, as it is in torch.
      const float sum =
          args.residual == nullptr ? args.x[r * in.ldx + i] : args.x[r * in.ldx + i] + args.residual[r * in.ldr + i];
      z.push_back(sum);
      mean += sum / static_cast<double>(in.n);
      largest = std::fmax(largest, std::fabs(static_cast<double>(sum)));
    }
    for (double v : z) variance += (v - mean) * (v - mean) / static_cast<double>(in.n);
    const double inverse = 1.0 / std::sqrt(variance + 1e-5);
    for (int64_t i = 0; i < in.n; ++i) {
      const double w = args.norm.weight == nullptr ? 1.0 : args.norm.weight[i];
      const double b = args.norm.bias == nullptr ? 0.0 : args.norm.bias[i];
      const double wanted = (z[static_cast<size_t>(i)] - mean) * inverse * w + b;
      const double got = args.y[r * in.ldy + i];
      // A mean is known to a few units in the last place of the values it is of.
      CHECK_NOTE(std::fabs(got - wanted) <= 1e-6 * (2.0 + std::fabs(wanted) + largest * inverse),
                 "n=%d: %g instead of %g", static_cast<int>(in.n), got, wanted);
    }
  }
}

bool same(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

void over_awkward_shapes(const LayerNormKernel& kernel) {
  check::Random random(5);
  for (int64_t n : {1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 47, 63, 64, 65, 96, 100, 384, 1001}) {
    for (int64_t m : {0, 1, 3}) {
      const Input in = make_input(m, n, random);
      for (bool residual : {false, true}) {
        for (bool affine : {false, true}) {
          std::vector<float> expected, y;
          const LayerNormArgs reference = args_of(in, residual, affine, &expected);
          layer_norm_reference()->run(reference);
          if (kernel.isa == Isa::reference) check_doubles(in, reference);
          kernel.run(args_of(in, residual, affine, &y));
          CHECK_NOTE(same(y, expected), "%s: m=%d n=%d", isa_name(kernel.isa), static_cast<int>(m),
                     static_cast<int>(n));
          CHECK(layer_norm(args_of(in, residual, affine, &y), kernel.isa) == Status::ok);
          CHECK(same(y, expected));

          std::vector<float> in_place = in.x;  // y may be x
          LayerNormArgs args = args_of(in, residual, affine, &y);
          args.x = args.y = in_place.data() + 1;
          args.ldy = in.ldx;
          kernel.run(args);
          for (int64_t r = 0; r < m; ++r) {
            CHECK(std::memcmp(args.y + r * in.ldx, expected.data() + 1 + r * in.ldy,
                              static_cast<size_t>(n) * sizeof(float)) == 0);
          }
        }
      }
    }
  }
  // Enough rows that they are shared out over the threads.
  const Input in = make_input(300, 257, random);
  std::vector<float> expected, y;
  layer_norm_reference()->run(args_of(in, true, true, &expected));
  CHECK(layer_norm(args_of(in, true, true, &y), kernel.isa) == Status::ok);
  CHECK(same(y, expected));
}

void bad_arguments() {
  check::Random random(6);
  const Input in = make_input(2, 9, random);
  std::vector<float> y;
  LayerNormArgs args = args_of(in, true, true, &y);
  args.ldx = 8;
  CHECK(layer_norm(args, Isa::reference) == Status::invalid_argument);
  args = args_of(in, true, true, &y);
  args.ldr = 8;
  CHECK(layer_norm(args, Isa::reference) == Status::invalid_argument);
  args = args_of(in, true, true, &y);
  args.m = -1;
  CHECK(layer_norm(args, Isa::reference) == Status::invalid_argument);
}

}  // namespace

int main() {
  check::each_kernel<LayerNormKernel>(
      layer_norm_variants, {layer_norm_avx512(), layer_norm_avx2(), layer_norm_neon(), layer_norm_reference()},
      over_awkward_shapes);
  bad_arguments();
  return check::report("test_layer_norm");
}
