// Every variant of the activation rounding that this CPU runs, byte for byte against the reference.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

#include "check.h"
#include "each_variant.h"
#include "quantize_activations/quantize_activations.h"

using namespace bantamweight;

namespace {

struct Rounded {
  Status status = Status::ok;
  std::vector<int8_t> q;
  std::vector<float> scale;
  std::vector<int32_t> sums;
  std::vector<float> offset;
};

struct Input {
  const float* x;
  int64_t ldx, m, k, group_size;
  Activations mode = Activations::int8;
  Epilogue epilogue = {};
};

constexpr Activations kModes[] = {Activations::int8, Activations::int8_block, Activations::int16};

template <class Run>
Rounded round_rows(const Input& in, const Run& run) {
  const int64_t groups = in.k == 0 ? 0 : (in.k + in.group_size - 1) / in.group_size;
  Rounded out;
  const int64_t rows = in.m * rows_per_row(in.mode);
  out.q.assign(static_cast<size_t>(rows * padded_row_bytes(in.k)), 99);
  out.scale.assign(static_cast<size_t>(in.mode == Activations::int8_block ? rows * groups : rows), -1.0f);
  out.sums.assign(static_cast<size_t>(rows * groups), -999);
  QuantizeRowsArgs args;
  args.x = in.x;
  args.ldx = in.ldx;
  args.m = in.m;
  args.k = in.k;
  args.group_size = in.group_size;
  args.q = out.q.data();
  args.scale = out.scale.data();
  args.sums = out.sums.data();
  args.mode = in.mode;
  if (in.mode == Activations::int8_block) out.offset.assign(static_cast<size_t>(rows * groups), -1.0f);
  args.offset = out.offset.data();
  args.epilogue = in.epilogue;
  std::vector<float> row(static_cast<size_t>(in.k));
  args.epilogue_row = row.data();
  out.status = run(args);
  return out;
}

bool same(const Rounded& a, const Rounded& b) {
  return a.status == b.status && a.q == b.q && a.sums == b.sums &&
         (a.scale.empty() || std::memcmp(a.scale.data(), b.scale.data(), a.scale.size() * sizeof(float)) == 0) &&
         (a.offset.empty() || std::memcmp(a.offset.data(), b.offset.data(), a.offset.size() * sizeof(float)) == 0);
}

// Against the formula of quantize_activations.h, for the reference itself.
void check_formula(const Input& in, const Rounded& out) {
  const int64_t groups = in.k == 0 ? 0 : (in.k + in.group_size - 1) / in.group_size;
  for (int64_t r = 0; r < in.m; ++r) {
    float max = 0.0f;
    for (int64_t k = 0; k < in.k; ++k) max = std::fmax(max, std::fabs(in.x[r * in.ldx + k]));
    const bool zero = !std::isfinite(127.0f / max);
    CHECK(out.scale[static_cast<size_t>(r)] == (zero ? 0.0f : max / 127.0f));
    std::vector<int32_t> sums(static_cast<size_t>(groups));
    int reached = 0;
    for (int64_t k = 0; k < padded_row_bytes(in.k); ++k) {
      const int q = out.q[static_cast<size_t>(r * padded_row_bytes(in.k) + k)];
      const double exact = k < in.k && !zero ? 127.0 * in.x[r * in.ldx + k] / max : 0.0;
      CHECK_NOTE(std::fabs(q - exact) <= 0.5001, "%d for %g", q, exact);
      reached = std::max(reached, std::abs(q));
      if (k < in.k) sums[static_cast<size_t>(k / in.group_size)] += q;
    }
    CHECK(reached == (zero || in.k == 0 ? 0 : 127));
    CHECK(groups == 0 || std::memcmp(sums.data(), out.sums.data() + r * groups, sums.size() * sizeof(int32_t)) == 0);
  }
}

// The other modes: what the codes stand for is within half a step of the input, which is 1 / 127 of
// half the group's range, or 1 / (127 * 254) of the row's largest.
void check_mode(const Input& in, const Rounded& out) {
  const bool halves = in.mode == Activations::int16;
  const int64_t padded = padded_row_bytes(in.k), per_row = rows_per_row(in.mode);
  const int64_t groups = in.k == 0 ? 0 : (in.k + in.group_size - 1) / in.group_size;
  for (int64_t r = 0; r < in.m; ++r) {
    for (int64_t k = 0; k < in.k; ++k) {
      const int64_t first = halves ? 0 : k / in.group_size * in.group_size;
      const int64_t last = halves ? in.k : std::min(in.k, first + in.group_size);
      float max = 0.0f, low = in.x[r * in.ldx + first], high = low;
      for (int64_t i = first; i < last; ++i) {
        const float x = in.x[r * in.ldx + i];
        max = std::fmax(max, std::fabs(x));
        low = std::fmin(low, x);
        high = std::fmax(high, x);
      }
      double value =
          halves ? 0.0 : static_cast<double>(out.offset[static_cast<size_t>(r * groups + k / in.group_size)]);
      for (int64_t h = r * per_row; h < (r + 1) * per_row; ++h) {
        const int q = out.q[static_cast<size_t>(h * padded + k)];
        CHECK(q >= -127 && q <= 127);
        value += static_cast<double>(out.scale[static_cast<size_t>(halves ? h : r * groups + k / in.group_size)]) * q;
      }
      const double reach =
          halves ? static_cast<double>(max) : 0.5 * (static_cast<double>(high) - static_cast<double>(low));
      const double step = reach / (halves ? 127.0 * 254.0 : 127.0);
      const double error = std::fabs(value - static_cast<double>(in.x[r * in.ldx + k]));
      CHECK_NOTE(error <= 0.51 * step + 2e-7 * static_cast<double>(max) || max < 1e-33f, "%g instead of %g", value,
                 static_cast<double>(in.x[r * in.ldx + k]));
    }
    for (int64_t h = r * per_row; h < (r + 1) * per_row; ++h) {
      std::vector<int32_t> sums(static_cast<size_t>(groups));
      for (int64_t k = 0; k < padded; ++k) {
        const int q = out.q[static_cast<size_t>(h * padded + k)];
        if (k < in.k) sums[static_cast<size_t>(k / in.group_size)] += q;
        CHECK(k < in.k || q == 0);
      }
      CHECK(groups == 0 || std::memcmp(sums.data(), out.sums.data() + h * groups, sums.size() * sizeof(int32_t)) == 0);
    }
  }
}

void over_awkward_shapes(const QuantizeRowsKernel& kernel) {
  check::Random random(7);
  const int64_t ks[] = {0, 1, 3, 7, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 255, 300, 1000};
  for (int64_t k : ks) {
    for (int64_t group_size :
         {int64_t{1}, int64_t{3}, int64_t{16}, int64_t{32}, int64_t{50}, int64_t{64}, int64_t{128}, k}) {
      if (group_size == 0) continue;
      for (int64_t m : {0, 1, 3}) {
        const int64_t ldx = k + random.below(4);
        std::vector<float> storage(static_cast<size_t>(m * ldx + 1));
        // Sizes from subnormal to huge, one kind a row; every third value falls half way between two codes.
        const float sizes[] = {1.0f, 1e-42f, 3e-38f, 1e30f, 0.0f, 1e-3f};
        for (int64_t r = 0; r < m; ++r) {
          const float size = sizes[random.below(6)];
          for (int64_t i = 0; i < k; ++i) {
            const bool half = random.below(3) == 0;
            storage[static_cast<size_t>(1 + r * ldx + i)] =
                size * (half ? (static_cast<float>(random.below(253)) - 126.5f) / 128.0f : random.uniform());
          }
          if (k > 0)
            storage[static_cast<size_t>(1 + r * ldx + random.below(static_cast<int>(k)))] = -127.0f / 128.0f * size;
        }
        for (Activations mode : kModes) {
          const Input in = {storage.data() + 1, ldx, m, k, group_size, mode};
          const Rounded expected = round_rows(in, quantize_rows_reference()->run);
          const Rounded direct = round_rows(in, kernel.run);
          const Rounded dispatched =
              round_rows(in, [&](const QuantizeRowsArgs& a) { return quantize_rows(a, kernel.isa); });
          CHECK(expected.status == Status::ok);
          CHECK_NOTE(same(direct, expected) && same(dispatched, expected), "%s: m=%d k=%d group_size=%d mode=%d",
                     isa_name(kernel.isa), static_cast<int>(m), static_cast<int>(k), static_cast<int>(group_size),
                     static_cast<int>(in.mode));
          if (kernel.isa == Isa::reference && m > 0) {
            in.mode == Activations::int8 ? check_formula(in, expected) : check_mode(in, expected);
          }
        }
      }
    }
  }
}

// Rounding behind an epilogue gives what rounding the epilogue's outputs gives.
void after_an_epilogue(const QuantizeRowsKernel& kernel) {
  check::Random random(9);
  const auto dispatch = [&](const QuantizeRowsArgs& a) { return quantize_rows(a, kernel.isa); };
  for (int64_t k : {0, 1, 15, 16, 17, 63, 64, 65, 100, 300}) {
    for (int64_t m : {0, 1, 3, 260}) {  // the last shared out over the threads
      const int64_t ldx = k + random.below(4), ldr = k + random.below(4);
      std::vector<float> storage(static_cast<size_t>(m * ldx + 1)), added(static_cast<size_t>(m * ldr + 1));
      for (float& v : storage) v = 6.0f * random.uniform();
      for (float& v : added) v = random.uniform();
      for (int activation = 0; activation < kActivationCount; ++activation) {
        for (const float* residual :
             {static_cast<const float*>(nullptr), static_cast<const float*>(added.data() + 1)}) {
          const Epilogue epilogue = {static_cast<Activation>(activation), residual, ldr};
          std::vector<float> finished = storage;
          epilogue_reference()->run({finished.data() + 1, ldx, m, k, epilogue});
          for (Activations mode : kModes) {
            const Rounded expected =
                round_rows({finished.data() + 1, ldx, m, k, 32, mode}, quantize_rows_reference()->run);
            const Input in = {storage.data() + 1, ldx, m, k, 32, mode, epilogue};
            CHECK_NOTE(same(round_rows(in, kernel.run), expected) && same(round_rows(in, dispatch), expected),
                       "%s: activation %d, m=%d k=%d mode=%d", isa_name(kernel.isa), activation, static_cast<int>(m),
                       static_cast<int>(k), static_cast<int>(mode));
          }
        }
      }
      if (m * k == 0) continue;
      added[static_cast<size_t>(1 + (m - 1) * ldr + k - 1)] = std::numeric_limits<float>::quiet_NaN();
      for (Activations mode : kModes) {
        const Epilogue epilogue = {Activation::gelu, added.data() + 1, ldr};
        CHECK(round_rows({storage.data() + 1, ldx, m, k, 32, mode, epilogue}, dispatch).status == Status::not_finite);
      }
    }
  }
}

// Blocks whose middle is rounded by as much as they spread: no code may leave -127 .. 127.
void around_a_far_middle(const QuantizeRowsKernel& kernel) {
  check::Random random(9);
  for (float far : {1000.0f, -1e30f, 3.3e38f}) {
    for (int64_t k : {int64_t{2}, int64_t{5}, int64_t{40}, int64_t{128}, int64_t{200}}) {
      std::vector<float> x(static_cast<size_t>(k), far);
      for (float& v : x) {
        if (random.below(2) == 0) v = std::nextafter(far, 0.0f);
      }
      x[0] = far;
      x[1] = -std::numeric_limits<float>::max() / (random.below(2) == 0 ? 1.0f : 1e20f);
      if (far == 1000.0f) x[1] = std::nextafter(far, 0.0f);
      const Input in = {x.data(), k, 1, k, 128, Activations::int8_block};
      const Rounded out = round_rows(in, kernel.run);
      CHECK(out.status == Status::ok && same(out, round_rows(in, quantize_rows_reference()->run)));
      check_mode(in, out);
    }
  }
}

// Enough rows that they are shared out over the threads.
void over_many_rows(const QuantizeRowsKernel& kernel) {
  check::Random random(8);
  std::vector<float> x(300 * 513);
  for (float& v : x) v = random.uniform();
  const auto dispatch = [&](const QuantizeRowsArgs& a) { return quantize_rows(a, kernel.isa); };
  for (Activations mode : kModes) {
    const Input in = {x.data(), 513, 300, 512, 128, mode};
    CHECK(same(round_rows(in, dispatch), round_rows(in, quantize_rows_reference()->run)));
    x[299 * 513 + 511] = std::numeric_limits<float>::infinity();
    CHECK(round_rows(in, dispatch).status == Status::not_finite);
    x[299 * 513 + 511] = 0.5f;
  }
}

void not_finite_anywhere(const QuantizeRowsKernel& kernel) {
  std::vector<float> x(2 * 101, 1.0f);
  const Input in = {x.data(), 101, 2, 101, 101};
  for (float bad : {std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::quiet_NaN(),
                    std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity()}) {
    for (size_t at = 0; at < x.size(); ++at) {
      x[at] = bad;
      for (Activations mode : kModes) {
        Input moded = in;
        moded.mode = mode;
        moded.group_size = 32;
        CHECK_NOTE(round_rows(moded, kernel.run).status == Status::not_finite, "%s: %g at %d", isa_name(kernel.isa),
                   static_cast<double>(bad), static_cast<int>(at));
      }
      x[at] = 1.0f;
    }
  }
  // The largest float is finite.
  x[50] = std::numeric_limits<float>::max();
  CHECK(same(round_rows(in, kernel.run), round_rows(in, quantize_rows_reference()->run)));
  // What lies between the rows is not the kernel's.
  const Input apart = {x.data(), 101, 2, 60, 60};
  x[60] = std::numeric_limits<float>::quiet_NaN();
  CHECK(round_rows(apart, kernel.run).status == Status::ok);
}

void bad_arguments() {
  float x[4] = {};
  const auto dispatch = [](const QuantizeRowsArgs& a) { return quantize_rows(a, Isa::reference); };
  CHECK(round_rows({x, 3, 1, 4, 4}, dispatch).status == Status::invalid_argument);
  QuantizeRowsArgs args = {x, 4, 1, 4, 0, nullptr, nullptr, nullptr, Activations::int8, {}};
  CHECK(quantize_rows(args, Isa::reference) == Status::invalid_argument);
  args.group_size = 4;
  args.epilogue = {Activation::none, x, 3};
  CHECK(quantize_rows(args, Isa::reference) == Status::invalid_argument);
  args.epilogue = {};
  args.m = -1;
  CHECK(quantize_rows(args, Isa::reference) == Status::invalid_argument);
}

}  // namespace

int main() {
  check::each_kernel<QuantizeRowsKernel>(
      quantize_rows_variants,
      {quantize_rows_avx512(), quantize_rows_avx2(), quantize_rows_neon(), quantize_rows_reference()},
      [](const QuantizeRowsKernel& kernel) {
        over_awkward_shapes(kernel);
        after_an_epilogue(kernel);
        around_a_far_middle(kernel);
        over_many_rows(kernel);
        not_finite_anywhere(kernel);
      });
  bad_arguments();
  return check::report("test_quantize_rows");
}
