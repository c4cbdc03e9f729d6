// What the offsets of activation blocks add: every variant bit for bit against the reference, and the
// reference against the sum in double precision.
#include <cmath>
#include <cstring>
#include <vector>

#include "block_offsets/block_offsets.h"
#include "check.h"
#include "each_variant.h"

using namespace bantamweight;

namespace {

void over_awkward_shapes(const BlockOffsetsKernel& kernel) {
  check::Random random(3);
  for (int64_t m : {0, 1, 2, 3, 4, 5, 9}) {
    for (int64_t n : {0, 1, 3, 4, 7, 8, 15, 16, 17, 31, 33, 63, 64}) {
      for (int64_t groups : {0, 1, 6, 33}) {
        const int64_t width = n + random.below(3), ldy = n + random.below(3);
        std::vector<float> offset(static_cast<size_t>(m * groups)), sums(static_cast<size_t>(groups * width));
        std::vector<float> before(static_cast<size_t>(m * ldy));
        for (auto* values : {&offset, &sums, &before}) {
          for (float& v : *values) v = random.uniform();
        }
        std::vector<float> expected = before, y = before;
        BlockOffsetsArgs args = {offset.data(), sums.data(), groups, width, expected.data(), ldy, m, n};
        block_offsets_reference()->run(args);
        args.y = y.data();
        kernel.run(args);
        const bool equal = y.empty() || std::memcmp(y.data(), expected.data(), y.size() * sizeof(float)) == 0;
        CHECK_NOTE(equal, "%s: m=%d n=%d groups=%d", isa_name(kernel.isa), static_cast<int>(m), static_cast<int>(n),
                   static_cast<int>(groups));
        for (int64_t i = 0; i < m * ldy; ++i) {
          const int64_t r = i / ldy, column = i % ldy;
          double exact = before[static_cast<size_t>(i)];
          for (int64_t g = 0; g < groups && column < n; ++g) {
            exact += static_cast<double>(offset[static_cast<size_t>(r * groups + g)]) *
                     static_cast<double>(sums[static_cast<size_t>(g * width + column)]);
          }
          CHECK(std::fabs(static_cast<double>(y[static_cast<size_t>(i)]) - exact) <= 1e-5);
        }
      }
    }
  }
}

}  // namespace

int main() {
  check::each_kernel<BlockOffsetsKernel>(
      block_offsets_variants,
      {block_offsets_avx512(), block_offsets_avx2(), block_offsets_neon(), block_offsets_reference()},
      [](const BlockOffsetsKernel& kernel) {
        CHECK(block_offsets_kernel(kernel.isa) == &kernel);
        over_awkward_shapes(kernel);
      });
  return check::report("test_block_offsets");
}
