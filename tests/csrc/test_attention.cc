// Every variant of the attention that this CPU runs against the reference, bit for bit but for AMX's, which rounds to
// bfloat16; the reference against doubles.
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "attention/attention.h"
#include "check.h"
#include "each_variant.h"

using namespace bantamweight;

namespace {

constexpr float kUntouched = -12345.5f, kInfinity = std::numeric_limits<float>::infinity();

enum class Mask { none, of_keys, of_queries, of_heads };

struct Case {
  int64_t batch, heads, queries, keys, head_size;
  Mask mask;
};

struct Input {
  Case of;
  int64_t row, mask_size;  // q, k and v lie in one row, as they come out of one call
  std::vector<float> rows, mask;
};

Input make_input(const Case& of, check::Random& random) {
  const int64_t width = of.heads * of.head_size, most = of.queries > of.keys ? of.queries : of.keys;
  Input in = {of, 3 * width + 5, of.keys, {}, {}};
  in.rows.assign(static_cast<size_t>(of.batch * most * in.row + 1), 0.0f);
  for (float& x : in.rows) x = 3.0f * random.uniform();
  if (of.mask == Mask::of_queries) in.mask_size *= of.queries;
  if (of.mask == Mask::of_heads) in.mask_size *= of.queries * of.heads;
  for (int64_t i = 0; i < of.batch * in.mask_size; ++i) {
    in.mask.push_back(random.below(4) == 0 ? -kInfinity : random.below(4) == 0 ? -3.4e38f : random.uniform());
  }
  if (of.mask == Mask::of_queries && !in.mask.empty()) {  // one query that sees nothing
    for (int64_t j = 0; j < of.keys; ++j) in.mask[static_cast<size_t>(j)] = -kInfinity;
  }
  return in;
}

AttentionArgs args_of(const Input& in, std::vector<float>* out) {
  const Case& of = in.of;
  const int64_t width = of.heads * of.head_size, most = of.queries > of.keys ? of.queries : of.keys;
  AttentionArgs args;
  args.q = {in.rows.data() + 1, most * in.row, in.row};
  args.k = {in.rows.data() + 1 + width, most * in.row, in.row};
  args.v = {in.rows.data() + 1 + 2 * width, most * in.row, in.row};
  if (of.mask != Mask::none) {
    args.mask = in.mask.data();
    args.mask_batch = in.mask_size;
    args.mask_head = of.mask == Mask::of_heads ? of.queries * of.keys : 0;
    args.mask_query = of.mask == Mask::of_keys ? 0 : of.keys;
  }
  args.batch = of.batch;
  args.heads = of.heads;
  args.queries = of.queries;
  args.keys = of.keys;
  args.head_size = of.head_size;
  args.scale = of.head_size == 0 ? 1.0f : 1.0f / std::sqrt(static_cast<float>(of.head_size));
  out->assign(static_cast<size_t>(of.batch * of.queries * (width + 3) + 1), kUntouched);
  args.out = out->data() + 1;
  args.out_row = width + 3;
  args.out_batch = of.queries * args.out_row;
  return args;
}

void check_doubles(const AttentionArgs& args) {
  for (int64_t i = 0; i < args.batch * args.heads * args.queries; ++i) {
    const int64_t b = i / args.queries / args.heads, h = i / args.queries % args.heads, r = i % args.queries;
    const float* q = args.q.data + b * args.q.batch + r * args.q.row + h * args.head_size;
    const float* k = args.k.data + b * args.k.batch + h * args.head_size;
    const float* v = args.v.data + b * args.v.batch + h * args.head_size;
    const float* mask =
        args.mask == nullptr ? nullptr : args.mask + b * args.mask_batch + h * args.mask_head + r * args.mask_query;
    std::vector<double> p;
    double largest = -std::numeric_limits<double>::infinity(), sum = 0.0;
    for (int64_t j = 0; j < args.keys; ++j) {
      double score = 0.0;
      for (int64_t e = 0; e < args.head_size; ++e) score += static_cast<double>(q[e]) * k[j * args.k.row + e];
      // The sum with the mask is a float: beside the least float every score is the same.
      p.push_back(static_cast<float>(score * args.scale + (mask == nullptr ? 0.0 : static_cast<double>(mask[j]))));
      largest = std::fmax(largest, p.back());
    }
    for (double& s : p) {
      s = std::isinf(largest) ? 0.0 : std::exp(s - largest);
      sum += s;
    }
    for (int64_t e = 0; e < args.head_size; ++e) {
      double wanted = 0.0;
      for (int64_t j = 0; j < args.keys && sum > 0.0; ++j)
        wanted += p[static_cast<size_t>(j)] / sum * v[j * args.v.row + e];
      const double got = args.out[b * args.out_batch + r * args.out_row + h * args.head_size + e];
      CHECK_NOTE(std::fabs(got - wanted) <= 1e-5, "%d keys, %d elements: %g instead of %g", static_cast<int>(args.keys),
                 static_cast<int>(args.head_size), got, wanted);
    }
  }
}

bool same(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

// What rounding to 8 bits of fraction does to scores of size 10 and so to outputs of size 3: 0.01 of it in the mean.
void check_rounded(const std::vector<float>& out, const std::vector<float>& expected, const Case& of) {
  double error = 0.0, size = 0.0, count = 0.0;
  for (size_t i = 0; i < out.size(); ++i) {
    const double d = static_cast<double>(out[i]) - expected[i];
    CHECK((out[i] == kUntouched) == (expected[i] == kUntouched));
    CHECK_NOTE(std::fabs(d) <= 0.3, "amx: %d keys, %d elements: %g instead of %g", static_cast<int>(of.keys),
               static_cast<int>(of.head_size), static_cast<double>(out[i]), static_cast<double>(expected[i]));
    error += d * d;
    if (expected[i] == kUntouched) continue;
    size += static_cast<double>(expected[i]) * expected[i];
    count += 0.1;
  }
  CHECK_NOTE(error <= 4e-4 * (size + count), "amx: %d queries, %d keys, %d elements: off by %g",
             static_cast<int>(of.queries), static_cast<int>(of.keys), static_cast<int>(of.head_size),
             std::sqrt(error / size));
}

void over_awkward_shapes(const AttentionKernel& kernel) {
  check::Random random(5);
  const auto check_case = [&](const Case& of) {
    const Input in = make_input(of, random);
    std::vector<float> expected, out;
    const AttentionArgs args = args_of(in, &expected);
    CHECK(attention(args, Isa::reference) == Status::ok);
    if (kernel.isa == Isa::reference) check_doubles(args);
    AttentionArgs own = args_of(in, &out);
    if (kernel.isa == Isa::amx) {
      CHECK(attention(own, Isa::amx) == Status::ok);  // not allowed to round: AVX-512's
      CHECK(same(out, expected));
      own.bfloat16 = true;
      CHECK(attention(own, Isa::amx) == Status::ok);
      check_rounded(out, expected, of);
      return;
    }
    own.bfloat16 = true;  // leave that others do not take
    CHECK(attention(own, kernel.isa) == Status::ok);
    CHECK_NOTE(same(out, expected), "%s: %d queries, %d keys, %d elements", isa_name(kernel.isa),
               static_cast<int>(of.queries), static_cast<int>(of.keys), static_cast<int>(of.head_size));
  };
  for (int64_t queries : {0, 1, 5, 6, 7, 13}) {
    for (int64_t keys : {0, 1, 3, 15, 16, 17, 31, 64, 65, 130}) {
      for (int64_t head_size : {0, 1, 7, 16, 17, 32, 64, 80}) {
        for (Mask mask : {Mask::none, Mask::of_keys, Mask::of_queries, Mask::of_heads}) {
          check_case({2, 3, queries, keys, head_size, mask});
        }
      }
    }
  }
  check_case({1, 1, 0, 4, 4, Mask::none});
  check_case({0, 2, 3, 4, 4, Mask::none});
  check_case({1, 0, 3, 4, 4, Mask::none});
  check_case({2, 2, 500, 300, 32, Mask::of_queries});  // queries shared out, too
}

// What is not a number is found wherever it stands, and a masked key does not hide it.
void not_finite(const AttentionKernel& kernel) {
  check::Random random(6);
  const Case of = {1, 2, 7, 33, 16, Mask::of_keys};
  std::vector<float> out;
  for (float bad : {kInfinity, -kInfinity, std::numeric_limits<float>::quiet_NaN()}) {
    for (int64_t row : {0, 6, 32}) {
      Input in = make_input(of, random);
      in.rows[static_cast<size_t>(1 + row * in.row + (row < of.queries ? 0 : 2 * 16) + 16 + 3)] = bad;
      AttentionArgs args = args_of(in, &out);
      args.bfloat16 = true;
      CHECK(attention(args, kernel.isa) == Status::not_finite);
    }
    Input in = make_input(of, random);
    in.mask[20] = bad;
    const Status wanted = bad == -kInfinity ? Status::ok : Status::not_finite;
    AttentionArgs args = args_of(in, &out);
    args.bfloat16 = true;
    CHECK(attention(args, kernel.isa) == wanted);
  }
}

void bad_arguments() {
  check::Random random(7);
  const Input in = make_input({1, 2, 3, 4, 5, Mask::none}, random);
  std::vector<float> out;
  AttentionArgs args = args_of(in, &out);
  args.q.row = 9;
  CHECK(attention(args, Isa::reference) == Status::invalid_argument);
  args = args_of(in, &out);
  args.out_row = 9;
  CHECK(attention(args, Isa::reference) == Status::invalid_argument);
  args = args_of(in, &out);
  args.keys = -1;
  CHECK(attention(args, Isa::reference) == Status::invalid_argument);
}

}  // namespace

int main() {
  check::each_kernel<AttentionKernel>(
      attention_variants,
      {attention_amx(), attention_avx512(), attention_avx2(), attention_neon(), attention_reference()},
      [](const AttentionKernel& kernel) {
        over_awkward_shapes(kernel);
        not_finite(kernel);
      });
  bad_arguments();
  return check::report("test_attention");
}
