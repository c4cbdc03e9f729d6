// Every variant of the in-block recursion that this CPU runs, bit for bit against the reference; the
// reference against the formula of gpfq.h in plain loops, and against its own double precision.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "check.h"
#include "each_variant.h"
#include "gpfq/gpfq.h"

using namespace bantamweight;

namespace {

template <class T>
struct Problem {
  GpfqPanel<T> panel = {};
  std::vector<T> start, lower, scale, inverse_scale, zero, previous;
  std::vector<int32_t> group_of_row;

  struct Result {
    std::vector<T> amounts;
    std::vector<uint8_t> codes;
  };

  template <class Run>
  Result run(const Run& run) const {
    Result result = {start, std::vector<uint8_t>(start.size(), 255)};
    GpfqPanel<T> p = panel;
    p.panel = result.amounts.data();
    p.lower = lower.data();
    p.scale = scale.data();
    p.inverse_scale = inverse_scale.data();
    p.zero = zero.data();
    p.previous = p.feedback == GpfqFeedback::change ? previous.data() : nullptr;
    p.group_of_row = group_of_row.data();
    p.codes = result.codes.data();
    run(p);
    return result;
  }
};

struct Kind {
  int levels;
  GpfqFeedback feedback;
  GpfqRounding rounding;
  GpfqShrink shrink;
};

template <class T>
Problem<T> make_problem(int64_t problems, int64_t rows, int64_t columns, int64_t groups, const Kind& kind,
                        unsigned seed) {
  check::Random random(seed);
  Problem<T> made;
  GpfqPanel<T>& p = made.panel;
  p.problems = problems;
  p.rows = rows;
  p.columns = columns;
  p.groups = groups;
  p.levels = kind.levels;
  p.feedback = kind.feedback;
  p.rounding = kind.rounding;
  p.shrink = kind.shrink;
  p.threshold = T(0.375);
  p.seed = 77 + seed;
  p.first_row = 5;
  for (int64_t i = 0; i < problems * rows * columns; ++i) {
    made.start.push_back(static_cast<T>(random.uniform()));
    made.previous.push_back(static_cast<T>(0.5f * random.uniform()));
  }
  made.previous.reserve(1);  // an empty panel still passes a pointer
  const float coupling = 1.0f / std::sqrt(static_cast<float>(rows + 1));
  for (int64_t i = 0; i < problems * rows * rows; ++i) {
    made.lower.push_back(static_cast<T>(coupling * random.uniform()));
  }
  for (int64_t i = 0; i < problems * groups * columns; ++i) {
    const T scale = static_cast<T>(2.5f / static_cast<float>(kind.levels) * (1.0f + 0.3f * random.uniform()));
    made.scale.push_back(scale);
    made.inverse_scale.push_back(T(1) / scale);
    const bool whole = random.below(2) == 0;
    made.zero.push_back(static_cast<T>(0.5f * static_cast<float>(kind.levels - 1) + (whole ? 0.5f : random.uniform())));
  }
  for (int64_t t = 0; t < rows; ++t) made.group_of_row.push_back(static_cast<int32_t>(t * groups / rows));
  return made;
}

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

constexpr Kind kKinds[] = {
    {16, GpfqFeedback::value, GpfqRounding::nearest, GpfqShrink::none},
    {4, GpfqFeedback::change, GpfqRounding::nearest, GpfqShrink::none},
    {3, GpfqFeedback::error, GpfqRounding::nearest, GpfqShrink::none},
    {8, GpfqFeedback::value, GpfqRounding::stochastic, GpfqShrink::none},
    {15, GpfqFeedback::value, GpfqRounding::nearest, GpfqShrink::soft},
    {256, GpfqFeedback::error, GpfqRounding::stochastic, GpfqShrink::hard},
    {2, GpfqFeedback::change, GpfqRounding::stochastic, GpfqShrink::soft},
};

struct Size {
  int64_t problems, rows, columns, groups;
};

constexpr Size kSizes[] = {{1, 1, 1, 1},   {2, 3, 5, 1},    {1, 4, 4, 2},   {1, 5, 16, 5},           {3, 7, 15, 2},
                           {1, 8, 17, 1},  {1, 13, 33, 3},  {2, 16, 31, 4}, {1, 63, 32, 2},          {1, 64, 65, 1},
                           {1, 65, 70, 5}, {1, 128, 40, 1}, {0, 4, 4, 1},   {1, kGpfqMaxRows, 3, 7}, {1, 0, 4, 1},
                           {4, 9, 0, 1},   {1, 128, 130, 1}};

void equal_to_the_reference(Isa isa) {
  unsigned seed = 1;
  for (const Size& size : kSizes) {
    for (const Kind& kind : kKinds) {
      const auto made = make_problem<float>(size.problems, size.rows, size.columns, size.groups, kind, seed++);
      Status status = Status::unsupported;
      const auto tested = made.run([&](const GpfqPanel<float>& p) { status = gpfq_panel(p, isa); });
      const auto oracle = made.run([](const GpfqPanel<float>& p) { gpfq_panel(p, Isa::reference); });
      CHECK(status == Status::ok);
      CHECK_NOTE(tested.codes == oracle.codes && same_bits(tested.amounts, oracle.amounts),
                 "%s: problems=%d rows=%d columns=%d groups=%d levels=%d feedback=%d rounding=%d shrink=%d",
                 isa_name(isa), static_cast<int>(size.problems), static_cast<int>(size.rows),
                 static_cast<int>(size.columns), static_cast<int>(size.groups), kind.levels,
                 static_cast<int>(kind.feedback), static_cast<int>(kind.rounding), static_cast<int>(kind.shrink));
    }
  }
}

// NaN and infinity in an argument reach code 0 or the last code, the same one on every variant.
void not_finite(Isa isa) {
  for (const Kind& kind : kKinds) {
    auto made = make_problem<float>(1, 9, 37, 1, kind, 99);
    for (size_t i = 0; i < 37; i += 4) made.start[i] = i % 3 == 0 ? NAN : i % 3 == 1 ? INFINITY : -INFINITY;
    const auto tested = made.run([&](const GpfqPanel<float>& p) { gpfq_panel(p, isa); });
    const auto oracle = made.run([](const GpfqPanel<float>& p) { gpfq_panel(p, Isa::reference); });
    CHECK_NOTE(std::equal(tested.codes.begin(), tested.codes.begin() + 37, oracle.codes.begin()), "%s: levels=%d",
               isa_name(isa), kind.levels);
    CHECK(std::all_of(tested.codes.begin(), tested.codes.end(), [&](uint8_t c) { return c < kind.levels; }));
  }
}

// The three lines of gpfq.h, row by row, for rounding to nearest.
void the_reference_is_the_formula() {
  for (const Kind& kind : kKinds) {
    if (kind.rounding != GpfqRounding::nearest || kind.shrink != GpfqShrink::none) continue;
    const auto made = make_problem<double>(2, 21, 6, 3, kind, 5);
    const auto tested = made.run([](const GpfqPanel<double>& p) { CHECK(gpfq_panel(p) == Status::ok); });
    for (int64_t problem = 0; problem < 2; ++problem) {
      for (int64_t c = 0; c < 6; ++c) {
        double argument[21];
        const auto at = [&](int64_t t) { return static_cast<size_t>((problem * 21 + t) * 6 + c); };
        for (int64_t t = 0; t < 21; ++t) argument[t] = made.start[at(t)];
        for (int64_t t = 0; t < 21; ++t) {
          const auto grid = static_cast<size_t>((problem * 3 + made.group_of_row[static_cast<size_t>(t)]) * 6 + c);
          const double code = std::min(
              std::max(std::floor(argument[t] / made.scale[grid] + made.zero[grid] + 0.5), 0.0), kind.levels - 1.0);
          const double q = made.scale[grid] * (code - made.zero[grid]);
          const double amount = kind.feedback == GpfqFeedback::value    ? q
                                : kind.feedback == GpfqFeedback::change ? q - made.previous[at(t)]
                                                                        : q - argument[t];
          CHECK_NOTE(tested.codes[at(t)] == code && std::fabs(tested.amounts[at(t)] - amount) < 1e-9,
                     "levels=%d row=%d column=%d: code %d instead of %g", kind.levels, static_cast<int>(t),
                     static_cast<int>(c), tested.codes[at(t)], code);
          for (int64_t s = t + 1; s < 21; ++s) {
            argument[s] -= made.lower[static_cast<size_t>((problem * 21 + s) * 21 + t)] * amount;
          }
        }
      }
    }
  }
}

// Stochastic rounding is unbiased: without feedback below, the mean of the codes is the argument.
void stochastic_rounding_is_unbiased() {
  const Kind kind = {16, GpfqFeedback::value, GpfqRounding::stochastic, GpfqShrink::none};
  auto made = make_problem<float>(1, 100, 200, 1, kind, 3);
  std::fill(made.start.begin(), made.start.end(), 5.3f);
  std::fill(made.lower.begin(), made.lower.end(), 0.0f);
  std::fill(made.scale.begin(), made.scale.end(), 1.0f);
  std::fill(made.inverse_scale.begin(), made.inverse_scale.end(), 1.0f);
  std::fill(made.zero.begin(), made.zero.end(), 2.0f);
  const auto result = made.run([](const GpfqPanel<float>& p) { gpfq_panel(p, Isa::reference); });
  double sum = 0.0;
  for (uint8_t code : result.codes) {
    CHECK(code == 7 || code == 8);
    sum += code - 2.0;
  }
  // 20,000 draws of a coin with p = 0.3: five standard deviations are 0.016.
  CHECK(std::fabs(sum / 20000.0 - 5.3) < 0.017);
}

void bad_arguments() {
  const auto made = make_problem<float>(1, 4, 4, 2, kKinds[1], 1);
  const auto status = [&](auto change) {
    Status got = Status::ok;
    made.run([&](GpfqPanel<float> p) {
      change(p);
      got = gpfq_panel(p, Isa::reference);
    });
    return got;
  };
  const int32_t wrong_groups[] = {0, 0, 1, 2};
  CHECK(status([](GpfqPanel<float>&) {}) == Status::ok);
  CHECK(status([](GpfqPanel<float>& p) { p.rows = kGpfqMaxRows + 1; }) == Status::invalid_argument);
  CHECK(status([](GpfqPanel<float>& p) { p.columns = -1; }) == Status::invalid_argument);
  CHECK(status([](GpfqPanel<float>& p) { p.levels = 1; }) == Status::invalid_argument);
  CHECK(status([](GpfqPanel<float>& p) { p.levels = 257; }) == Status::invalid_argument);
  CHECK(status([](GpfqPanel<float>& p) { p.previous = nullptr; }) == Status::invalid_argument);
  CHECK(status([](GpfqPanel<float>& p) { p.threshold = -1.0f; }) == Status::invalid_argument);
  CHECK(status([&](GpfqPanel<float>& p) { p.group_of_row = wrong_groups; }) == Status::invalid_argument);
}

}  // namespace

int main() {
  check::each_kernel<GpfqKernel>(
      gpfq_variants, {gpfq_kernel_avx512(), gpfq_kernel_avx2(), gpfq_kernel_neon(), gpfq_kernel_reference()},
      [](const GpfqKernel& kernel) {
        equal_to_the_reference(kernel.isa);
        not_finite(kernel.isa);
      });
  the_reference_is_the_formula();
  stochastic_rounding_is_unbiased();
  bad_arguments();
  return check::report("test_gpfq");
}
