// Every variant that this CPU runs, bit for bit against the reference; the reference against doubles.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <vector>

#include "check.h"
#include "code_maps/code_maps.h"

using namespace bantamweight;

namespace {

struct Inputs {
  std::vector<float> floats;
  std::vector<int8_t> a, b;

  Inputs(int64_t count, check::Random& random) {
    const float special[] = {0.0f,
                             -0.0f,
                             1e38f,
                             -1e38f,
                             std::numeric_limits<float>::infinity(),
                             -std::numeric_limits<float>::infinity(),
                             std::numeric_limits<float>::quiet_NaN(),
                             0.5f};
    for (int64_t i = 0; i < count; ++i) {
      floats.push_back(random.below(9) == 0 ? special[random.below(8)] : 150.0f * random.uniform());
      a.push_back(static_cast<int8_t>(random.below(256) - 128));
      b.push_back(static_cast<int8_t>(random.below(256) - 128));
    }
  }

  // The members whose bit is set.
  WeightedSum sum(int members, int64_t count) const {
    WeightedSum made;
    made.shift = 0.25f;
    made.factor = 0.75f;
    made.factor_a = 0.31f;
    made.factor_b = -0.17f;
    if ((members & 1) != 0) made.floats = floats.data();
    if ((members & 2) != 0) made.a = a.data();
    if ((members & 4) != 0) made.b = b.data();
    made.count = count;
    return made;
  }
};

void against_doubles() {
  check::Random random(2);
  const Inputs inputs(3000, random);
  for (int members = 0; members < 8; ++members) {
    std::vector<int8_t> codes(3000);
    std::vector<float> y(3000);
    code_maps_reference()->to_codes(inputs.sum(members, 3000), codes.data());
    code_maps_reference()->to_floats(inputs.sum(members, 3000), false, y.data());
    for (size_t i = 0; i < codes.size(); ++i) {
      double t = 0.25;
      if ((members & 1) != 0) t += 0.75 * static_cast<double>(inputs.floats[i]);
      if ((members & 2) != 0) t += static_cast<double>(0.31f) * inputs.a[i];
      if ((members & 4) != 0) t += static_cast<double>(-0.17f) * inputs.b[i];
      if (std::isnan(t)) {
        CHECK(codes[i] == 127 && std::isnan(y[i]));
        continue;
      }
      CHECK(std::fabs(codes[i] - std::fmin(std::fmax(t, -127.0), 127.0)) <= 0.50002);
      CHECK(std::isinf(t) ? static_cast<double>(y[i]) == t
                          : std::fabs(static_cast<double>(y[i]) - t) <= 1e-6 * std::fmax(100.0, std::fabs(t)));
    }
  }
}

void over_awkward_shapes(const CodeMapsKernel& kernel) {
  check::Random random(3);
  const CodeMapsKernel& reference = *code_maps_reference();
  for (int64_t count : {0, 1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 127, 130}) {
    for (int members = 0; members < 8; ++members) {
      const Inputs inputs(count, random);
      const WeightedSum sum = inputs.sum(members, count);
      std::vector<int8_t> expected(static_cast<size_t>(count + 1), 55), codes = expected;
      reference.to_codes(sum, expected.data());
      kernel.to_codes(sum, codes.data());
      CHECK_NOTE(codes == expected, "%s: codes, %d of members %d", isa_name(kernel.isa), static_cast<int>(count),
                 members);
      for (bool relu : {false, true}) {
        std::vector<float> wanted(static_cast<size_t>(count + 1), -7.5f), y = wanted;
        reference.to_floats(sum, relu, wanted.data());
        kernel.to_floats(sum, relu, y.data());
        // A NaN need not have the reference's sign.
        const bool same = std::equal(y.begin(), y.end(), wanted.begin(), [](float p, float q) {
          return (std::isnan(p) && std::isnan(q)) || std::memcmp(&p, &q, sizeof p) == 0;
        });
        CHECK_NOTE(same, "%s: floats, %d of members %d", isa_name(kernel.isa), static_cast<int>(count), members);
      }
    }
    for (int64_t rows : {1, 2, 9}) {
      const Inputs inputs(rows * count, random);
      std::vector<const int8_t*> at;
      for (int64_t r = 0; r < rows; ++r) at.push_back(inputs.a.data() + r * count);
      std::vector<int8_t> expected(static_cast<size_t>(count + 1), 55), codes = expected;
      reference.largest(at.data(), rows, count, expected.data());
      kernel.largest(at.data(), rows, count, codes.data());
      CHECK_NOTE(codes == expected, "%s: the largest of %d", isa_name(kernel.isa), static_cast<int>(count));
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t r = 0; r < rows; ++r) CHECK(expected[static_cast<size_t>(i)] >= at[static_cast<size_t>(r)][i]);
      }
    }
  }
}

}  // namespace

int main() {
  against_doubles();
  std::size_t count;
  const Isa* isas = code_maps_variants(&count);
  for (std::size_t i = 0; i < count; ++i) {
    if (isa_missing(isas[i]) != nullptr) {
      std::printf("  code_maps       %-12s not run: %s\n", isa_name(isas[i]), isa_missing(isas[i]));
      continue;
    }
    const CodeMapsKernel* kernel = code_maps_kernel(isas[i]);
    CHECK(kernel->isa == isas[i]);
    over_awkward_shapes(*kernel);
    std::printf("  code_maps       %-12s ran, equal to the reference\n", isa_name(isas[i]));
  }
  return check::report("test_code_maps");
}
