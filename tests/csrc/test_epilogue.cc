// Every variant of the epilogue that this CPU runs, bit for bit against the reference; the reference
// against the functions of the standard library in doubles.
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "check.h"
#include "each_variant.h"
#include "epilogue/epilogue.h"

using namespace bantamweight;

namespace {

constexpr float kUntouched = -12345.5f;

double exact(double y, Activation activation) {
  switch (activation) {
    case Activation::none:
      return y;
    case Activation::relu:
      return std::fmax(y, 0.0);
    case Activation::gelu:
      return 0.5 * y * std::erfc(-y / std::sqrt(2.0));
    case Activation::gelu_tanh:
      return y / (1.0 + std::exp(-2.0 * std::sqrt(2.0 / 3.14159265358979323846) * (y + 0.044715 * y * y * y)));
  }
  return 0.0;
}

void against_doubles() {
  std::vector<float> values = {0.0f, -0.0f, 1e-42f, -1e-42f, 1e-20f, 1e30f, -1e30f};
  for (int i = -120000; i <= 120000; ++i) values.push_back(static_cast<float>(i) * 1e-4f);
  for (int activation = 0; activation < kActivationCount; ++activation) {
    std::vector<float> y = values;
    const auto n = static_cast<int64_t>(y.size());
    const auto kind = static_cast<Activation>(activation);
    epilogue_reference()->run({y.data(), n, 1, n, {kind, nullptr, 0}});
    double worst = 0.0;
    for (size_t i = 0; i < y.size(); ++i) {
      const double wanted = exact(values[i], kind), size = std::fmax(1.0, std::fabs(static_cast<double>(values[i])));
      worst = std::fmax(worst, std::fabs(y[i] - wanted) / size);
    }
    CHECK_NOTE(worst <= 3e-7, "activation %d is off by %g", activation, worst);
  }
  float infinite[] = {std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity()};
  epilogue_reference()->run({infinite, 2, 1, 2, {Activation::gelu, nullptr, 0}});
  CHECK(infinite[0] == std::numeric_limits<float>::infinity() && std::fabs(infinite[1]) < 1e-6f);
}

void over_awkward_shapes(const EpilogueKernel& kernel) {
  check::Random random(3);
  for (int64_t n : {0, 1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 100, 127, 130}) {
    for (int64_t m : {0, 1, 2, 5}) {
      const int64_t ldy = n + random.below(5), ldr = n + random.below(5);
      std::vector<float> from(static_cast<size_t>(m * ldy + 1), kUntouched);
      std::vector<float> residual(static_cast<size_t>(m * ldr + 1), kUntouched);
      for (int64_t r = 0; r < m; ++r) {
        for (int64_t i = 0; i < n; ++i) {
          const float special[] = {0.0f,
                                   -0.0f,
                                   1e38f,
                                   -1e38f,
                                   1e-42f,
                                   std::numeric_limits<float>::infinity(),
                                   -std::numeric_limits<float>::infinity(),
                                   5.2f,
                                   std::numeric_limits<float>::quiet_NaN()};
          from[static_cast<size_t>(1 + r * ldy + i)] =
              random.below(8) == 0 ? special[random.below(9)] : 7.0f * random.uniform();
          residual[static_cast<size_t>(1 + r * ldr + i)] = random.uniform();
        }
      }
      for (int activation = 0; activation < kActivationCount; ++activation) {
        for (const float* added :
             {static_cast<const float*>(nullptr), static_cast<const float*>(residual.data() + 1)}) {
          std::vector<float> expected = from, y = from;
          const Epilogue epilogue = {static_cast<Activation>(activation), added, ldr};
          epilogue_reference()->run({expected.data() + 1, ldy, m, n, epilogue});
          kernel.run({y.data() + 1, ldy, m, n, epilogue});
          CHECK_NOTE(std::memcmp(y.data(), expected.data(), y.size() * sizeof(float)) == 0,
                     "%s: activation %d, m=%d n=%d", isa_name(kernel.isa), activation, static_cast<int>(m),
                     static_cast<int>(n));
          for (int64_t r = 0; r < m; ++r) {
            for (int64_t i = n; i < ldy; ++i) CHECK(y[static_cast<size_t>(1 + r * ldy + i)] == kUntouched);
          }
        }
      }
    }
  }
}

}  // namespace

int main() {
  against_doubles();
  check::each_kernel<EpilogueKernel>(epilogue_variants,
                                     {epilogue_avx512(), epilogue_avx2(), epilogue_neon(), epilogue_reference()},
                                     [](const EpilogueKernel& kernel) {
                                       CHECK(epilogue_kernel(kernel.isa) == &kernel);
                                       over_awkward_shapes(kernel);
                                     });
  return check::report("test_epilogue");
}
